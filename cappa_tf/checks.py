"""Checks of arguments; every message states the rule and what came."""


def check_positive_ints(**values):
    """Raises unless each value is an int of at least 1 (bool excluded)."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`{name}` must be a positive integer. "
                f"Received: {name}={value!r}"
            )


def check_fraction(**values):
    """Raises unless each value is a number in [0, 1]."""
    for name, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0.0 <= value <= 1.0:
            raise ValueError(
                f"`{name}` must be a number in [0, 1]. "
                f"Received: {name}={value!r}"
            )


def check_positive(**value):
    """Returns the one value given by name, which must be a number above 0."""
    ((name, number),) = value.items()
    is_number = isinstance(number, (int, float)) and not isinstance(
        number, bool
    )
    if not is_number or not number > 0.0:
        raise ValueError(
            f"`{name}` must be a number above 0. Received: {name}={number!r}"
        )
    return number


def check_bools(**values):
    """Raises unless each value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(
                f"`{name}` must be True or False. Received: {name}={value!r}"
            )


def check_choice(choices, **values):
    """Raises unless each value is one of the choices."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(
                f"`{name}` must be one of {sorted(choices)}. "
                f"Received: {name}={value!r}"
            )

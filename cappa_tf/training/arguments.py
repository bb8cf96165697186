"""Checks of the arguments that a configuration may give wrongly."""

from cappa_tf.training.ranges import check_integer


def check_counts(optional=False, **values):
    """Refuses what is no integer of at least 1 (or None, if `optional`)."""
    for name, value in values.items():
        if not (optional and value is None):
            check_integer(name, value, 1)


def check_bool(**values):
    """Refuses what is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(
                f"`{name}` must be True or False. Received: {name}={value!r}"
            )


def check_choice(choices, **values):
    """Refuses what is not among `choices`."""
    for name, value in values.items():
        matches = [c for c in choices if c is value or c == value]
        # 1 == True in Python: the types must agree as well.
        if not any(type(c) is type(value) for c in matches):
            raise ValueError(
                f"`{name}` must be one of {tuple(choices)}. "
                f"Received: {name}={value!r}"
            )


def check_callable(**values):
    """Refuses what is neither None nor callable."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise ValueError(
                f"`{name}` must be a function or None. "
                f"Received: {name}={value!r}"
            )


def constructed(value, name, *attributes):
    """The object itself, whether it or its constructor is given.

    A constructor (in a gin file `@Captioner`, without parentheses) lets the
    trainer set seed, precision and devices before any weight exists.

    Args:
        value: An object, or a function without arguments that returns one.
        name: The argument's name, for the message.
        *attributes: What the object must have.

    Raises:
        ValueError: If it lacks one of them.
    """
    if not all(hasattr(value, a) for a in attributes) or isinstance(
        value, type
    ):
        if not callable(value):
            raise ValueError(
                f"`{name}` must be an object with {', '.join(attributes)}, "
                f"or a constructor of one. Received: {name}={value!r}"
            )
        value = value()
    missing = [a for a in attributes if not hasattr(value, a)]
    if missing:
        raise ValueError(
            f"`{name}` lacks {', '.join(missing)}. Received: {name}={value!r}"
        )
    return value

"""Checks of constructor arguments: the rule, then what was received.

Configurations are text: 1e6 is a float and '3e-4' a string, so types are
checked, not only values.
"""


def integer(name, value, least):
    """Demands an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. "
            f"Received: {name}={value!r}"
        )


def choice(name, value, choices):
    """Demands one of some values."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}"
        )


def interval(name, value, most):
    """Demands (least, most) with 0 < least <= most, or None."""
    if value is None:
        return
    numbers = isinstance(value, tuple | list) and all(
        isinstance(x, int | float) for x in value
    )
    if not numbers or len(value) != 2 or not 0 < value[0] <= value[1] <= most:
        raise ValueError(
            f"`{name}` must be two numbers, 0 < least <= most <= {most}. "
            f"Received: {name}={value!r}"
        )


def pair(name, value):
    """(height, width) of one positive integer or a pair of them."""
    sides = (value, value) if isinstance(value, int) else tuple(value or ())
    if len(sides) != 2:
        raise ValueError(
            f"`{name}` must be an integer or (height, width). "
            f"Received: {name}={value!r}"
        )
    for side in sides:
        integer(name, side, 1)
    return sides

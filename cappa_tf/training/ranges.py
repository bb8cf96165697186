"""Checks of the numbers that schedules and optimizers are built from.

gin has neither types nor arithmetic: `3e-4` in quotes is a string and `1e6` a
float. A constructor that computes with them unchecked fails hours later or
not at all, so it asks here first.
"""

import numbers


def check_number(name, value, minimum=0.0, maximum=None, exclusive=False):
    """Returns `value` as a float, or says which rule it breaks.

    Args:
        name: Name of the argument, for the message.
        value: What was given; a bool or a string is not a number.
        minimum: Smallest allowed value.
        maximum: Largest allowed value; `None` for any finite number.
        exclusive: If `True`, `minimum` itself is not allowed.

    Returns:
        A Python float.

    Raises:
        ValueError: `value` is no finite number or outside the range.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    above = is_number and (value > minimum if exclusive else value >= minimum)
    # `value < inf` also refuses NaN and infinity.
    below = is_number and (
        value < float("inf") if maximum is None else value <= maximum
    )
    if not (above and below):
        rule = f"a number {'>' if exclusive else '>='} {minimum:g}"
        rule += "" if maximum is None else f" and <= {maximum:g}"
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")
    return float(value)


def check_integer(name, value, minimum=0):
    """Returns `value` as an int, or says which rule it breaks.

    Args:
        name: Name of the argument, for the message.
        value: What was given; a float is refused even if it is whole.
        minimum: Smallest allowed value.

    Returns:
        A Python int.

    Raises:
        ValueError: `value` is no integer or too small.
    """
    is_integer = isinstance(value, numbers.Integral)
    if not is_integer or isinstance(value, bool) or value < minimum:
        raise ValueError(
            f"`{name}` must be an integer >= {minimum}. "
            f"Received: {name}={value!r}"
        )
    return int(value)

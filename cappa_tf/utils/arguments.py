"""Validation of arguments; messages state the rule and the value received.

Configurations are text without types: `3e-4` in quotes is a string, and `1e6`
a float. A constructor that used them unchecked would fail hours later or not
at all, so it checks them here first.
"""

import importlib.util
import math
import numbers


def check_number(name, value, minimum=0.0, maximum=None, exclusive=False):
    """Returns `value` as a float after checking its type and range.

    Args:
        name: Name of the argument, for the message.
        value: Value of the argument; a bool or a string is not a number.
        minimum: Smallest allowed value.
        maximum: Largest allowed value; `None` for any finite number.
        exclusive: If `True`, `minimum` itself is not allowed.

    Returns:
        A Python float.

    Raises:
        ValueError: If `value` is not a finite number or is out of range.
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
    """Returns `value` as an int after checking its type and range.

    Args:
        name: Name of the argument, for the message.
        value: Value of the argument; a float is refused even if it is whole.
        minimum: Smallest allowed value.

    Returns:
        A Python int.

    Raises:
        ValueError: If `value` is not an integer or is too small.
    """
    is_integer = isinstance(value, numbers.Integral)
    if not is_integer or isinstance(value, bool) or value < minimum:
        raise ValueError(
            f"`{name}` must be an integer >= {minimum}. "
            f"Received: {name}={value!r}"
        )
    return int(value)


def check_counts(optional=False, **values):
    """Checks for integers of at least 1 (or None, if `optional`)."""
    for name, value in values.items():
        if not (optional and value is None):
            check_integer(name, value, 1)


def check_fraction(**values):
    """Checks for numbers from 0 to 1."""
    for name, value in values.items():
        check_number(name, value, 0.0, 1.0)


def check_paths(**values):
    """Checks for paths, or None."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, str) and value):
            raise ValueError(
                f"`{name}` must be a path or None. Received: {name}={value!r}"
            )


def check_interval(name, value, most=math.inf, zero=False):
    """Checks that a value is (min, max) with 0 < min <= max <= most.

    Args:
        name: Name of the argument, for the message.
        value: Value of the argument.
        most: Largest allowed maximum.
        zero: Whether the minimum may be 0.
    """
    numbers = isinstance(value, tuple | list) and all(
        isinstance(x, int | float) for x in value
    )
    least = 0 if zero else math.ulp(0.0)
    if not (
        numbers and len(value) == 2 and least <= value[0] <= value[1] <= most
    ):
        raise ValueError(
            f"`{name}` must be two numbers, 0 {'<=' if zero else '<'} min <= "
            f"max <= {most}. Received: {name}={value!r}"
        )


def check_bool(**values):
    """Checks for True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(
                f"`{name}` must be True or False. Received: {name}={value!r}"
            )


def check_choice(choices, **values):
    """Checks that values are among `choices`."""
    for name, value in values.items():
        matches = [c for c in choices if c is value or c == value]
        # The types must agree as well, as 1 == True in Python.
        if not any(type(c) is type(value) for c in matches):
            raise ValueError(
                f"`{name}` must be one of {tuple(choices)}. "
                f"Received: {name}={value!r}"
            )


def check_names(**values):
    """Checks for lists of strings without repetition."""
    for name, value in values.items():
        if not (
            isinstance(value, list | tuple)
            and all(isinstance(one, str) for one in value)
            and len(set(value)) == len(value)
        ):
            raise ValueError(
                f"`{name}` must be a list of names without repetition. "
                f"Received: {name}={value!r}"
            )


def check_callable(**values):
    """Checks for functions or None."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise ValueError(
                f"`{name}` must be a function or None. "
                f"Received: {name}={value!r}"
            )


def check_extra(purpose, extra, *modules):
    """Checks that optional packages are installed, without importing them.

    Args:
        purpose: Name of the feature that needs them, for the message.
        extra: Extra of this project that installs them.
        *modules: Names by which they are imported.

    Raises:
        ImportError: If one is missing; gives the command that installs it.
    """
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise ImportError(
            f"{purpose} needs {', '.join(missing)}: "
            f"pip install 'cappa-tf[{extra}]'"
        )


def height_width(name, value):
    """Returns (height, width) from an integer or a pair, all at least 1."""
    sides = tuple(value) if isinstance(value, tuple | list) else (value,) * 2
    if len(sides) != 2:
        raise ValueError(
            f"`{name}` must be an integer or (height, width). "
            f"Received: {name}={value!r}"
        )
    for side in sides:
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise ValueError(
                f"`{name}` must be an integer >= 1 or (height, width). "
                f"Received: {name}={value!r}"
            )
    return sides


def parse_height_width(flag, values):
    """Returns (height, width) from a list flag.

    Args:
        flag: Name of the flag, for the message.
        values: ["224"], ["224", "196"] or None.

    Returns:
        (height, width), or None for None.
    """
    if values is None:
        return None
    numbers = [int(v) for v in values if v.strip().isdigit()]
    if len(numbers) != len(values) or len(numbers) not in (1, 2):
        raise ValueError(
            f"--{flag} must be a number or HEIGHT,WIDTH. "
            f"Received: --{flag}={','.join(values)}"
        )
    return numbers[0], numbers[-1]


def ranges(numbers):
    """Names sorted integers briefly: [3, 4, 5, 9] -> "3-5, 9"."""
    runs = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    named = [f"{a}-{b}" if b > a else f"{a}" for a, b in runs]
    more = f" and {len(named) - 10} more" if len(named) > 10 else ""
    return ", ".join(named[:10]) + more

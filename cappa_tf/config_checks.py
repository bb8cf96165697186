"""Checks of the arguments of a call: their names, and types of values.

Keras classes take `**kwargs`, so a misspelled argument would be noticed late.
The names are therefore collected over all base classes. The type of an argument
is that of its annotation, or without one that of its default.
"""

import collections.abc
import difflib
import inspect
import types
import typing

# A value that is given but not known yet.
UNKNOWN = object()

_NUMBERS = {int: "an integer", float: "a number"}
_PHRASES = {**_NUMBERS, bool: "True or False", str: "a string"}
_SEQUENCES = (tuple, list, collections.abc.Sequence)


def parameters(function_or_class):
    """Arguments that can be given by keyword.

    Args:
        function_or_class: The function or class to be called.

    Returns:
        (parameters, is_open): a dict from name to `inspect.Parameter` with an
        evaluated annotation; and whether any other name is accepted, too (by a
        function with `**kwargs`; for a class with `**kwargs`, the names of its
        bases are known).
    """
    if not inspect.isclass(function_or_class):
        return _keywords(function_or_class)
    found = {}
    for base in inspect.getmro(function_or_class):
        if base is object or "__init__" not in base.__dict__:
            continue
        names, is_open = _keywords(base.__init__)
        found = {**names, **found}
        if base.__init__ is function_or_class.__init__ and not is_open:
            break
    return found, False


def _keywords(function):
    """`parameters` of one function, without looking at base classes."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Some built-ins have none.
        return {}, True
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # An annotation that cannot be evaluated is ignored.
        hints = {}
    named, is_open = {}, False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = True
        elif name != "self" and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            hint = hints.get(name, parameter.empty)
            named[name] = parameter.replace(annotation=hint)
    return named, is_open


def problems(called, function, values, labels, complete):
    """Finds the errors in the arguments of one call.

    Args:
        called: Name of the function or class, for the messages.
        function: The function or class to be called.
        values: Dict of the arguments; `UNKNOWN` fits everything.
        labels: Dict from an argument to the macro that sets it, if any.
        complete: Whether all required arguments must be given.

    Returns:
        A list of messages.
    """
    named, is_open = parameters(function)
    found = []
    for name, value in values.items():
        if name not in named:
            if not is_open:
                found.append(
                    f"{called} has no argument {name}.{guess(name, named)}"
                )
            continue
        phrase = value is not UNKNOWN and expected(named[name], value)
        if phrase:
            via = f" (set by {labels[name]})" if name in labels else ""
            found.append(
                f"{called}.{name}{via} must be {phrase}. Received: {value!r}"
            )
    missing = [
        name
        for name, parameter in named.items()
        if parameter.default is parameter.empty and name not in values
    ]
    if missing and complete:
        found.append(f"{called} needs {', '.join(missing)}; bind it.")
    return found


def guess(name, known):
    """End of a message, " Did you mean X?" or ""."""
    similar = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {similar[0]}?" if similar else ""


def expected(parameter, value):
    """Describes what an argument accepts if `value` is of another type.

    Args:
        parameter: `inspect.Parameter` with an evaluated annotation.
        value: The literal value of the argument.

    Returns:
        A phrase such as "an integer", or None if `value` may be valid.
    """
    hint, default = parameter.annotation, parameter.default
    if hint is not parameter.empty:
        if value is default or fits(value, hint):
            return None
        return _PHRASES.get(hint) or inspect.formatannotation(hint)
    if default is parameter.empty or default is None or value is None:
        return None
    # A number may be replaced by a pair of numbers (image_size=224).
    if type(default) in _NUMBERS and not isinstance(value, (tuple, list)):
        hint, phrase = type(default), _NUMBERS[type(default)]
    elif isinstance(default, bool):
        hint, phrase = bool, "True or False"
    elif isinstance(default, str):
        hint, phrase = str, "a string"
    else:
        return None
    return None if fits(value, hint) else phrase


def fits(value, hint):
    """Returns whether a literal has a type; unknown types always fit."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in (typing.Any, inspect.Parameter.empty):
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in inner)
    if origin is typing.Literal:
        return any(value == x and type(value) is type(x) for x in inner)
    if hint in _SEQUENCES or origin in _SEQUENCES:
        kinds = {inner[0]} if inner else set()
        return isinstance(value, (tuple, list)) and all(
            fits(item, kind) for item in value for kind in kinds
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, bytes, dict):
        return isinstance(value, hint)
    return not isinstance(value, (bool, int, float, str))

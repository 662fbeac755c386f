"""Names and values that a person gave: looked up, checked, and what to say of those that do not fit."""

import difflib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest of the `known` names as a question, or all of them as a list."""
    known = sorted(known)
    closest = difflib.get_close_matches(name, known, n=1)
    if closest:
        return f"did you mean {closest[0]!r}?"
    return f"choose from {', '.join(known)}." if known else "there are none."


def import_target(what: str, target: str) -> Any:
    """The object of a dotted name, which is a `what`; raises ValueError if it cannot be imported."""
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the {what} {target!r} cannot be imported: {error}.") from error


def check_options(where: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError, with the closest match, if an option of `where` is not among the `known` ones."""
    for name in options:
        if name not in known:
            raise ValueError(f"{where} has no option {name!r}: {did_you_mean(str(name), known)}")


def check_arguments(
    where: str, options: Mapping[str, Any], target: Callable[..., Any], given: Sequence[str] = ()
) -> None:
    """Raise ValueError for an option of `where` that `target` does not take, or whose value its annotation excludes.

    Of the annotations those of numbers and of truth values are looked at. The arguments `given` by the caller are no
    options.
    """
    parameters = inspect.signature(target).parameters
    check_options(where, options, [name for name in parameters if name not in given])
    for name, value in options.items():
        annotation = parameters[name].annotation
        kinds = {*(get_args(annotation) or [annotation])} - {type(None)}
        for wanted, what in (({int, float}, "a number"), ({bool}, "true or false")):
            if kinds <= wanted and not isinstance(value, (*wanted, type(None))):
                raise ValueError(f"{where}: {name} must be {what} and is {value!r}.")

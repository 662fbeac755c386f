"""Names and values that a person gave: looked up, checked, and what to say of those that do not fit."""

import difflib
import pkgutil
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest of the `known` names as a question, or all of them as a list."""
    known = sorted(known)
    closest = difflib.get_close_matches(name, known, n=1)
    if closest:
        return f"did you mean {closest[0]!r}?"
    return f"choose from {', '.join(known)}." if known else "there are none."


def shown(value: Any) -> str:
    """A value as a sentence shows it: in one line, and no more than its beginning if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def import_target(what: str, target: str) -> Any:
    """The object of a dotted name, which is a `what`; raises ValueError if it cannot be imported."""
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"the {what} {target!r} cannot be imported: {error}.") from error


def check_options(where: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError, with the closest match, if an option of `where` is not among the `known` ones."""
    for name in options:
        if name not in known:
            raise ValueError(f"{where} has no option {name!r}: {did_you_mean(str(name), known)}")

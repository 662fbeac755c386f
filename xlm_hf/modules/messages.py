"""Words for a person who mistyped a name."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest of the `known` names as a question, or all of them as a list."""
    known = sorted(known)
    closest = difflib.get_close_matches(name, known, n=1)
    if closest:
        return f"did you mean {closest[0]!r}?"
    return f"choose from {', '.join(known)}." if known else "there are none."


def check_options(where: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ValueError, with the closest match, if an option of `where` is not among the `known` ones."""
    for name in options:
        if name not in known:
            raise ValueError(f"{where} has no option {name!r}: {did_you_mean(str(name), known)}")

"""Options that are checked by their annotations and their ranges."""

import math
from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a name",
    list[int]: "a list of integers",
    dict: "a dictionary",
    NoneType: "None",
}


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value is of one of `_KINDS`; the numbers of NumPy count as numbers, truth values do not."""
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind == list[int]:
        return isinstance(value, (Sequence, Set)) and all(_is_of_kind(entry, int) for entry in value)
    return isinstance(value, Mapping if kind is dict else kind)


class CheckedOptions:
    """Checks on the values of options, each of which raises ValueError naming the option, its value and its range."""

    @classmethod
    def _annotations(cls) -> dict[str, Any]:
        """Name and annotation of each option, those of base classes first."""
        bases = [base for base in reversed(cls.__mro__) if issubclass(base, CheckedOptions)]
        found = {name: kind for base in bases for name, kind in base.__annotations__.items()}
        return {name: kind for name, kind in found.items() if name[0] != "_" and get_origin(kind) is not ClassVar}

    def _check_kinds(self, owner: "type[CheckedOptions]") -> None:
        """Check the options of `owner` whose annotations are made of `_KINDS`."""
        for name, annotation in owner._annotations().items():
            value, default = getattr(self, name), getattr(owner, name)
            kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
            if value is None and default is None:
                continue
            if set(kinds) <= set(_KINDS) and not any(_is_of_kind(value, kind) for kind in kinds):
                raise ValueError(f"{name} must be {' or '.join(_KINDS[kind] for kind in kinds)} and is {value!r}.")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be greater than 0 and is {value}.")

    def _check_probability(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1] and is {value}.")

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)} and is {getattr(self, name)!r}.")

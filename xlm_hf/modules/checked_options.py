"""One check of options by their annotations: of what kind a value is, whether it is finite, and in which range.

An option is annotated by what it may be, a number also by its range:

    num_steps: PositiveInt | None = None
    eta: Annotated[float, Interval("(0, 1]")] = 0.02
    order: Literal["random", "confidence"] = "random"

A class derives from `CheckedOptions`; a function, such as an `__init__`, is decorated with `checked`.
"""

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from .messages import check_options, shown

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Interval:
    """The range of a number, in the notation of mathematics: "[0, 1)" holds 0 and not 1."""

    text: str

    def __contains__(self, number: Any) -> bool:
        low, high = map(float, self.text[1:-1].split(","))
        return (low < number < high) or (number == low and self.text[0] == "[") or (number == high and "]" in self.text)

    def __str__(self) -> str:
        low, high = self.text[1:-1].split(", ")
        if high == "inf":
            return f"{'at least' if self.text[0] == '[' else 'greater than'} {low}"
        return f"in {self.text}"


PositiveInt = Annotated[int, Interval("[1, inf)")]
Count = Annotated[int, Interval("[0, inf)")]
Positive = Annotated[float, Interval("(0, inf)")]
NotNegative = Annotated[float, Interval("[0, inf)")]
# A share of something, all of it included, and one that leaves something.
Share = Annotated[float, Interval("(0, 1]")]
PartialShare = Annotated[float, Interval("[0, 1)")]

_WORDS: dict[Any, str] = {
    **{bool: "true or false", int: "an integer", float: "a finite number", str: "a string", NoneType: "None"},
    **{dict: "a dictionary", Mapping: "a dictionary"},
}


def _is_number(value: Any, kind: Any) -> bool:
    # The numbers of NumPy count as numbers, truth values do not.
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says; what the annotation says in other ways is not looked at."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_of_kind(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return any(_is_of_kind(value, one) for one in args)
    if origin is Literal:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in args)
    if kind in (int, float):
        return _is_number(value, Integral if kind is int else Real)
    kind = origin or (NoneType if kind is None else kind)
    if kind in (list, tuple, Sequence):
        if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
            return False
        fits = kind is not tuple or args[-1:] == (Ellipsis,) or len(value) == len(args)
        return fits and (not args or all(_is_of_kind(entry, args[0]) for entry in value))
    return kind not in _WORDS or isinstance(value, Mapping if kind is dict else kind)


def _ranges(value: Any, kind: Any) -> list[Interval]:
    """The ranges of which a value must be in one; none if any will do."""
    if get_origin(kind) is Annotated:
        return [one for one in get_args(kind)[1:] if isinstance(one, Interval)] if value is not None else []
    found = [_ranges(value, one) for one in get_args(kind) if _is_of_kind(value, one)]
    return [] if [] in found else [one for ranges in found for one in ranges]


def _described(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _described(args[0])
    if origin in (typing.Union, types.UnionType):
        # A choice that may be left open is described by its names.
        return " or ".join(dict.fromkeys(map(_described, args)))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (list, tuple, Sequence) and args:
        words = _described(args[0]).removeprefix("an ").removeprefix("a ")
        number = f"{len(args)} " if origin is tuple and Ellipsis not in args else ""
        return f"a list of {number}{words}s"
    return _WORDS.get(origin or kind, f"a {getattr(kind, '__name__', kind)}")


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError, which says what it must be, if the value of an option is not what its annotation says."""
    if not _is_of_kind(value, kind):
        raise ValueError(f"{name} must be {_described(kind)} and is {shown(value)}.")
    ranges = _ranges(value, kind)
    numbers = value if isinstance(value, Collection) else [value]
    if ranges and not any(all(number in one for number in numbers) for one in ranges):
        raise ValueError(f"{name} must be {' or '.join(map(str, ranges))} and is {shown(value)}.")


def check_arguments(
    where: str, options: Mapping[str, Any], target: Callable[..., Any], given: Sequence[str] = ()
) -> None:
    """Raise ValueError for an option of `where` that `target` does not take or lacks, or whose value does not fit.

    The arguments `given` by the caller are no options.
    """
    parameters = {n: p for n, p in inspect.signature(target).parameters.items() if n not in given}
    variable = {n for n, p in parameters.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    check_options(where, options, options if variable else parameters)
    for name, parameter in parameters.items():
        if name in options:
            check_value(f"{where}: {name}", options[name], parameter.annotation)
        elif parameter.default is parameter.empty and name not in variable:
            raise ValueError(f"{where} needs a value for {name!r}: set it.")


def checked(function: _Function) -> _Function:
    """Let a function check its arguments by their annotations; ValueError names the argument, its value and range."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            check_value(name, value, signature.parameters[name].annotation)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def annotations_of(cls: type) -> dict[str, Any]:
    """Name and annotation of each option of a class, those of base classes first."""
    bases = [base for base in reversed(cls.__mro__) if issubclass(base, CheckedOptions)]
    found = {name: kind for base in bases for name, kind in inspect.get_annotations(base).items()}
    return {name: kind for name, kind in found.items() if name[0] != "_" and get_origin(kind) is not ClassVar}


class CheckedOptions:
    """Options that are annotated class attributes, each of them an attribute of the object too."""

    def check(self, **values: Any) -> None:
        """Check values of options, by default all of the object's; ValueError names the option, value and range."""
        for name, kind in annotations_of(type(self)).items():
            if name in values or not values:
                check_value(name, values[name] if values else getattr(self, name), kind)

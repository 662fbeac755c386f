"""The tensors of a forward pass, checked before it begins by what the names of its arguments say of them."""

import functools
import inspect
from typing import Any, get_args

import torch

from .devices import is_synchronous
from .messages import shown

# By the last word of a name, or its first.
_TYPES = {**dict.fromkeys(("ids", "labels", "index", "slots"), ("int64", "int32")), "is": ("bool",)}


@functools.cache
def _arguments(function: Any) -> dict[str, bool]:
    """The arguments of a method by name, and whether they are tensors."""
    parameters = [*inspect.signature(function).parameters.values()][1:]
    return {one.name: get_args(one.annotation) == (torch.Tensor, type(None)) for one in parameters}


def check_inputs(config: Any, args: Any, kwargs: dict[str, Any], forward: Any, backbone_forward: Any) -> None:
    """Check the tensors that `forward` takes, and those that it hands on to `backbone_forward`.

    `..._ids` and labels hold an integer for each token, `is_...` a truth value, `..._index` flat indices of tokens,
    `..._slots` numbers of those. Others have entries for each row or token, or vectors, as wide as a `..._size` of the
    configuration says. Ranges are looked at where the host has the entries at once.

    Raises:
        ValueError: for an argument of another kind, shape or range, which it names.
    """
    named = {**dict(zip(_arguments(forward), args, strict=False)), **kwargs}
    given = {name: x for name, x in named.items() if x is not None}
    inputs = {n: x for n, x in given.items() if _arguments(forward).get(n) or _arguments(backbone_forward).get(n)}
    for name, x in inputs.items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a tensor and is {shown(x)}.")
    first = "input_ids" if "input_ids" in inputs else "inputs_embeds"
    tokens = inputs.get(first, torch.empty(0))
    if tokens.ndim < 2 or not tokens.numel():
        raise ValueError(f"{first} must hold rows of tokens, at least one, and has the shape {tuple(tokens.shape)}.")
    B, L = tokens.shape[:2]
    K = L + getattr(given.get("cache", given.get("past_key_values")), "get_seq_length", int)()
    positions = config.max_position_embeddings if config.learned_positions else torch.inf
    ends = {"input_ids": config.vocab_size, "labels": config.vocab_size, "position_ids": positions, "index": B * L}
    widths = {(), *((size,) for name, size in vars(config).items() if name.endswith("_size"))}
    for name, x in inputs.items():
        kind, dtype = name.split("_")[-1], str(x.dtype).removeprefix("torch.")
        if dtype not in (types := _TYPES.get("is" if name.startswith("is_") else kind, (dtype,))):
            raise ValueError(f"{name} must be {' or '.join(types)} and is {dtype}: convert it.")
        shape = tuple(x.shape[:2])
        shapes: set[tuple[int, ...]] = {(B, L), (1, L), (B, K)}
        if kind not in ("ids", "labels", "mask"):
            # Of what an index names there is any number.
            is_named = kind in ("index", "slots") or f"{name.removesuffix('s')}_index" in inputs
            shapes |= {shape} if is_named and x.ndim == 1 else {(B,), (1,)}
        if (kind != "mask" or x.ndim != 4) and (shape not in shapes or tuple(x.shape[2:]) not in widths):
            raise ValueError(f"{name} must fit {B} rows of {L} tokens and has the shape {tuple(x.shape)}.")
        entries, end = x[x != -100] if kind == "labels" else x, ends.get(name, ends.get(kind))
        if end is not None and entries.numel() and is_synchronous(x.device):
            low, high = (number.item() for number in entries.aminmax())
            if low < 0 or high >= end:
                raise ValueError(f"{name} must be in [0, {end}) and holds {low if low < 0 else high}.")
    _check_rows(inputs.get("attention_mask", torch.ones(1, K)), torch.inf if "position_ids" in inputs else positions)


def _check_rows(mask: torch.Tensor, positions: float) -> None:
    """Raise ValueError for a row with more tokens than there are learnt positions."""
    if mask.shape[-1] > positions and is_synchronous(mask.device) and mask.bool().sum(dim=-1).max() > positions:
        raise ValueError(f"A row has more tokens than the {positions} learnt positions of the model: shorten it.")

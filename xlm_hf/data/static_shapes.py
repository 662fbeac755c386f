"""Training batches of one shape, for graphs that are compiled, or captured on the device, once."""

from collections.abc import Callable
from typing import Any

import torch

from xlm_hf.objectives.collators import AXES, Entry


def collate_without_full_mask(collator: Callable, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of `collator`, without its `attention_mask` if that is all ones: models take none for the same.

    The host knows it at once here, and later only by waiting for the device; without a mask, attention may use kernels
    that take none.
    """
    return {name: x for name, x in collator(examples).items() if name != "attention_mask" or not x.all()}


class StaticShapes:
    """Pads the batches of a collator, so that batches of as many examples have the same shapes.

    The collator declares what each entry of a batch is about (`Collator.entries`). Rows get padding up to `length`
    tokens. Lists, such as targets, are filled up to B x `length` values for B rows. The losses leave these targets out
    of their sums and counts. The price is the vocabulary head at every position. With packing, and if an example is
    several documents, the numbers of rows and of documents still vary. With packing the lists are filled up to a
    multiple of B x `length`: the documents of a row may have lost more tokens than a row holds.

    Args:
        collator: makes training batches, and says in `entries` what is in them.
        length: tokens of every row.

    Raises:
        ValueError: if packing may fill a row with more tokens.
    """

    def __init__(self, collator: Any, length: int):
        if collator.row_capacity and length < collator.row_capacity:
            filled = f"packing fills rows up to {collator.row_capacity} tokens, the positions of the model"
            remedy = "give both the same number, `model.max_position_embeddings=N trainer.static_length=N`"
            raise ValueError(f"trainer.static_length is {length}, but {filled}: {remedy}.")
        self.collator, self.length = collator, length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError if `length` is too small for it."""
        batch, entries = self.collator(examples), self.collator.entries
        (B, L), length = batch["input_ids"].shape, self.length
        # Of what was taken out of a row, a batch may hold more than of what is left in it.
        lists = [] if self.collator.row_capacity else [x for name, x in batch.items() if entries[name].of not in AXES]
        longest = max([L, *(-(-len(x) // B) for x in lists)])
        if longest > length:
            raise ValueError(f"trainer.static_length is {length} and a row needs {longest}: raise it to the longest.")
        return {name: self._padded(x, entries[name], B, L, "segment_ids" in batch) for name, x in batch.items()}

    def _padded(self, x: torch.Tensor, entry: Entry, B: int, L: int, several: bool) -> torch.Tensor:
        if entry.index_of == "position":
            x = x // L * self.length + x % L
        if entry.of == "position" or (entry.of == "row" and several):
            return _extended(x, 1, self.length, entry.padding)
        size = B * self.length
        return x if entry.of in AXES else _extended(x, 0, max(1, -(-len(x) // size)) * size, entry.padding)


def _extended(x: torch.Tensor, dim: int, length: int, padding: int | str) -> torch.Tensor:
    """`x` with its dimension `dim` filled up to `length`, as `Entry.padding` says."""
    missing = list(x.shape)
    missing[dim] = length - x.shape[dim]
    if isinstance(padding, int):
        return torch.cat((x, x.new_full(missing, padding)), dim)
    if x.shape[dim] == 0:
        return x.new_zeros(missing)
    last = x.narrow(dim, -1, 1) + (padding == "next")
    return torch.cat((x, last.expand(missing)), dim)

"""Training batches of one shape, for graphs that are compiled, or captured on the device, once."""

from collections.abc import Callable
from typing import Any

import torch

from xlm_hf.objectives.head_operator import IGNORED_ID

# What batches hold for each position with a loss or each slot, of which there are at most as many as tokens.
_OF_POSITIONS = {"logits_index", "target_ids", "target_documents", "target_slots"}
_OF_POSITIONS |= {"slot_index", "slot_documents"}


def collate_without_full_mask(collator: Callable, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of `collator`, without its `attention_mask` if that is all ones: models take none for the same.

    The host knows it at once here, and later only by waiting for the device; without a mask, attention may use kernels
    that take none.
    """
    return {name: x for name, x in collator(examples).items() if name != "attention_mask" or not x.all()}


class StaticShapes:
    """A collator whose batches of as many examples all have the same shapes: those of another one, padded.

    Rows get padding up to `length` tokens. What a batch holds for each position with a loss (in B rows of `length`
    tokens there are at most B x length of them) is filled up by targets `IGNORED_ID`, which the losses leave out of
    their sums and counts. So the vocabulary head is computed for every position, which is the price. With packing, and
    where an example is several documents, the numbers of rows and of documents still vary.

    Args:
        collator: makes training batches; names ending in `_index` are indices into the flattened (B x L) tokens.
        length: tokens of every row.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]], length: int):
        self.collator, self.length = collator, length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError if `length` is too small for it."""
        batch = self.collator(examples)
        (B, L), length = batch["input_ids"].shape, self.length
        # Of what was taken out of a row, a batch may hold more than of what is left in it.
        longest = max(L, *(-(-len(x) // B) for name, x in batch.items() if name in _OF_POSITIONS))
        if longest > length:
            raise ValueError(f"trainer.static_length is {length} and a row needs {longest}: raise it to the longest.")
        return {name: self._padded(name, x, B, L) for name, x in batch.items()}

    def _padded(self, name: str, x: torch.Tensor, B: int, L: int) -> torch.Tensor:
        if x.shape == (B, L):
            # What stands in padding does not matter, as long as it is of a document that its neighbours are of.
            padding = x[:, -1:] if name != "attention_mask" else torch.zeros_like(x[:, -1:])
            return torch.cat((x, padding.expand(B, self.length - L)), dim=1)
        if name.endswith("_index"):
            x = x // L * self.length + x % L
        if name not in _OF_POSITIONS:
            return x
        # Slots without a target are a group of their own, behind the others; all else stays in ascending order.
        last = int(x[-1]) + (name == "slot_documents") if len(x) else 0
        fill = IGNORED_ID if name == "target_ids" else last
        return torch.nn.functional.pad(x, (0, B * self.length - len(x)), value=fill)

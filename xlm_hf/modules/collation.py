"""What the collators of all families share: reading documents, placing them in rows, and the checks on both.

An example holds one document or, with a column `segment_ids`, several. A collator corrupts each document by itself and
then places what is left of them in rows: an example to a row, or with packing as many as fit. Everything is computed on
flat tensors, the tokens of all documents one after the other, so nothing depends on how a batch is padded.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .counter_random import low_discrepancy, random_bits

Examples = list[dict[str, Any]]
Ids = Sequence[Sequence[int]]


def ragged(rows: Ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate lists of ids: the values (sum of lengths,) and the lengths (B,), both int64."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    return torch.from_numpy(values), torch.from_numpy(lengths)


def column(examples: Examples, name: str) -> torch.Tensor:
    """The integers `name` of all examples, (B,) int64."""
    return torch.from_numpy(np.fromiter((example[name] for example in examples), dtype=np.int64, count=len(examples)))


def starts_of(lengths: torch.Tensor) -> torch.Tensor:
    """Where each part begins in the concatenation of parts of `lengths`."""
    return lengths.cumsum(0) - lengths


def counted(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For every element of the concatenation of parts of `lengths`: the number of its part, and its place in it."""
    part = torch.repeat_interleave(lengths)
    return part, torch.arange(len(part)) - starts_of(lengths)[part]


class Documents:
    """The documents of a batch of examples.

    Attributes:
        prompt_ids, prompt_lengths: the prompts one after the other, and the length of each (D,).
        target_ids, target_lengths: likewise what is modelled.
        example: (D,) place of each document's example in the batch.
        number: (D,) number of each document within its example.
    """

    def __init__(self, examples: Examples, prompts: Ids, targets: Ids):
        self.examples = examples
        self.prompt_ids, self.prompt_lengths = ragged(prompts)
        self.target_ids, self.target_lengths = ragged(targets)
        self.example = torch.arange(len(examples))
        self.number = torch.zeros_like(self.example)
        if any(example.get("segment_ids") is not None for example in examples):
            self._split(targets)

    def _split(self, targets: Ids) -> None:
        """Cut the targets where their `segment_ids` change; a further document has no prompt."""
        given = zip(self.examples, targets, strict=True)
        segments, _ = ragged([e.get("segment_ids") or [0] * len(target) for e, target in given])
        example, place = counted(self.target_lengths)
        starts = ((place == 0) | (segments != segments.roll(1))).nonzero().squeeze(-1)
        self.target_lengths = torch.diff(starts, append=torch.tensor([len(segments)]))
        self.example, self.number = example[starts], segments[starts]
        self.prompt_lengths = torch.where(self.number == 0, self.prompt_lengths[self.example], 0)

    @property
    def key(self) -> torch.Tensor:
        """(D,) int64, a function of (example_id, number of the document): what a corruption is drawn by."""
        example_id = column(self.examples, "example_id")[self.example]
        return torch.where(self.number == 0, example_id, random_bits(example_id, self.number))

    @property
    def epoch(self) -> torch.Tensor:
        """(D,) epoch of each document."""
        return column(self.examples, "epoch")[self.example]

    def even_draws(self, seed: int) -> torch.Tensor:
        """Draws in [0, 1), float64 (D,), spread evenly over the documents of an epoch.

        `low_discrepancy` for the first document of an example, shifted by sqrt(2) for each further one: both steps and
        1 are linearly independent over the rationals, so the draws are evenly spread over both counts (Weyl, 1916).
        """
        first = low_discrepancy(seed, self.epoch, column(self.examples, "position")[self.example])
        return (first + self.number * math.sqrt(2)) % 1.0


def ranks(keys: torch.Tensor, part: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank of every key within its part (0 for the smallest), and the keys sorted within each part; all (N,).

    `part` and `place` are those of `counted`.
    """
    order = keys.argsort()
    order = order[part[order].argsort(stable=True)]
    return torch.empty_like(place).scatter_(0, order, place), keys[order]


class Rows:
    """Where documents stand in the rows of a batch.

    Each example has a row to itself, padded on the right; with `packing`, it goes into the first row in which it still
    fits, in the order of the batch ("first fit").

    Args:
        lengths: (D,) tokens of each document as it is placed.
        documents: to which they belong.
        packing: most tokens of a row that holds several examples; None gives each its own.
    """

    def __init__(self, lengths: torch.Tensor, documents: Documents, packing: int | None = None):
        self.lengths = lengths
        sizes = torch.zeros(len(documents.examples), dtype=torch.int64).index_add_(0, documents.example, lengths)
        # Without packing no two examples fit into one row; an empty one has a row all the same.
        row, start = _first_fit(sizes.clamp(min=1), packing or 0)
        self.shape = (int(row.max()) + 1, int((start + sizes).max()))
        first = row * self.shape[1] + start - starts_of(sizes)
        self.first = first[documents.example] + starts_of(lengths)

    def index(self, start: torch.Tensor | int, lengths: torch.Tensor) -> torch.Tensor:
        """Places in the flattened (rows x L) batch of `lengths` (D,) tokens of each document, from its `start`-th."""
        part, place = counted(lengths)
        return (self.first + start)[part] + place

    def batch(self, documents: Documents, pad_token_id: int) -> dict[str, torch.Tensor]:
        """The tensors of every batch, `input_ids` still all padding.

        Returns:
            `input_ids` and `attention_mask` (rows, L), `example_id` (examples,) and, where a row holds several
            documents, `segment_ids`, the number of each token's document in its row, and `position_ids`, which begin
            anew with each. Padding has the number of the document before it, so that no token sees nothing at all.
        """
        input_ids, attention_mask = torch.full(self.shape, pad_token_id), torch.zeros(self.shape, dtype=torch.bool)
        index = self.index(0, self.lengths)
        attention_mask.view(-1)[index] = True
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "example_id": column(documents.examples, "example_id"),
        }
        if len(self.lengths) > self.shape[0]:
            begins, position_ids = torch.zeros(self.shape, dtype=torch.int64), torch.zeros_like(input_ids)
            begins.view(-1)[self.first[self.lengths > 0]] = 1
            position_ids.view(-1)[index] = counted(self.lengths)[1]
            batch.update(segment_ids=begins.cumsum(dim=-1) - 1, position_ids=position_ids)
        return batch


def _first_fit(sizes: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and start of each part of `sizes`, by first fit; one that is larger than `capacity` has a row to itself."""
    row, start, used = np.zeros((3, len(sizes)), dtype=np.int64)
    for number, size in enumerate(sizes.tolist()):
        row[number] = np.argmax((used + size <= capacity) | (used == 0))
        start[number] = used[row[number]]
        used[row[number]] += size
    return torch.from_numpy(row), torch.from_numpy(start)


class Collator:
    """What all collators share: the tokenizer's padding, the model's length, and the checks on what comes in.

    Args:
        tokenizer: names the special tokens.
        max_length: positions of the model; a longer document is refused.
        seed: of the corruption.
        packing: whether a row may hold several examples, up to `max_length` tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int = 0, packing: bool = False):
        self.pad_token_id = tokenizer.pad_token_id
        self.vocab_size = len(tokenizer)
        self.max_length = max_length
        self.seed = seed
        self.packing = max_length if packing else None

    def check_ids(self, *ids: torch.Tensor) -> None:
        """Raise ValueError if an id is outside the vocabulary."""
        every = torch.cat(ids)
        outside = every[(every < 0) | (every >= self.vocab_size)]
        if len(outside):
            raise ValueError(
                f"Token id {int(outside[0])} is outside the vocabulary of {self.vocab_size}: tokenize the data with "
                "the tokenizer of this run."
            )

    def check_lengths(self, lengths: torch.Tensor, what: str, extras: str) -> None:
        """Raise ValueError if a `what` has more tokens than the model has positions, `extras` included."""
        if int(lengths.max()) > self.max_length:
            raise ValueError(
                f"A {what} has {int(lengths.max())} tokens with {extras}, and the model has {self.max_length} "
                "positions: shorten it or raise max_position_embeddings."
            )

    def left_padded(self, examples: Examples, rows: Ids, extras: str) -> dict[str, torch.Tensor]:
        """Checked prompts for `generate`, padded on the left: `input_ids`, `attention_mask`, `example_id`."""
        ids, lengths = ragged(rows)
        self.check_ids(ids)
        self.check_lengths(lengths, "prompt", extras)
        width = int(lengths.max())
        attention_mask = torch.arange(width) >= width - lengths[:, None]
        return {
            "input_ids": torch.full(attention_mask.shape, self.pad_token_id).masked_scatter_(attention_mask, ids),
            "attention_mask": attention_mask,
            "example_id": column(examples, "example_id"),
        }

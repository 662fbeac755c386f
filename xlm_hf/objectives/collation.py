"""Documents of a batch of examples, their random draws, and the rows that hold them.

An example holds one document or, with a column `segment_ids`, several. A collator corrupts each document by itself. It
then puts the remaining tokens into rows: one example per row, or with packing as many as fit. Everything is computed on
flat arrays, the tokens of all documents one after the other. So nothing depends on how a batch is padded. The arrays
are NumPy's, whose small operations take a fraction of torch's time. They become tensors at the end.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from xlm_hf.modules.counter_random import low_discrepancy, random_bits, stream_seed, unit_interval

Examples = list[dict[str, Any]]
Ids = Sequence[Sequence[int]]


def ragged(rows: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate lists of ids: the values (sum of lengths,) and the lengths (B,), both int64."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum())), lengths


def column(examples: Examples, name: str) -> np.ndarray:
    """The integers `name` of all examples, (B,) int64."""
    return np.fromiter((example[name] for example in examples), dtype=np.int64, count=len(examples))


def segment_starts(lengths: np.ndarray) -> np.ndarray:
    """Where each part begins in the concatenation of parts of `lengths`."""
    return lengths.cumsum() - lengths


def segment_numbers(lengths: np.ndarray) -> np.ndarray:
    """The number of its part, for every element of the concatenation of parts of `lengths`."""
    return np.repeat(np.arange(len(lengths)), lengths)


def segment_ranges(first: np.ndarray | int, lengths: np.ndarray) -> np.ndarray:
    """Runs of consecutive integers, one after the other: `lengths` (D,) of them from `first` (D,) on."""
    return np.repeat(first - segment_starts(lengths), lengths) + np.arange(lengths.sum())


def random_subset(bits: np.ndarray, lengths: np.ndarray, num: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the `num` smallest of the random `bits` of each part: uniformly random subsets of these sizes.

    Each part is a row of its own, filled up with the greatest key: rows sort many times faster than one long array.

    Args:
        bits: (N,) uint64, of all parts one after the other.
        lengths: (D,) of the parts.
        num: (D,), at most `lengths`; or (K, D), of K subsets, of which a larger one holds a smaller.

    Returns:
        (N,) bool, which are chosen, or (K, N); and (D,) uint64, the greatest chosen key of each part, meaningless if
        there is none, or (K, D).
    """
    exists = np.arange(lengths.max(initial=0) + 1) < lengths[:, None]
    ordered, part = np.full(exists.shape, np.uint64(2**64 - 1)), np.arange(len(lengths))
    ordered[exists] = bits
    ordered.sort(axis=1)
    return bits < np.repeat(ordered[part, num], lengths, axis=-1), ordered[part, num - 1]


def tensors(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
    """The arrays as tensors, which share their memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Documents:
    """The documents of a batch of examples.

    Attributes:
        prompt_ids: the prompts one after the other.
        prompt_lengths: (D,) the length of each.
        target_ids: likewise what is modelled.
        target_lengths: (D,) the length of each.
        example: (D,) index of each document's example in the batch.
        number: (D,) number of each document within its example.
        example_id: (examples,) as given.
        ends: (D,) 1 for a document with an end; 0 for one that goes on in another example, as the column `continues`
            says of the last one of an example.
        key: (D,) uint64, a function of (example_id, number of the document): what a corruption is drawn by.
        blank: (sum of target_lengths,) bool, in infilling which tokens of the targets are to be found; None otherwise.
    """

    blank: np.ndarray | None = None

    def __init__(self, examples: Examples, prompts: Ids, targets: Ids):
        self.examples = examples
        self.prompt_ids, self.prompt_lengths = ragged(prompts)
        self.target_ids, self.target_lengths = ragged(targets)
        self.example = np.arange(len(examples))
        self.number = np.zeros_like(self.example)
        self.example_id = column(examples, "example_id")
        self.ends = 1 - np.fromiter((e.get("continues", False) for e in examples), dtype=np.int64, count=len(examples))
        self.key = self.example_id.view(np.uint64)
        if any(example.get("segment_ids") is not None for example in examples):
            self._split(targets)

    def _split(self, targets: Ids) -> None:
        """Cut the targets where their `segment_ids` change; a further document has no prompt."""
        given = zip(self.examples, targets, strict=True)
        segments, _ = ragged([e.get("segment_ids") or [0] * len(target) for e, target in given])
        example = segment_numbers(self.target_lengths)
        inside = np.flatnonzero((segments[1:] != segments[:-1]) & (example[1:] == example[:-1])) + 1
        starts = np.sort(np.append(segment_starts(self.target_lengths), inside))
        self.target_lengths = np.diff(starts, append=len(segments))
        self.example, self.number = np.sort(np.append(self.example, example[inside])), np.append(segments, 0)[starts]
        self.prompt_lengths = np.where(self.number == 0, self.prompt_lengths[self.example], 0)
        is_last = np.append(self.example[1:] != self.example[:-1], True)
        self.ends = np.where(is_last, self.ends[self.example], 1)
        self.key = self.key[self.example]
        self.key = np.where(self.number == 0, self.key, random_bits(self.key, self.number.view(np.uint64)))

    def drop_prompts(self, dropped: np.ndarray) -> None:
        """Leave the prompts of some documents out: `dropped` (D,) bool."""
        self.prompt_ids = self.prompt_ids[~np.repeat(dropped, self.prompt_lengths)]
        self.prompt_lengths = np.where(dropped, 0, self.prompt_lengths)

    def column(self, name: str) -> np.ndarray:
        """The integers `name` of each document's example, (D,) int64."""
        return column(self.examples, name)[self.example]

    def low_discrepancy_draws(self, seed: int) -> np.ndarray:
        """Draws in [0, 1), float64 (D,), spread evenly over the documents of an epoch.

        The first document of an example has `low_discrepancy`, each further one sqrt(2) more. Both steps and 1 are
        linearly independent over the rationals. So the draws are evenly spread over both counts (Weyl, 1916).
        """
        first = low_discrepancy(seed, self.column("epoch").view(np.uint64), self.column("position"))
        return (first + self.number * math.sqrt(2)) % 1.0

    def random_bits(
        self,
        seed: int,
        lengths: np.ndarray | None = None,
        start: np.ndarray | int = 0,
        stream: str | None = None,
        num: int | None = None,
    ) -> np.ndarray:
        """Random bits, uint64: functions of (seed, stream, epoch, key of the document, position in it) alone.

        Args:
            seed: of the corruption.
            lengths: (D,) of how many tokens of each document; None is one draw of each document.
            start: of which token on.
            stream: a name; draws of two streams are independent of each other. Without one they are those that masks
                and drops are made of.
            num: how many draws of each token or document.

        Returns:
            (sum of lengths,) or (D,), and with `num` as many columns.
        """
        epoch = self.column("epoch").view(np.uint64)
        bits = random_bits(stream_seed(seed, stream), epoch, self.key)
        if lengths is not None:
            bits = random_bits(segment_ranges(start, lengths).view(np.uint64), state=np.repeat(bits, lengths))
        return bits if num is None else random_bits(np.arange(num, dtype=np.uint64), state=bits[:, None])

    def uniforms(self, seed: int, stream: str, lengths: Any = None, start: Any = 0, num: Any = None) -> np.ndarray:
        """Uniform draws in [0, 1), float64, from the bits of `random_bits`, whose arguments these are."""
        return unit_interval(self.random_bits(seed, lengths, start, stream, num))


class Rows:
    """The positions of documents in the rows of a batch.

    Each example has a row of its own, padded on the right. With `packing`, it goes into the first row with enough
    capacity, in the order of the batch ("first fit").

    Args:
        lengths: (D,) tokens of each document in its row.
        documents: to which they belong.
        pad_token_id: fills the positions where nothing else is written.
        packing: most tokens of a row that holds several examples; None gives each its own.

    Attributes:
        filled: tokens of each row.
        shape: rows, and tokens of the longest of them.
        several: whether a row holds several documents.
        first: (D,) where each document begins in the flattened batch.
        input_ids: the flattened batch, all padding at first.
    """

    def __init__(self, lengths: np.ndarray, documents: Documents, pad_token_id: int, packing: int | None = None):
        self.lengths, self.documents = lengths, documents
        sizes = np.bincount(documents.example, lengths, len(documents.examples)).astype(np.int64)
        row, start = _first_fit(sizes, packing) if packing else (np.arange(len(sizes)), np.zeros_like(sizes))
        self.filled = np.bincount(row, sizes)
        self.shape = (len(self.filled), int(self.filled.max()))
        self.several = len(lengths) > self.shape[0]
        self.first = (row * self.shape[1] + start - segment_starts(sizes))[documents.example] + segment_starts(lengths)
        self.input_ids = np.full(self.shape[0] * self.shape[1], pad_token_id)

    def index(self, start: np.ndarray | int, lengths: np.ndarray) -> np.ndarray:
        """Indices into the flattened batch of `lengths` (D,) tokens of each document, from its `start`-th on."""
        return segment_ranges(self.first + start, lengths)

    def shared(self, values: np.ndarray) -> np.ndarray:
        """`values` (D,) as a network takes them: of each row (B,), or of each token (B, L) if a row holds several.

        Padding then has 1.
        """
        if not self.several:
            return values
        of_tokens = np.ones(self.shape, dtype=values.dtype)
        of_tokens.reshape(-1)[self.index(0, self.lengths)] = np.repeat(values, self.lengths)
        return of_tokens

    def write(self, start: np.ndarray | int, lengths: np.ndarray, ids: np.ndarray) -> None:
        """Write `ids`, one after the other, where `index(start, lengths)` says."""
        self.input_ids[self.index(start, lengths)] = ids

    def batch(self, **others: np.ndarray) -> dict[str, torch.Tensor]:
        """The tensors of every batch, and `others`.

        Returns:
            `input_ids` and `attention_mask` (rows, L) and `example_id` (examples,). If a row holds several documents,
            also `segment_ids`, the number of each token's document in its row, and `position_ids`, which restart with
            each document. Padding has the number of the document before it, so every token sees at least one token.
        """
        batch = {
            "input_ids": self.input_ids.reshape(self.shape),
            "attention_mask": np.arange(self.shape[1]) < self.filled[:, None],
            "example_id": self.documents.example_id,
        }
        if self.several:
            begins, position_ids = np.zeros((2, *self.shape), dtype=np.int64)
            begins.reshape(-1)[self.first[self.lengths > 0]] = 1
            position_ids.reshape(-1)[self.index(0, self.lengths)] = segment_ranges(0, self.lengths)
            batch.update(segment_ids=begins.cumsum(axis=-1) - 1, position_ids=position_ids)
        return tensors(**batch, **others)


def _first_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and start of each part of `sizes`, by first fit; one that is larger than `capacity` has a row to itself."""
    row, start, used = np.zeros((3, len(sizes)), dtype=np.int64)
    for number, size in enumerate(sizes.tolist()):
        row[number] = np.argmax((used + size <= capacity) | (used == 0))
        start[number] = used[row[number]]
        used[row[number]] += size
    return row, start

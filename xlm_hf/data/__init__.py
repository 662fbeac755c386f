"""From datasets to examples that know their position in the epoch."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from xlm_hf.modules.counter_random import random_bits, uniform

Key = tuple[int, int, int]

# Examples among which a stream is shuffled, beside the order of its shards.
_SHUFFLE_BUFFER = 10_000
_READ_AT_ONCE = 256
# Batches among whose examples those of like length are put together.
_BATCHES_IN_WINDOW = 50
# Positions that are turned into Python integers at a time: an epoch may have hundreds of millions.
_BLOCK = 65_536


@dataclass
class Mixture:
    """Training sets that are read in proportion to weights.

    Each set has a share of [0, 1). Position p of an epoch is read from the set in whose share the number
    frac(offset(seed, epoch) + p sqrt(3)) falls: a function of (seed, epoch, p) alone. The sequence has low discrepancy,
    so every stretch of an epoch has the proportions. Over the rationals, sqrt(3) is linearly independent of 1 and of
    the steps by which the collators spread their corruption. So the corruption of a set does not depend on its weight
    (Weyl, 1916).

    Attributes:
        sets: all of them map-style, or all of them streams.
        weights: one for each, greater than 0; only their ratios count.

    Raises:
        ValueError: for weights that do not fit, or sets of both kinds.
    """

    sets: Sequence[datasets.Dataset | datasets.IterableDataset]
    weights: Sequence[float]

    def __post_init__(self):
        if len(self.weights) != len(self.sets) or min(self.weights) <= 0:
            raise ValueError(f"a mixture needs a weight greater than 0 for each of its {len(self.sets)} sets.")
        if len({isinstance(one, datasets.IterableDataset) for one in self.sets}) > 1:
            raise ValueError("a mixture is of streams or of map-style sets, not of both.")

    def chosen(self, seed: int, epoch: int, positions: torch.Tensor) -> torch.Tensor:
        """The number of the set that each position of an epoch is read from."""
        shares = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)
        u = (uniform(seed, epoch, len(self.sets)) + positions.double() * math.sqrt(3)) % 1.0
        return torch.searchsorted(shares[:-1] / shares[-1], u, right=True)


def _generator(*counters: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(random_bits(*counters)))


@dataclass(eq=False)
class EpochSampler(Sampler[Key]):
    """Shuffles each epoch anew and yields keys (epoch, position in the epoch, index in the dataset).

    The order is a pure function of (seed, epoch). The collators draw their corruption from what the key carries, so
    that neither workers, ranks, batch size nor a resume change it.

    An epoch of a mixture ends once every set was read completely. A set that runs out is read again in another order.
    Each time its indices are raised by the size of the whole mixture.

    Args:
        sizes: of the sets, which follow one another in the dataset.
        seed: of the order.
        mixture: chooses among the sets; None for a single one.
        lengths: of the examples of the dataset, (N,). With them, examples of like length go into one batch: each
            stretch of 50 batches of the shuffled epoch is sorted by length and cut into batches, which are shuffled.
        examples_at_once: size of a batch, over all ranks.
        epoch: of the next iteration.
    """

    sizes: Sequence[int]
    seed: int
    mixture: Mixture | None = None
    lengths: torch.Tensor | None = None
    examples_at_once: int = 1
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the data loader calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.mixture is None:
            return self.sizes[0]
        total = sum(self.mixture.weights)
        return max(
            math.ceil(size * total / weight) for size, weight in zip(self.sizes, self.mixture.weights, strict=True)
        )

    def __iter__(self) -> Iterator[Key]:
        order = self._order() if self.lengths is None else self._grouped(self._order(), self.lengths)
        for start in range(0, len(order), _BLOCK):
            for position, index in enumerate(order[start : start + _BLOCK].tolist(), start):
                yield self.epoch, position, index

    def _grouped(self, order: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        windows = []
        for number, window in enumerate(order.split(_BATCHES_IN_WINDOW * self.examples_at_once)):
            by_length = window[lengths[window % len(lengths)].argsort(stable=True)]
            whole = len(window) - len(window) % self.examples_at_once
            batches = by_length[:whole].view(-1, self.examples_at_once)
            # A batch that is not full can only be the last of the epoch.
            shuffled = torch.randperm(len(batches), generator=_generator(self.seed, self.epoch, number))
            windows += [batches[shuffled].flatten(), by_length[whole:]]
        return torch.cat(windows)

    def _order(self) -> torch.Tensor:
        if self.mixture is None:
            return torch.randperm(self.sizes[0], generator=_generator(self.seed, self.epoch))
        chosen = self.mixture.chosen(self.seed, self.epoch, torch.arange(len(self)))
        order = torch.empty_like(chosen)
        for number, size in enumerate(self.sizes):
            positions = (chosen == number).nonzero().squeeze(-1)
            readings = [
                torch.randperm(size, generator=_generator(self.seed, self.epoch, number, reading))
                + sum(self.sizes[:number])
                + reading * sum(self.sizes)
                for reading in range(math.ceil(len(positions) / size))
            ]
            order[positions] = torch.cat(readings)[: len(positions)] if readings else positions
        return order


class KeyedExamples(Dataset[dict[str, Any]]):
    """A dataset looked up by the keys of `EpochSampler`, whose examples carry their `epoch` and `position`.

    Those of a mixture have their key's index for an `example_id`, so that no two examples of an epoch share one.
    """

    def __init__(self, data: datasets.Dataset | Mixture):
        self.mixture = data if isinstance(data, Mixture) else None
        self.sets: Any = data.sets if isinstance(data, Mixture) else [data]
        self.dataset = datasets.concatenate_datasets(self.sets) if self.mixture else self.sets[0]

    def order(self, seed: int, examples_at_once: int, group_by_length: bool = False) -> EpochSampler:
        """The sampler of a data loader; it depends on the seed, and grouped by length on the size of a batch."""
        lengths = self._lengths() if group_by_length else None
        return EpochSampler([len(one) for one in self.sets], seed, self.mixture, lengths, examples_at_once)

    def _lengths(self) -> torch.Tensor:
        columns = [name for name in ("input_ids", "prompt_ids", "target_ids") if name in self.dataset.column_names]
        tables = self.dataset.select_columns(columns).with_format("arrow").iter(_BLOCK)
        counts = [sum(np.array(pc.list_value_length(table[name])) for name in columns) for table in tables]
        return torch.from_numpy(np.concatenate(counts))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[dict[str, Any]]:
        columns = self.dataset[[index % len(self.dataset) for _, _, index in keys]]
        if self.mixture is not None:
            columns["example_id"] = [index for _, _, index in keys]
        rows = zip(*columns.values(), strict=True)
        return [
            {**dict(zip(columns, row, strict=True)), "epoch": epoch, "position": position}
            for row, (epoch, position, _) in zip(rows, keys, strict=True)
        ]


class KeyedStream(IterableDataset[dict[str, Any]]):
    """The twin of `KeyedExamples` for streams: endless, its examples in an order that the seed alone determines.

    Each set is read again and again, its shards and a buffer of examples shuffled anew. An example's `epoch` counts how
    often its set was read before. Its `position` is that in the whole stream. Its `example_id` is the one from its
    preparation; in a mixture of K sets it is K times that plus the number of its set.

    Every rank and every worker reads the whole stream and keeps its own batches. So the batches and their order are the
    same for any number of either. The stream is one endless epoch to the trainer, which resumes by skipping the
    examples that it has read.

    Args:
        data: the stream or streams.

    Raises:
        ValueError: when a stream turns out to be empty.
    """

    def __init__(self, data: datasets.IterableDataset | Mixture):
        self.mixture = data if isinstance(data, Mixture) else Mixture([data], [1.0])
        self.seed = 0
        self.examples_at_once = 1

    def order(self, seed: int, examples_at_once: int, group_by_length: bool = False) -> None:
        """No sampler: the stream keeps its order itself, and the workers take turns at what all ranks take at once.

        Raises:
            ValueError: if it shall be grouped by length.
        """
        if group_by_length:
            raise ValueError("A stream cannot be grouped by length: use train_sampling_strategy=random or packing.")
        self.seed, self.examples_at_once = seed, examples_at_once

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        readers = [self._read(one) for one in range(len(self.mixture.sets))]
        for start in itertools.count(0, _BLOCK):
            chosen = self.mixture.chosen(self.seed, 0, torch.arange(start, start + _BLOCK)).tolist()
            for position, reader in enumerate(chosen, start):
                example = next(readers[reader])
                if position // self.examples_at_once % count == number:
                    yield {**example, "position": position}

    def _read(self, number: int) -> Iterator[dict[str, Any]]:
        num_sets = len(self.mixture.sets)
        for epoch in itertools.count():
            # The state of `set_epoch` is shared between the workers, which need not be in the same epoch.
            seed = int(random_bits(self.seed, number, epoch)) % 2**63
            shuffled: Any = self.mixture.sets[number].shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
            is_empty = True
            # Iterating over the stream itself would split it between the workers.
            for columns in shuffled.iter(_READ_AT_ONCE):
                is_empty = False
                for row in zip(*columns.values(), strict=True):
                    example = dict(zip(columns, row, strict=True))
                    yield {**example, "example_id": example["example_id"] * num_sets + number, "epoch": epoch}
            if is_empty:
                raise ValueError("A stream of training examples is empty: choose another split or more examples.")


def as_dataset(data: Any) -> Any:
    """Examples that have an `example_id`: a dataset, a stream or a mixture as it is, anything else as a dataset.

    Args:
        data: of `datasets`, a mixture, or a list or map-style torch dataset of dicts, which is read at once. Where
            examples have no `example_id`, they get their index.
    """
    if isinstance(data, Mixture):
        return data
    if not isinstance(data, datasets.Dataset | datasets.IterableDataset):
        data = datasets.Dataset.from_list([data[index] for index in range(len(data))])
    columns = data.column_names or list(next(iter(data), {}))
    if "example_id" in columns:
        return data
    if isinstance(data, datasets.Dataset):
        return data.add_column("example_id", list(range(len(data))))
    return data.map(lambda _, index: {"example_id": index}, with_indices=True)


def keyed(data: datasets.Dataset | datasets.IterableDataset | Mixture) -> KeyedExamples | KeyedStream:
    """Training examples that carry their epoch and position, of whatever kind the data is."""
    first = data.sets[0] if isinstance(data, Mixture) else data
    return KeyedStream(data) if isinstance(first, datasets.IterableDataset) else KeyedExamples(data)

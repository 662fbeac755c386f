"""From datasets to examples that know their place in the epoch."""

from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, Sampler

from xlm_hf.modules.counter_random import random_bits

Key = tuple[int, int, int]


class EpochSampler(Sampler[Key]):
    """Shuffles each epoch anew and yields keys (epoch, position in the epoch, index in the dataset).

    The order is a pure function of (seed, epoch). The collators draw their corruption from what the key carries, so
    that neither workers, ranks, batch size nor a resume change it.
    """

    def __init__(self, num_examples: int, seed: int):
        self.num_examples = num_examples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the data loader calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_examples

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(int(random_bits(self.seed, self.epoch)))
        order = torch.randperm(self.num_examples, generator=generator).tolist()
        return iter([(self.epoch, position, index) for position, index in enumerate(order)])


class KeyedExamples(Dataset[dict[str, Any]]):
    """A dataset looked up by the keys of `EpochSampler`, whose examples carry their `epoch` and `position`."""

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[dict[str, Any]]:
        columns = self.dataset[[index for _, _, index in keys]]
        rows = zip(*columns.values(), strict=True)
        return [
            {**dict(zip(columns, row, strict=True)), "epoch": epoch, "position": position}
            for row, (epoch, position, _) in zip(rows, keys, strict=True)
        ]

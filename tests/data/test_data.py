import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from scipy import stats
from torch.utils.data import DataLoader

from xlm_hf.data import EpochSampler, KeyedExamples, KeyedStream, Mixture, keyed
from xlm_hf.modules.counter_random import low_discrepancy, uniform


def numbers(count, first=0):
    return Dataset.from_dict({"example_id": range(count), "number": range(first, first + count)})


def stream(count, first=0, num_shards=4):
    return numbers(count, first).to_iterable_dataset(num_shards=num_shards)


def reference_chosen(weights, seed, epoch, position):
    """Position by position: walk along the shares until the draw is reached."""
    u = (float(uniform(seed, epoch, len(weights))) + position * math.sqrt(3)) % 1.0
    number, reached = 0, Fraction(weights[0])
    while number < len(weights) - 1 and u >= float(reached / sum(map(Fraction, weights))):
        number += 1
        reached += Fraction(weights[number])
    return number


@pytest.mark.parametrize("weights", [[1.0], [3, 1], [0.2, 0.5, 0.3]])
def test_a_mixture_chooses_as_its_reference(weights):
    mixture = Mixture([numbers(5)] * len(weights), weights)
    for seed, epoch in ((0, 0), (0, 1), (7, 3)):
        chosen = mixture.chosen(seed, epoch, torch.arange(500)).tolist()
        assert chosen == [reference_chosen(weights, seed, epoch, position) for position in range(500)]
        late = range(10**9, 10**9 + 50)
        chosen_late = mixture.chosen(seed, epoch, torch.tensor(late)).tolist()
        assert chosen_late == [reference_chosen(weights, seed, epoch, position) for position in late]
        # A slice of the positions gives a slice of the choices.
        assert mixture.chosen(seed, epoch, torch.arange(100, 120)).tolist() == chosen[100:120]


def test_every_stretch_of_a_mixture_has_its_proportions():
    mixture = Mixture([numbers(5)] * 3, [0.6, 0.3, 0.1])
    chosen = mixture.chosen(1, 0, torch.arange(20_000))
    for length, most in ((10, 1.7), (100, 2.5), (1000, 4)):
        counts = torch.stack([(chosen == number).view(-1, length).sum(1) for number in range(3)], 1).double()
        assert (counts - length * torch.tensor([0.6, 0.3, 0.1])).abs().max() < most


@pytest.mark.parametrize("share", [0.5, 0.25, 0.618])
def test_what_a_set_is_corrupted_by_does_not_depend_on_the_choice(share):
    """The time of a masked example is spread by the golden ratio; within each set it is uniform all the same."""
    positions = torch.arange(20_000)
    chosen = Mixture([numbers(5)] * 2, [share, 1 - share]).chosen(3, 2, positions)
    times = low_discrepancy(3, np.uint64([2]), positions.numpy())
    for number in (0, 1):
        assert stats.kstest(times[chosen.numpy() == number], "uniform").statistic < 0.01


def test_an_epoch_of_a_mixture_reads_every_set_whole():
    mixture = Mixture([numbers(30), numbers(7, 100)], [3, 1])
    examples = KeyedExamples(mixture)
    sampler = examples.order(5, 8)
    assert len(sampler) == 40
    keys = list(sampler)
    assert [position for _, position, _ in keys] == list(range(40))
    rows = examples.__getitems__(keys)
    chosen = mixture.chosen(5, 0, torch.arange(40)).tolist()
    assert [int(row["number"] >= 100) for row in rows] == chosen
    assert len({row["example_id"] for row in rows}) == 40
    counts = Counter(row["number"] for row in rows)
    # What is read again is read once more at most, before anything is read a third time.
    assert {counts[number] for number in range(30)} <= {0, 1}
    assert {counts[number] for number in range(100, 107)} <= {1, 2}
    sampler.set_epoch(1)
    others = examples.__getitems__(list(sampler))
    assert [row["number"] for row in rows] != [row["number"] for row in others]
    assert list(KeyedExamples(mixture).order(5, 3)) == keys


def test_a_single_set_is_read_once_an_epoch():
    sampler = EpochSampler([100_000], seed=0)
    keys = list(sampler)
    assert sorted(index for _, _, index in keys) == list(range(100_000)) == [position for _, position, _ in keys]


def taken(data, seed, batch_size, num_workers, num_batches, num_ranks=1, rank=0):
    """The examples of the first batches on a rank, as the trainer's loader reads them."""
    from accelerate.data_loader import IterableDatasetShard

    dataset = keyed(data)
    assert dataset.order(seed, batch_size * num_ranks) is None
    if num_ranks > 1:
        dataset = IterableDatasetShard(dataset, batch_size, num_processes=num_ranks, process_index=rank)
    loader = iter(DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=list))
    return [next(loader) for _ in range(num_batches)]


STREAMS = {
    "one": lambda: stream(50),
    "one shard": lambda: stream(50, num_shards=1),
    "mixture": lambda: Mixture([stream(30), stream(7, 100)], [3, 1]),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_is_the_same_for_any_number_of_workers_and_ranks(kind):
    expected = taken(STREAMS[kind](), 4, 6, 0, 24)
    positions = [example["position"] for batch in expected for example in batch]
    assert positions == list(range(6 * 24))
    assert taken(STREAMS[kind](), 4, 6, 2, 24) == expected
    for num_workers in (0, 2):
        ranks = [taken(STREAMS[kind](), 4, 3, num_workers, 24, num_ranks=2, rank=rank) for rank in (0, 1)]
        assert [first + second for first, second in zip(*ranks, strict=True)] == expected
    assert taken(STREAMS[kind](), 5, 6, 0, 24) != expected


def test_a_stream_reads_its_set_whole_again_and_again():
    rows = [example for batch in taken(stream(50), 4, 10, 0, 15) for example in batch]
    orders = [[row["number"] for row in rows[start : start + 50]] for start in (0, 50, 100)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert [row["epoch"] for row in rows] == [0] * 50 + [1] * 50 + [2] * 50
    assert all(row["example_id"] == row["number"] for row in rows)


def test_streams_of_a_mixture_are_read_by_weight():
    mixture = Mixture([stream(30), stream(7, 100)], [3, 1])
    rows = [example for batch in taken(mixture, 4, 10, 0, 20) for example in batch]
    assert [int(row["number"] >= 100) for row in rows] == mixture.chosen(4, 0, torch.arange(200)).tolist()
    # No two examples that are corrupted in the same way: the same id in the same epoch.
    assert len({(row["example_id"], row["epoch"]) for row in rows}) == 200
    assert all(row["example_id"] % 2 == (row["number"] >= 100) for row in rows)


@pytest.mark.parametrize(
    ("sets", "weights", "message"),
    [
        ([numbers(3)], [1, 2], "a weight greater than 0 for each of its 1 sets"),
        ([numbers(3), numbers(3)], [1, 0], "a weight greater than 0 for each of its 2 sets"),
        ([numbers(3), stream(3, num_shards=1)], [1, 1], "streams or of map-style sets, not of both"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(sets, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sets, weights)


def test_an_empty_stream_is_an_error_and_no_endless_wait():
    with pytest.raises(ValueError, match="A stream of training examples is empty"):
        next(iter(KeyedStream(IterableDataset.from_generator(lambda: iter(())))))


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_of_like_length_hold_every_example_once_in_an_order_of_their_own(mixed):
    lengths = [int(length) for length in torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0))]
    texts = [list(range(length)) for length in lengths]
    data = Dataset.from_dict({"input_ids": texts, "example_id": list(range(1000))})
    if mixed:
        data = Mixture([data.select(range(400)), data.select(range(400, 1000))], [2.0, 3.0])
    sampler = KeyedExamples(data).order(seed=3, examples_at_once=8, group_by_length=True)
    keys = list(sampler)
    assert [position for _, position, _ in keys] == list(range(len(keys)))
    ungrouped = list(KeyedExamples(data).order(seed=3, examples_at_once=8))
    assert sorted(key[2] for key in keys) == sorted(key[2] for key in ungrouped)
    assert len({key[2] for key in keys}) >= 995
    batches = [[lengths[key[2] % 1000] for key in keys[start : start + 8]] for start in range(0, len(keys), 8)]
    # A window of 400 lengths, sorted, changes by 8 / 4 within a batch on average, and at random by 80.
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 4
    # The batches of a window are shuffled: long ones do not all come last.
    means = torch.tensor([sum(batch) / 8 for batch in batches[:50]])
    assert abs(torch.corrcoef(torch.stack((means, torch.arange(50.0))))[0, 1]) < 0.5
    assert keys == list(sampler)
    sampler.set_epoch(1)
    assert [key[2] for key in keys] != [key[2] for key in sampler]


def test_a_stream_cannot_be_grouped_by_length():
    stream = Dataset.from_dict({"input_ids": [[1]], "example_id": [0]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"A stream cannot be grouped by length: use train_sampling_strategy=random"):
        KeyedStream(stream).order(seed=0, examples_at_once=1, group_by_length=True)

import math
from collections import Counter
from typing import get_args

import pytest
import torch
from scipy.stats import chisquare

from xlm_hf.modules.unmasking import (
    Order,
    commit_bounded,
    commit_confident,
    commit_ranks,
    commit_top_k,
    num_to_commit,
    order_scores,
    statistics_in_place,
)
from xlm_hf.modules.vocabulary_head import LogitsOnDemand


def random_rows(seed, num_rows=40, length=9):
    """Scores on a coarse grid, so that ties abound, and eligible positions from none to all."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(1, 6, (num_rows, length), generator=generator) / 6
    share = torch.rand(num_rows, 1, generator=generator) * 1.4 - 0.2
    return scores, torch.rand(num_rows, length, generator=generator) < share


def slow_order(scores, eligible):
    """Eligible positions of one row, the largest score first and the leftmost of equals."""
    return sorted((i for i in range(len(scores)) if eligible[i]), key=lambda i: (-float(scores[i]), i))


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_top_k_equal_a_sorted_list(seed):
    scores, eligible = random_rows(seed)
    scores[~eligible] = 99.0  # what is excluded never counts, however large
    ranks = commit_ranks(scores, eligible)
    k = torch.randint(0, 11, (len(scores),), generator=torch.Generator().manual_seed(seed))
    committed = commit_top_k(ranks, eligible, k)
    for row in range(len(scores)):
        order = slow_order(scores[row], eligible[row])
        assert [int(ranks[row, i]) for i in order] == list(range(len(order)))
        assert sorted(ranks[row].tolist()) == list(range(scores.shape[1]))
        assert committed[row].nonzero().flatten().tolist() == sorted(order[: int(k[row])])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.2, 0.5, 5 / 6, 1.0])
def test_confident_equals_a_loop(seed, threshold):
    confidence, eligible = random_rows(seed)
    committed = commit_confident(commit_ranks(confidence, eligible), eligible, confidence, threshold)
    for row in range(len(confidence)):
        order = slow_order(confidence[row], eligible[row])
        expected = {i for i in order if float(confidence[row, i]) > threshold} | set(order[:1])
        assert set(committed[row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bound", [0.0, 0.3, 1.0, 2.5, 100.0])
@pytest.mark.parametrize("ascending", [True, False])
def test_bounded_equals_a_loop(seed, bound, ascending):
    """The costs need not follow the order: the largest of a prefix may stand anywhere in it."""
    costs, eligible = random_rows(seed)
    costs = (costs * 6 - 1) / 4  # multiples of a quarter, 0 included: exact sums
    scores = -costs if ascending else random_rows(seed + 100)[0]
    costs[~eligible] = 7.0
    committed = commit_bounded(commit_ranks(scores, eligible), eligible, costs, bound)
    for row in range(len(costs)):
        order = slow_order(scores[row], eligible[row])
        expected: list[int] = []
        for size in range(1, len(order) + 1):
            chosen = [float(costs[row, i]) for i in order[:size]]
            if sum(chosen) - max(chosen) <= bound:
                expected = order[:size]
        assert committed[row].nonzero().flatten().tolist() == sorted(expected)
        assert bool(committed[row].any()) == bool(eligible[row].any())


def test_schedule_is_even_and_finishes_on_time():
    for masked in range(0, 40):
        for steps in range(1, 50):
            left, taken = masked, []
            for step in range(steps):
                if left == 0:
                    break
                taken.append(int(num_to_commit(torch.tensor([left]), torch.tensor([steps - step]))))
                assert taken[-1] == math.ceil(left / (steps - step))
                left -= taken[-1]
            assert left == 0
            assert len(taken) == min(masked, steps)
            assert not taken or max(taken) - min(taken) <= 1


def test_statistics_stand_at_the_eligible_positions():
    logits = LogitsOnDemand.of(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    eligible = torch.tensor([[True, False, True], [False, False, True]])
    margins = statistics_in_place(logits, eligible)("margin")
    a, b, c = logits.statistic("margin").tolist()
    assert margins.tolist() == [[a, 0, b], [0, 0, c]]


def test_orders_rank_by_their_statistic():
    statistics = {
        "confidence": torch.tensor([[0.5, 0.6, 0.4]]),
        "margin": torch.tensor([[0.4, 0.2, 0.3]]),
        "entropy": torch.tensor([[1.0, 0.9, 0.8]]),
    }
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    ranks = {
        order: commit_ranks(
            order_scores(order, statistics.__getitem__, torch.tensor([0]), torch.arange(3)[None]), everywhere
        ).tolist()
        for order in get_args(Order)
    }
    assert ranks["confidence"] == [[1, 0, 2]]
    assert ranks["margin"] == [[0, 2, 1]]
    assert ranks["entropy"] == [[2, 1, 0]]


def test_every_random_order_is_as_likely_and_padding_does_not_change_it():
    num, length = 12_000, 4
    seeds, nothing = torch.arange(num), {}.__getitem__
    everywhere = torch.ones(num, length, dtype=torch.bool)
    scores = order_scores("random", nothing, seeds, torch.arange(length).expand(num, -1))
    ranks = commit_ranks(scores, everywhere)
    counts = Counter(map(tuple, ranks.tolist()))
    assert len(counts) == math.factorial(length)
    assert chisquare(list(counts.values())).pvalue > 1e-4

    padded = torch.tensor([[0, 0, 0, 1, 2, 3]])
    shifted = order_scores("random", nothing, seeds[5:6], padded)
    eligible = torch.tensor([[False, False, True, True, True, True]])
    assert commit_ranks(shifted, eligible)[0, 2:].tolist() == ranks[5].tolist()

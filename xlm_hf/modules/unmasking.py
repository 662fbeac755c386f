"""Which masked positions to commit in a step: the parallel-decoding rules of masked language models, side by side.

All of them work on whole batches: (B, L) tensors, with `eligible` (B, L) bool marking the positions that may be
committed. A prompt, padding and what is already written are not eligible, and are set aside before anything is ranked.
A rule has two parts: an order of the eligible positions (`commit_ranks` of a score), and how much of it is committed
(`commit_top_k`, `commit_confident`, `commit_bounded`). Ties go to the position further left.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch

from .counter_random import random_bits
from .devices import is_synchronous, true_indices
from .token_sampling import filter_logits, sample_categorical
from .vocabulary_head import LogitsOnDemand

Order = Literal["random", "confidence", "margin", "entropy"]


def statistics_in_place(logits: LogitsOnDemand, eligible: torch.Tensor) -> Callable[[str], torch.Tensor]:
    """The (B, L) values of a statistic by its name, computed when asked for: 0 where not `eligible` (B, L).

    `logits` (S, V) are those of the eligible positions, in reading order.
    """

    @cache
    def statistic(name: str) -> torch.Tensor:
        empty = torch.zeros(eligible.shape, device=eligible.device)
        return empty.masked_scatter(eligible, logits.statistic(name))

    return statistic


def order_scores(
    order: str, statistic: Callable[[str], torch.Tensor], seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The score by which an order commits, the largest first.

    Args:
        order: "random", every order of a row's positions alike (first-hitting, arXiv 2409.02908); "confidence", p1
            (MaskGIT, arXiv 2202.04200); "margin", p1 - p2 (arXiv 2502.06768); "entropy", -H.
        statistic: gives the (B, L) values of a statistic by its name, as `statistics_in_place` does.
        seeds: (B,) for "random". With the same seeds in every step a decode follows one random order. If the positions
            of an order decide how many are committed, the rest is in a random order only with new seeds.
        positions: (B, L) position of each token in its own row, so that padding does not change a draw.

    Returns:
        (B, L), float32 or int64.
    """
    if order == "random":
        # A fixed key per position: what is left of a random order is a random order of what is left.
        return random_bits(seeds[:, None], positions, 0)
    return -statistic(order) if order == "entropy" else statistic(order)


def commit_ranks(scores: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """Rank the eligible positions of each row by descending score, from 0; ties keep their order.

    Args:
        scores: (B, L), any value where not eligible; elsewhere above -inf, and of 64 random bits not the lowest number.
        eligible: (B, L) bool.

    Returns:
        (B, L) int64, a permutation of 0..L-1 a row, the eligible positions first.
    """
    lowest = -torch.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).min
    order = scores.masked_fill(~eligible, lowest).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def num_to_commit(num_masked: torch.Tensor, steps_left: torch.Tensor | int) -> torch.Tensor:
    """An even schedule: ceil(m / r) of m masked positions with r steps left, this one included.

    It commits at least one where m > 0, so no forward pass is idle and none is needed beyond a row's m-th; after r
    steps nothing is masked.

    Args:
        num_masked: (B,) int64, m.
        steps_left: (B,) int64 or one number, r >= 1.

    Returns:
        (B,) int64.
    """
    return -(-num_masked // steps_left)


def commit_top_k(ranks: torch.Tensor, eligible: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Commit the first `k` (B,) of each row, or all that are eligible if they are fewer; (B, L) bool."""
    return eligible & (ranks < k[:, None])


def commit_confident(
    ranks: torch.Tensor, eligible: torch.Tensor, confidence: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Commit all positions with p1 > threshold, and the first in order in any case (Fast-dLLM, arXiv 2505.22618).

    Args:
        ranks: (B, L) from `commit_ranks`.
        eligible: (B, L) bool.
        confidence: (B, L), p1.
        threshold: in (0, 1].

    Returns:
        (B, L) bool.
    """
    return eligible & ((confidence > threshold) | (ranks == 0))


def commit_bounded(ranks: torch.Tensor, eligible: torch.Tensor, costs: torch.Tensor, bound: float) -> torch.Tensor:
    """Commit the longest prefix U of the order with sum_U cost - max_U cost <= bound, which is never empty.

    With entropies as costs this bounds by `bound` nats how far the tokens of U, drawn independently, are from their
    joint law (entropy-bounded unmasking, arXiv 2505.24857). With 1 - p1 it bounds the probability that the most
    probable tokens of U, the least sure one aside, are not all right.

    Args:
        ranks: (B, L) from `commit_ranks`.
        eligible: (B, L) bool.
        costs: (B, L), not negative.
        bound: not negative.

    Returns:
        (B, L) bool.
    """
    # float64, so that rounding does not depend on how many columns a scan runs over.
    costs = costs.double().masked_fill(~eligible, 0.0)
    in_order = torch.zeros_like(costs).scatter_(-1, ranks, costs)
    excess = in_order.cumsum(dim=-1) - in_order.cummax(dim=-1).values
    return eligible & ((excess <= bound).gather(-1, ranks) | (ranks == 0))


def commit_by_rule(
    rule: Any, logits: LogitsOnDemand, eligible: torch.Tensor, positions: torch.Tensor, seeds: Any, most: int, k: Any
) -> tuple[torch.Tensor, int]:
    """Choose positions by a rule, at least one in each row that has any, or `k` of them.

    Args:
        rule: order, confidence_threshold, entropy_bound and error_bound, as `ConfidenceSampler` has them.
        logits: of the `eligible` positions in reading order, before temperature, top-k and top-p.
        eligible: (R, L) bool.
        positions: (R, L) position of each token in its own row.
        seeds (torch.Tensor): (R,) for a random order.
        most: a bound of how many are chosen.
        k (torch.Tensor | None): (R,) how many of each row, where the number is that of a step; None asks the rule.

    Returns:
        the chosen positions (R, L) bool, and a bound of their number.
    """
    statistic = statistics_in_place(logits, eligible)
    ranks = commit_ranks(order_scores(rule.order, statistic, seeds, positions), eligible)
    if rule.confidence_threshold is not None:
        return commit_confident(ranks, eligible, statistic("confidence"), rule.confidence_threshold), most
    if rule.entropy_bound is not None:
        return commit_bounded(ranks, eligible, statistic("entropy"), rule.entropy_bound), most
    if rule.error_bound is not None:
        return commit_bounded(ranks, eligible, 1 - statistic("confidence"), rule.error_bound), most
    if k is not None:
        return commit_top_k(ranks, eligible, k), most
    return eligible & (ranks == 0), min(most, len(ranks))


def draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor, config: Any) -> torch.Tensor:
    """Tokens (S,) for (S, V) logits: drawn by (S,) uniforms after temperature, top-k and top-p, or argmax."""
    if not config.do_sample:
        return logits.argmax(dim=-1)
    return sample_categorical(filter_logits(logits, config.temperature, config.top_k, config.top_p), uniforms)


def draw_where(
    logits: LogitsOnDemand,
    numbers: torch.Tensor,
    where: torch.Tensor,
    uniforms: torch.Tensor,
    config: Any,
    excluded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens (R, W) where `where` says, -1 elsewhere.

    Args:
        logits: of N positions.
        numbers: (R, W) which of the N each position is; any number where nothing is drawn.
        where: (R, W) bool.
        uniforms: (R, W) in [0, 1).
        config: the options of the draw.
        excluded: (R, W) an id for each position that is not drawn there.
    """
    # An accelerator is not asked how many there are.
    index = true_indices(where, int(where.sum()) if is_synchronous(where.device) else where.numel())
    scores = logits[numbers.flatten()[index].clamp(min=0)]
    if excluded is not None:
        scores = scores.scatter(1, excluded.flatten()[index][:, None], -torch.inf)
    tokens = draw_tokens(scores, uniforms.flatten()[index], config)
    return torch.full_like(where, -1, dtype=torch.int64).masked_scatter(where, tokens)

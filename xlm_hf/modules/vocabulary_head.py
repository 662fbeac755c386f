"""From hidden states to logits over the vocabulary, without those of the ids that are never written."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

HeadFunction = Callable[[torch.Tensor, nn.Module, Sequence[int] | None], Any]


def suppress_(logits: torch.Tensor, token_ids: Sequence[int] | None) -> torch.Tensor:
    """Set the logits (..., V) of `token_ids` to -inf, in place, and return them.

    Runs of neighbouring ids are filled as slices: an index made of a list would be copied to the device every time.
    """
    start = stop = 0
    for token_id in [*sorted(token_ids or ()), logits.shape[-1] + 1]:
        if token_id != stop:
            if stop > start:
                logits[..., start:stop] = -torch.inf
            start = token_id
        stop = token_id + 1
    return logits


def vocabulary_logits(
    hidden_states: torch.Tensor, head: nn.Module, suppressed_ids: Sequence[int] | None
) -> torch.Tensor:
    """Logits of hidden states (..., H) over the vocabulary, (..., V); those of `suppressed_ids` are -inf.

    This is what a model does with the hidden states asked for, unless its `forward` is given another `head_function`
    with the same arguments. A loss brings one that needs no logits: the head is used within the model's own forward
    pass, so whoever wraps it (data parallelism, automatic mixed precision) sees every parameter at work.
    """
    return suppress_(head(hidden_states), suppressed_ids)

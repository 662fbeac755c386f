"""Cross-entropy of a linear head over a large vocabulary, without a tensor of all its logits.

The head is the largest product of a small model: for 1,000 tokens and 30,000 words, its logits and what automatic
differentiation keeps of them are hundreds of megabytes. Here they are made a chunk of rows at a time, and turned into
the loss and the gradients at once; the chunk stays in the processor's cache (cf. Wijmans et al., "Cut your losses in
large-vocabulary language models", arXiv 2411.09009; Hsu et al., "Liger kernel", arXiv 2410.10989).
"""

from collections.abc import Sequence
from itertools import pairwise, starmap
from typing import NamedTuple

import torch
from torch import nn

from .vocabulary_head import suppress_, vocabulary_logits

# Logits of one chunk: what fits into a cache, and on an accelerator what keeps it busy (512 MiB of float32).
CHUNK_SIZE_CPU, CHUNK_SIZE_ACCELERATOR = 2**21, 2**27


class CrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns.

    Attributes:
        loss_sum: scalar, the weighted sum of the losses, and the one thing here that has a gradient.
        losses: (G,) the loss of each group, without weights.
        correct: (T,) whether no token of its row scores higher than the target.
    """

    loss_sum: torch.Tensor
    losses: torch.Tensor
    correct: torch.Tensor


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    head: nn.Module,
    suppressed_ids: Sequence[int] | None,
    target_ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    chunked: bool | None = None,
) -> CrossEntropy:
    """Sum over groups of weight_g x loss_g, the rows of a group sharing one softmax over all pairs (row, token).

        loss_g = log sum_{r in g, v} exp(z_{r,v}) - mean over the targets t in g of z_{row_t, id_t},    z = x W^T.

    With the defaults each row is a group with one target, and loss_g its cross-entropy -log softmax(z_r)[id].

    Args:
        hidden_states: x, (S, H).
        head: a linear map without bias, W (V, H); another module, such as an adapted head, gives all logits at once.
        suppressed_ids: ids whose z is -inf.
        target_ids: (T,).
        weights: (G,) of the groups, or (S,) of the rows without `groups`; None means 1.
        target_rows: (T,) row of each target, ascending; None means that the t-th row has the t-th target.
        groups: (S,) group of each row, ascending, with `weights` given; a group without rows has a loss of 0. None
            means that each row is one.
        chunked: whether to make the logits in chunks, gradients included; by default wherever one chunk does not hold
            them all. The losses are computed at least in float32, whatever the autocast.
    """
    device, size = hidden_states.device, _chunk_size(hidden_states.device)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    target_rows = torch.arange(len(target_ids), device=device) if target_rows is None else target_rows
    weights = hidden_states.new_ones(len(hidden_states), dtype=dtype) if weights is None else weights.to(dtype)
    target_shares = torch.ones_like(target_ids, dtype=dtype)
    if groups is not None:
        target_groups = groups[target_rows]
        counts = torch.zeros_like(weights).index_add(0, target_groups, target_shares)
        target_shares = 1 / counts[target_groups]
    if chunked is None:
        chunked = type(head) is nn.Linear and head.bias is None and len(hidden_states) * head.out_features > size
    if not chunked:
        logits = vocabulary_logits(hidden_states, head, suppressed_ids).to(dtype)
        scores = logits[target_rows, target_ids]
        correct = scores.detach() >= logits.detach().amax(dim=-1)[target_rows]
        losses, _ = _group_losses(logits.logsumexp(-1), scores, target_rows, target_shares, groups, len(weights))
        return CrossEntropy((weights * losses).sum(), losses.detach(), correct)
    loss_sum, losses, correct, _, _ = _chunked_cross_entropy(
        hidden_states,
        head.weight,
        list(suppressed_ids or ()),
        target_ids,
        weights,
        target_rows,
        target_shares,
        groups,
        torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden_states.dtype,
        torch.is_grad_enabled() and hidden_states.requires_grad,
        torch.is_grad_enabled() and head.weight.requires_grad,
    )
    return CrossEntropy(loss_sum, losses.detach(), correct)


def _chunk_size(device: torch.device) -> int:
    return CHUNK_SIZE_CPU if device.type == "cpu" else CHUNK_SIZE_ACCELERATOR


def _group_losses(log_normaliser, scores, target_rows, target_shares, groups, num_groups):
    """Loss of each group from the logsumexp of each row and the scores of its targets.

    Returns:
        the losses (G,), and for each row its share of the probability of its group, (S,).
    """
    if groups is None:
        return log_normaliser - target_shares * scores, torch.ones_like(log_normaliser)
    largest = log_normaliser.new_full((num_groups,), -torch.inf)
    largest = largest.scatter_reduce(0, groups, log_normaliser.detach(), "amax")
    largest = largest.masked_fill(largest.isinf(), 0.0)
    mass = torch.zeros_like(largest).index_add(0, groups, (log_normaliser - largest[groups]).exp())
    # A group without rows has no mass; its loss is 0.
    total = largest + mass.masked_fill(mass == 0, 1.0).log()
    losses = total.index_add(0, groups[target_rows], -target_shares * scores)
    return losses, (log_normaliser - total[groups]).exp()


def _chunks(num_rows, rows_per_chunk, groups, target_rows) -> list[tuple[slice, slice]]:
    """The rows and the targets of each chunk; with `groups`, a chunk ends where a group does.

    The groups are then read back from the device, once, and only where there are several chunks.
    """
    if num_rows <= rows_per_chunk:
        return [(slice(0, num_rows), slice(0, len(target_rows)))]
    if groups is None:
        starts = range(0, num_rows, rows_per_chunk)
        return [(slice(start, start + rows_per_chunk),) * 2 for start in starts]
    bounds = [0]
    ends = [*((groups[1:] != groups[:-1]).nonzero().squeeze(-1) + 1).tolist(), num_rows]
    for previous, end in pairwise([0, *ends]):
        if end - bounds[-1] > rows_per_chunk and previous > bounds[-1]:
            bounds.append(previous)
    bounds.append(num_rows)
    of_targets = torch.searchsorted(target_rows, torch.tensor(bounds, device=target_rows.device)).tolist()
    return list(zip(starmap(slice, pairwise(bounds)), starmap(slice, pairwise(of_targets)), strict=True))


# An operator of its own, so that a compiled training step holds it as one node.
@torch.library.custom_op("xlm_hf::chunked_cross_entropy", mutates_args=())
def _chunked_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    suppressed_ids: list[int],
    target_ids: torch.Tensor,
    weights: torch.Tensor,
    target_rows: torch.Tensor,
    target_shares: torch.Tensor,
    groups: torch.Tensor | None,
    product_dtype: torch.dtype,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`CrossEntropy`, and the gradients of its sum by hidden states and weight where they are wanted."""
    hidden, matrix = hidden_states.to(product_dtype), weight.to(product_dtype)
    losses, correct = torch.zeros_like(weights), torch.zeros_like(target_ids, dtype=torch.bool)
    hidden_grad = torch.empty_like(hidden_states) if hidden_gradient else hidden_states.new_empty(0)
    weight_grad = torch.zeros_like(weight, dtype=weights.dtype) if weight_gradient else weight.new_empty(0)
    rows_per_chunk = max(1, _chunk_size(hidden.device) // len(weight))
    for rows, targets in _chunks(len(hidden), rows_per_chunk, groups, target_rows):
        group = None if groups is None else groups[rows]
        row_weights = weights[rows] if group is None else weights[group]
        at, share = (target_rows[targets] - rows.start, target_ids[targets]), target_shares[targets]
        # One buffer: the logits, then their exponentials, then the gradient of the loss by them.
        logits = suppress_((hidden[rows] @ matrix.T).to(weights.dtype), suppressed_ids)
        largest, scores = logits.amax(dim=-1, keepdim=True), logits[at]
        correct[targets] = scores >= largest[at[0], 0]
        mass = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        log_normaliser = (largest + mass.log()).squeeze(-1)
        chunk_losses, row_shares = _group_losses(log_normaliser, scores, at[0], share, group, len(weights))
        if group is None:
            losses[rows] = chunk_losses
        else:
            losses += chunk_losses
        if not (hidden_gradient or weight_gradient):
            continue
        logits.mul_((row_weights * row_shares)[:, None] / mass)
        logits.index_put_(at, -row_weights[at[0]] * share, accumulate=True)
        gradient = logits.to(product_dtype)
        if hidden_gradient:
            hidden_grad[rows] = gradient @ matrix
        if weight_gradient and product_dtype == weights.dtype:
            weight_grad.addmm_(gradient.T, hidden[rows])
        elif weight_gradient:
            weight_grad += gradient.T @ hidden[rows]
    return (weights * losses).sum(), losses, correct, hidden_grad, weight_grad.to(weight.dtype)


@_chunked_cross_entropy.register_fake
def _(hidden_states, weight, _, target_ids, weights, *arguments):
    *_, hidden_gradient, weight_gradient = arguments
    return (
        weights.new_empty(()),
        torch.empty_like(weights),
        torch.empty_like(target_ids, dtype=torch.bool),
        torch.empty_like(hidden_states) if hidden_gradient else hidden_states.new_empty(0),
        torch.empty_like(weight) if weight_gradient else weight.new_empty(0),
    )


def _save_gradients(ctx, inputs, output) -> None:
    *_, ctx.hidden_gradient, ctx.weight_gradient = inputs
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(*output[-2:])


def _scale_gradients(ctx, grad_loss_sum, *_):
    hidden_grad, weight_grad = ctx.saved_tensors
    return (
        grad_loss_sum.to(hidden_grad.dtype) * hidden_grad if ctx.hidden_gradient else None,
        grad_loss_sum.to(weight_grad.dtype) * weight_grad if ctx.weight_gradient else None,
        *[None] * (ctx.num_inputs - 2),
    )


_chunked_cross_entropy.register_autograd(_scale_gradients, setup_context=_save_gradients)

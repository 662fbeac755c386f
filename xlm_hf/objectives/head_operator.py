"""Cross-entropy of a linear head over a large vocabulary, without a tensor of all its logits.

The head is the largest product of a small model: for 1,000 tokens and 30,000 words, its logits and what automatic
differentiation keeps of them are hundreds of megabytes. Here they are made a chunk of rows at a time, and turned into
the loss and the gradients at once; the chunk stays in the processor's cache (cf. Wijmans et al., "Cut your losses in
large-vocabulary language models", arXiv 2411.09009; Hsu et al., "Liger kernel", arXiv 2410.10989).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xlm_hf.modules.devices import is_synchronous
from xlm_hf.modules.vocabulary_head import is_linear, suppress_, vocabulary_logits

# Logits of one chunk: what fits into a CPU's cache, and elsewhere what keeps an accelerator busy (512 MiB of float32).
CHUNK_SIZES = {"cpu": 2**21}
_CHUNK_SIZE = 2**27

# A target that is none, as in torch's own cross-entropy.
IGNORED_ID = -100


class CrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns.

    Attributes:
        loss_sum: scalar, the weighted sum of the losses, and the one thing here that has a gradient.
        losses: (T,) the loss of each target, without its weight.
        correct: (T,) whether no token of its row scores higher than the target.
    """

    loss_sum: Tensor
    losses: Tensor
    correct: Tensor


def linear_cross_entropy(
    hidden_states: Tensor,
    head: nn.Module,
    suppressed_ids: Sequence[int] | None,
    target_ids: Tensor,
    target_weights: Tensor | None = None,
    target_rows: Tensor | None = None,
    groups: Tensor | None = None,
) -> CrossEntropy:
    """Sum over targets t of weight_t x loss_t, the rows of a group g sharing one softmax over all pairs (row, token).

        loss_t = log sum_{r in g, v} exp(z_{r,v}) - z_{row_t, id_t},    z = x W^T,    g the group of row_t.

    With the defaults each row is a group and has one target: the usual cross-entropy -log softmax(z_t)[id_t].
    Where one chunk does not hold all logits, they are made in chunks, gradients included. The losses are computed at
    least in float32, whatever the autocast.

    Args:
        hidden_states: x, (S, H).
        head: a linear map without bias, W (V, H); another module, such as an adapted head, gives all logits at once.
        suppressed_ids: ids whose z is -inf.
        target_ids: (T,); an `IGNORED_ID` is no target, and its loss is 0.
        target_weights: (T,); None means 1.
        target_rows: (T,) row of each target, ascending; None means that the t-th row has the t-th target.
        groups: (S,) group of each row, ascending; None means that each row is one.
    """
    device, dtype = hidden_states.device.type, torch.promote_types(hidden_states.dtype, torch.float32)
    rows = torch.arange(len(target_ids), device=target_ids.device) if target_rows is None else target_rows
    is_target = target_ids != IGNORED_ID
    weights = is_target.to(dtype) if target_weights is None else target_weights.to(dtype).where(is_target, 0.0)
    num_words = head.out_features if is_linear(head) and head.bias is None else 0
    if len(hidden_states) * num_words <= CHUNK_SIZES.get(device, _CHUNK_SIZE):
        logits = vocabulary_logits(hidden_states, head, suppressed_ids).to(dtype)
        scores = logits[rows, target_ids.clamp(min=0)]
        losses = (_log_normaliser(logits.logsumexp(dim=-1), groups)[rows] - scores).where(is_target, 0.0)
        correct = (scores.detach() >= logits.detach().amax(dim=-1)[rows]) & is_target
        return CrossEntropy((weights * losses).sum(), losses.detach(), correct)
    is_autocast, suppressed = torch.is_autocast_enabled(device), list(suppressed_ids or ())
    targets = [rows, target_ids, weights]
    product_dtype = torch.get_autocast_dtype(device) if is_autocast else hidden_states.dtype
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_states, head.weight)]
    output = _chunked_cross_entropy(hidden_states, head.weight, suppressed, targets, groups, product_dtype, wanted)
    return CrossEntropy(output[0], output[1].detach(), output[2])


def _log_normaliser(of_rows: Tensor, groups: Tensor | None) -> Tensor:
    """For each row, the logsumexp of `of_rows` over its group."""
    if groups is None:
        return of_rows
    groups = _numbered(groups)
    largest = torch.full_like(of_rows, -torch.inf).scatter_reduce(0, groups, of_rows.detach(), "amax")[groups]
    return largest + torch.zeros_like(of_rows).index_add(0, groups, (of_rows - largest).exp())[groups].log()


def _numbered(groups: Tensor) -> Tensor:
    """The groups by their numbers 0, 1, ..., so that a tensor as long as `groups` has room for all."""
    return (groups.diff(prepend=groups[:1]) != 0).cumsum(0)


def _chunks(num_rows: int, most_rows: int, groups: Tensor | None, target_rows: Tensor) -> list[tuple[slice, slice]]:
    """The rows of each chunk, and a slice of the targets that has all of its own.

    With `groups` a chunk ends where a group does, which the host must read. Where that is not free, chunks are cut at
    fixed rows, and each is given all targets.
    """
    if groups is None or not is_synchronous(groups.device):
        rows = [slice(i, min(i + most_rows, num_rows)) for i in range(0, num_rows, most_rows)]
        return [(chunk, chunk if groups is None else slice(None)) for chunk in rows]
    bounds = [0]
    for previous, end in pairwise([0, *groups.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()]):
        if end - bounds[-1] > most_rows and previous > bounds[-1]:
            bounds.append(previous)
    bounds.append(num_rows)
    of_targets = torch.searchsorted(target_rows, torch.tensor(bounds)).tolist()
    return [(slice(*a), slice(*b)) for a, b in zip(pairwise(bounds), pairwise(of_targets), strict=True)]


# An operator of its own, so that a compiled training step holds it as one node.
@torch.library.custom_op("xlm_hf::chunked_cross_entropy", mutates_args=())
def _chunked_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    suppressed_ids: list[int],
    targets: list[Tensor],
    groups: Tensor | None,
    product_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`CrossEntropy`, and the gradients of its sum by hidden states and weight where they are wanted.

    Where chunks cut through groups (see `_chunks`), a first pass makes all logits once for the normalisers: the price,
    one more product with the head, of a device that never waits for the host and may capture the step as a graph.
    """
    hidden, matrix, dtype = hidden_states.to(product_dtype), weight.to(product_dtype), targets[2].dtype
    losses, correct = torch.zeros_like(targets[2]), torch.zeros_like(targets[1], dtype=torch.bool)
    hidden_grad = torch.empty_like(hidden_states) if wanted[0] else hidden_states.new_empty(0)
    weight_grad = torch.zeros_like(weight, dtype=dtype) if wanted[1] else weight.new_empty(0)
    most_rows = max(1, CHUNK_SIZES.get(hidden.device.type, _CHUNK_SIZE) // len(weight))
    chunks = _chunks(len(hidden), most_rows, groups, targets[0])

    def logits_of(rows: slice) -> Tensor:
        return suppress_((hidden[rows] @ matrix.T).to(dtype), suppressed_ids)

    normalisers = None
    if groups is not None and not is_synchronous(hidden.device):
        normalisers = _log_normaliser(torch.cat([logits_of(rows).logsumexp(dim=-1) for rows, _ in chunks]), groups)
    number = torch.arange(len(hidden), device=hidden.device) if groups is None else _numbered(groups)
    by_groups = losses.new_zeros(len(hidden)).index_add(0, number[targets[0]], targets[2])[number]
    for rows, chosen in chunks:
        places, num_rows = targets[0][chosen] - rows.start, rows.stop - rows.start
        inside = (places >= 0) & (places < num_rows) & (targets[1][chosen] != IGNORED_ID)
        at = (places.clamp(0, num_rows - 1), targets[1][chosen].clamp(min=0))
        # One buffer: the logits, then their exponentials, then the gradient of the loss by them.
        logits = logits_of(rows)
        largest, scores = logits.amax(dim=-1, keepdim=True), logits[at]
        correct[chosen] |= (scores >= largest[at[0], 0]) & inside
        mass = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        of_rows = (largest + mass.log()).squeeze(-1)
        group = None if groups is None else groups[rows]
        normaliser = _log_normaliser(of_rows, group) if normalisers is None else normalisers[rows]
        losses[chosen] += (normaliser[at[0]] - scores).where(inside, 0.0)
        # By the logsumexp of a row: the weights of its group times its share of the group's probability.
        by_rows = by_groups[rows] * (of_rows - normaliser).exp()
        if any(wanted):
            by_scores = -targets[2][chosen].where(inside, 0.0)
            logits.mul_(by_rows[:, None] / mass).index_put_(at, by_scores, accumulate=True)
        gradient = logits.to(product_dtype)
        if wanted[0]:
            hidden_grad[rows] = gradient @ matrix
        if wanted[1] and product_dtype == dtype:
            weight_grad.addmm_(gradient.T, hidden[rows])
        elif wanted[1]:
            weight_grad += gradient.T @ hidden[rows]
    return (targets[2] * losses).sum(), losses, correct, hidden_grad, weight_grad.to(weight.dtype)


@_chunked_cross_entropy.register_fake
def _(hidden_states, weight, suppressed_ids, targets, groups, product_dtype, wanted):
    grads = [torch.empty_like(x) if w else x.new_empty(0) for x, w in zip((hidden_states, weight), wanted, strict=True)]
    return targets[2].new_empty(()), torch.empty_like(targets[2]), torch.empty_like(targets[1]).bool(), *grads


def _save_gradients(ctx, inputs, output) -> None:
    # What stands for an argument without a gradient: an empty list has nothing in it to be None.
    ctx.wanted, ctx.num_targets, ctx.of_suppressed = inputs[-1], len(inputs[3]), None if inputs[2] else []
    ctx.save_for_backward(*output[-2:])


def _scale_gradients(ctx, by_sum, *_):
    grads = [by_sum.to(x.dtype) * x if w else None for x, w in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
    return *grads, ctx.of_suppressed, [None] * ctx.num_targets, None, None, None


_chunked_cross_entropy.register_autograd(_scale_gradients, setup_context=_save_gradients)

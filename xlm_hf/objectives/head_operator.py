"""Losses of a linear head over a large vocabulary, without a tensor of all its logits.

The head is the largest product of a small model: for 1,000 tokens and 30,000 words, its logits and what automatic
differentiation keeps of them are hundreds of megabytes. Here they are made a chunk of rows at a time, and a row
function turns them into losses and gradients at once (cf. Wijmans et al., "Cut your losses in large-vocabulary language
models", arXiv 2411.09009; Hsu et al., "Liger kernel", arXiv 2410.10989).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xlm_hf.modules.devices import is_synchronous
from xlm_hf.modules.vocabulary_head import is_linear, suppress_
from xlm_hf.objectives.row_functions import IGNORED_ID, ROW_FUNCTIONS, CrossEntropy, JointCrossEntropy, RowFunction

__all__ = ["IGNORED_ID", "HeadLosses", "head_losses", "linear_cross_entropy"]

# Logits of one chunk: what fits into a CPU's cache, and elsewhere what keeps an accelerator busy (512 MiB of float32).
_CHUNK_SIZES = {"cpu": 2**21}
_CHUNK_SIZE = 2**27
# With fewer rows a product waits for the weights, which are larger than a cache wherever this is more than its share.
_LEAST_ROWS = 128


class HeadLosses(NamedTuple):
    """What `head_losses` returns.

    Attributes:
        loss_sum: scalar, the weighted sum of the losses, and the one thing here that has a gradient.
        losses: (T,) the loss of each target, without its weight.
        correct: (T,) whether no token of its row scores higher than the target.
    """

    loss_sum: Tensor
    losses: Tensor
    correct: Tensor


def head_losses(
    hidden_states: Tensor, head: nn.Module, suppressed_ids: Sequence[int] | None, row_function: RowFunction
) -> HeadLosses:
    """Sum of weight x loss over the targets of a row function, with its gradients by hidden states and head.

    With its last argument bound this is a `head_function` (see `head_fields`). The losses are computed at least
    in float32, whatever the autocast. Nothing but `hidden_states`, the head and `of_table` of the row function has a
    gradient, and a gradient has none.

    Args:
        hidden_states: (S, H).
        head: a linear map without bias, W (V, H), whose logits x W^T are made in chunks; another module, such as an
            adapted head, gives all logits at once.
        suppressed_ids: ids whose logits are -inf.
        row_function: of the S rows.
    """
    device, dtype = hidden_states.device.type, torch.promote_types(hidden_states.dtype, torch.float32)
    weight = head.weight if is_linear(head) and head.bias is None else None
    if weight is None:
        hidden_states = suppress_(head(hidden_states), suppressed_ids)
    is_autocast = torch.is_autocast_enabled(device) and weight is not None
    product_dtype = torch.get_autocast_dtype(device) if is_autocast else hidden_states.dtype
    tensors = [x.to(dtype) if x.is_floating_point() else x for x in row_function.tensors()]
    inputs = (hidden_states, weight, *(row_function.of_table or (None, None)))
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    suppressed, name = [*(suppressed_ids or ())], type(row_function).__name__
    output = _chunked_head(*inputs, suppressed, name, tensors, product_dtype, wanted)
    return HeadLosses(output[0], output[1].detach(), output[2])


def linear_cross_entropy(
    hidden_states: Tensor,
    head: nn.Module,
    suppressed_ids: Sequence[int] | None,
    target_ids: Tensor,
    target_weights: Tensor | None = None,
    target_rows: Tensor | None = None,
    groups: Tensor | None = None,
) -> HeadLosses:
    """`head_losses` by `CrossEntropy`, or by `JointCrossEntropy` where rows have `groups`.

    `hidden_states`, `head` and `suppressed_ids` are those of `head_losses`.

    Args:
        target_ids: (T,); an `IGNORED_ID` is no target, and its loss is 0.
        target_weights: (T,); None means 1.
        target_rows: (T,) row of each target, with `groups`; else the t-th row has the t-th target.
        groups: (S,) group of each row, ascending; None means that each row has a softmax of its own.
    """
    weights = torch.ones_like(target_ids, dtype=torch.float32) if target_weights is None else target_weights
    if groups is None or target_rows is None:
        return head_losses(hidden_states, head, suppressed_ids, CrossEntropy(target_ids, weights))
    row_function = JointCrossEntropy(target_ids, weights, target_rows, groups)
    return head_losses(hidden_states, head, suppressed_ids, row_function)


def rows_per_chunk(num_ids: int, device: torch.device) -> int:
    """Rows whose logits over `num_ids` ids make a chunk."""
    return max(_LEAST_ROWS, _CHUNK_SIZES.get(device.type, _CHUNK_SIZE) // num_ids)


def _chunks(num_rows: int, most_rows: int, groups: Tensor | None) -> list[slice]:
    """The rows of each chunk.

    With `groups` a chunk ends where a group does, which the host must read. Without them, and where reading is not
    free, chunks are of even size: a product with the few rows that are left over would cost a reading of all weights.
    """
    if groups is None or not is_synchronous(groups.device):
        size = -(-num_rows // max(1, -(-num_rows // most_rows)))
        return [slice(i, min(i + size, num_rows)) for i in range(0, num_rows, max(1, size))]
    bounds = [0]
    for previous, end in pairwise([0, *groups.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()]):
        if end - bounds[-1] > most_rows and previous > bounds[-1]:
            bounds.append(previous)
    return [slice(*bound) for bound in pairwise([*bounds, num_rows])]


# An operator of its own, so that a compiled training step holds it as one node.
@torch.library.custom_op("xlm_hf::chunked_head", mutates_args=())
def _chunked_head(
    hidden_states: Tensor,
    weight: Tensor | None,
    query: Tensor | None,
    table: Tensor | None,
    suppressed_ids: list[int],
    row_function: str,
    tensors: list[Tensor],
    product_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`HeadLosses`, and the gradients of the sum by the first four arguments where they are wanted.

    Without a weight the hidden states are the logits. If chunks cut through groups (see `_chunks`), a first pass makes
    all logits once for the normalisers. This costs one more product with the head. In return the device never waits for
    the host, and may capture the step as a graph.
    """
    function, num_rows = ROW_FUNCTIONS[row_function](*tensors), len(hidden_states)
    hidden, matrix = hidden_states.to(product_dtype), None if weight is None else weight.to(product_dtype)
    num_ids, dtype = hidden.shape[-1] if matrix is None else len(matrix), function.weights.dtype
    losses, correct = torch.zeros_like(function.weights), torch.zeros_like(function.weights, dtype=torch.bool)
    hidden_grad, weight_grad, query_grad, table_grad = _gradients((hidden_states, weight, query, table), wanted, dtype)
    function.of_table = (table, table_grad)[: 1 + wanted[3]]  # type: ignore[assignment]
    groups = function.row_groups()
    chunks = _chunks(num_rows, rows_per_chunk(num_ids, hidden.device), groups)

    def logits_of(rows: slice) -> Tensor:
        logits = hidden[rows].to(dtype, copy=True) if matrix is None else (hidden[rows] @ matrix.T).to(dtype)
        logits = logits if matrix is None else suppress_(logits, suppressed_ids)
        return logits if query is None or table is None else logits.addmm_(query[rows], table.T)

    log_normalisers = None
    if groups is not None and len(chunks) > 1 and not is_synchronous(hidden.device):
        of_rows = torch.cat([logits_of(rows).logsumexp(dim=-1) for rows in chunks])
        log_normalisers = JointCrossEntropy.logsumexp_of_groups(of_rows, groups)
    for rows in chunks:
        logits = logits_of(rows)
        function.fill_(logits, rows, num_ids - len(set(suppressed_ids)), losses, correct, log_normalisers)
        gradient = logits.to(product_dtype)
        if wanted[0]:
            hidden_grad[rows] = gradient if matrix is None else gradient @ matrix
        if wanted[1]:
            _add_product_(weight_grad, gradient, hidden[rows])
        if wanted[3] and query is not None and table is not None:
            query_grad[rows] = logits @ table
            table_grad.addmm_(logits.T, query[rows])
    loss_sum = (function.weights * losses).where(function.target_ids != IGNORED_ID, 0.0).sum()
    weight_grad = weight_grad if weight is None else weight_grad.to(weight.dtype)
    return loss_sum, losses, correct, hidden_grad, weight_grad, query_grad, table_grad


def _gradients(inputs: Sequence[Any], wanted: list[bool], dtype: torch.dtype | None) -> list[Tensor]:
    """Memory for the gradients by hidden states, weight (of `dtype`), query, table; empty where not wanted."""
    given = zip(inputs, (None, dtype, None, None), wanted, strict=True)
    return [torch.zeros_like(x, dtype=of) if is_wanted else inputs[0].new_empty(0) for x, of, is_wanted in given]


def _add_product_(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add gradient^T hidden to `total` (V, H), without a temporary of its size where the product is of another type."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.T, hidden)
        return
    num_ids = max(1, _CHUNK_SIZES.get(total.device.type, _CHUNK_SIZE) // total.shape[1])
    for part, columns in zip(total.split(num_ids), gradient.split(num_ids, dim=1), strict=True):
        part += columns.T @ hidden


@_chunked_head.register_fake
def _(hidden_states, weight, query, table, suppressed_ids, row_function, tensors, product_dtype, wanted):
    losses = torch.empty_like(tensors[1])
    gradients = _gradients((hidden_states, weight, query, table), wanted, None)
    return losses.new_empty(()), losses, torch.empty_like(losses, dtype=torch.bool), *gradients


def _save_gradients(ctx, inputs, output) -> None:
    # What stands for an argument without a gradient: an empty list has nothing in it to be None.
    ctx.wanted, ctx.num_tensors, ctx.of_suppressed = inputs[-1], len(inputs[6]), None if inputs[4] else []
    ctx.save_for_backward(*output[-4:])


def _scale_gradients(ctx, by_sum, *_):
    # In place, since that of the head is as large as the head; autograd refuses a second pass through the same graph.
    grads = [x.mul_(by_sum.to(x.dtype)) if w else None for x, w in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
    return *grads, ctx.of_suppressed, None, [None] * ctx.num_tensors, None, None


_chunked_head.register_autograd(_scale_gradients, setup_context=_save_gradients)

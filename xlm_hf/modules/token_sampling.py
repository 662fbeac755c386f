"""Drawing tokens: temperature, top-k, top-p, and the inverse of the cumulative distribution.

One uniform number makes one token, so a draw is as reproducible as the number that it is made from. (Gumbel noise over
the whole vocabulary would need a draw per entry, and in float32 cannot reach rare tokens.)
"""

import torch


def filter_logits(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Apply temperature, then keep the `top_k` largest, then the smallest set whose probability reaches `top_p`.

    The conventions are those of transformers' logits warpers: the entry that crosses `top_p` is kept, and ties with
    the k-th largest are kept.

    Args:
        logits: (..., N), the last dimension is filtered; entries may be -inf.
        temperature: positive divisor.
        top_k: number of entries kept; None or 0 keeps all.
        top_p: probability mass kept, in (0, 1]; None or 1 keeps all.

    Returns:
        (..., N) float32 logits with the entries that were filtered out at -inf.
    """
    logits = logits.float()
    if temperature != 1:
        # Neither it nor a quotient leaves the range of float32.
        logits = logits / min(max(temperature, 1e-30), 1e30)
    if top_k and top_k < logits.shape[-1]:
        kth_largest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    if top_p is not None and top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = sorted_logits.softmax(dim=-1)
        is_behind = probabilities.cumsum(dim=-1) - probabilities >= max(top_p, 1e-30)
        dropped = is_behind.scatter(-1, order, is_behind)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def sample_categorical(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw from softmax(logits) by inverting its cumulative distribution at `uniforms`.

    Args:
        logits: (..., N), at least one finite entry a row.
        uniforms: (...) float64 in [0, 1).

    Returns:
        (...) int64 indices; an entry at -inf is never drawn.
    """
    cumulative = logits.float().softmax(dim=-1).cumsum_(dim=-1)
    total = cumulative[..., -1:]
    # A product that rounds up to the total would fall behind the last entry.
    threshold = torch.minimum(uniforms.unsqueeze(-1).to(cumulative.dtype) * total, total.nextafter(total.new_zeros(())))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)

"""Which tokens a token may see, as functions of index tensors.

A pattern is a function (batch, head, query, key) -> bool of index tensors that broadcast against each other, the form
that transformers' masks take. Attention, eager, sdpa or flex, and the short convolution ask the same function, so that
they cannot differ.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import and_masks, packed_sequence_mask_function

Pattern = Callable[[Any, Any, Any, Any], torch.Tensor]


def block_pattern(block_ids: torch.Tensor, is_noisy: torch.Tensor | None = None) -> Pattern:
    """Attention by blocks: a token sees its own block and the earlier ones, in both directions within a block.

    With `is_noisy` a row holds a noisy and a clean copy of a document (block diffusion, arXiv 2503.09573, section 3.2).
    One pass then does the work of a pass for each block. With q and k the blocks of query and key,

        noisy sees noisy iff k = q,    noisy sees clean iff k < q,    clean sees clean iff k <= q,

    and no clean token sees a noisy one.

    Args:
        block_ids: (B, L) number of each token's block, from the left; with a cache, those of its tokens before.
        is_noisy: (B, L) whether a token belongs to the noisy copy; None means one copy alone.
    """

    def sees(batch, head, query, key):
        of_query, of_key = block_ids[batch, query], block_ids[batch, key]
        if is_noisy is None:
            return of_key <= of_query
        noisy_query, noisy_key = is_noisy[batch, query], is_noisy[batch, key]
        return torch.where(noisy_key, noisy_query & (of_key == of_query), of_key + noisy_query.long() <= of_query)

    return sees


def attention_pattern(
    segment_ids: torch.Tensor | None = None, block_ids: torch.Tensor | None = None, is_noisy: torch.Tensor | None = None
) -> Pattern | None:
    """The pattern of packed documents, blocks and copies; None if all see all.

    `block_ids` and `is_noisy` are those of `block_pattern`.

    Args:
        segment_ids: (B, L), equal for the tokens of one document.

    Raises:
        ValueError: if `is_noisy` comes without `block_ids`.
    """
    if is_noisy is not None and block_ids is None:
        raise ValueError("is_noisy tells two copies apart and needs block_ids: pass the block of each token.")
    patterns = [] if segment_ids is None else [packed_sequence_mask_function(segment_ids)]
    if block_ids is not None:
        patterns.append(block_pattern(block_ids, is_noisy))
    if len(patterns) < 2:
        # What `and_masks` makes of one pattern, the compiler of flex attention cannot translate for a CPU.
        return patterns[0] if patterns else None
    return and_masks(*patterns)


def pattern_mask(
    pattern: Pattern, attention_mask: torch.Tensor | None, tokens: torch.Tensor, past: int = 0, is_causal: bool = False
) -> torch.Tensor:
    """The mask (B, 1, L, past + L) of a pattern, bool, for attention that takes one: eager and sdpa.

    The indices broadcast. The masks that transformers makes of a function map it over each index instead (vmap), which
    for a short row costs more than the layers do.

    Args:
        pattern: what the tokens see.
        attention_mask: (B, past + L), whether a token exists; None means all do.
        tokens: (B, L, ...), for their number and their device.
        past: number of tokens in the cache before these.
        is_causal: whether a token sees only itself and what stands before it.
    """
    (B, L), device = tokens.shape[:2], tokens.device
    batch = torch.arange(B, device=device)[:, None, None]
    query = torch.arange(past, past + L, device=device)[:, None]
    key = torch.arange(past + L, device=device)
    seen = pattern(batch, 0, query, key)
    if is_causal:
        seen = seen & (key <= query)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None].bool()
    return seen[:, None]


def shifted_neighbors(
    offsets: range, pattern: Pattern | None, attention_mask: torch.Tensor | None, tokens: torch.Tensor, past: int = 0
) -> torch.Tensor | None:
    """Whether a token may take from its neighbour in the row, for each offset: (k, B, L) bool; None if all may.

    Args:
        offsets: k distances to the neighbours, positive to the right.
        pattern: what the tokens see; None means everything.
        attention_mask: (B, past + L), whether a token exists; None means all do.
        tokens: (B, L, ...), for their number and their device.
        past: number of tokens in the cache before these.
    """
    if pattern is None and attention_mask is None:
        return None
    (B, L), device = tokens.shape[:2], tokens.device
    batch = torch.arange(B, device=device)[:, None]
    query = torch.arange(past, past + L, device=device)
    # What lies beyond the ends is zero.
    key = (query + torch.tensor([*offsets], device=device)[:, None, None]).clamp(0, past + L - 1)
    exists = None if attention_mask is None else attention_mask.bool()[batch, key]
    if pattern is None:
        return exists
    seen = pattern(batch, 0, query, key)
    return seen if exists is None else seen & exists


def neighbors_in_copies(
    offsets: range,
    pattern: Pattern,
    position_ids: torch.Tensor,
    is_noisy: torch.Tensor,
    segment_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of a token's neighbours in rows of noisy and clean copies.

    The neighbour at offset o is the token of the same document at position + o. It is that of the token's own copy if
    the token sees it, otherwise that of the clean copy. So a noisy token at the left edge of its block takes from the
    clean block before, as it does from the cache when the block is sampled by itself.

    Args:
        offsets: k distances to the neighbours, positive to the right.
        pattern: what the tokens see.
        position_ids: (B, L) position in the document, the same for both copies.
        is_noisy: (B, L) whether a token belongs to the noisy copy.
        segment_ids: (B, L) document of each token; None means one document a row.
        attention_mask: (B, L), whether a token exists; None means all do.

    Returns:
        (k, B, L) indices into the flattened (B x L) tokens, and whether there is such a token, bool.
    """
    B, L = position_ids.shape
    # One number for each document, copy and position; no two tokens share one, and neighbours follow each other.
    span = 2**31
    copies = is_noisy.long() if segment_ids is None else 2 * segment_ids + is_noisy.long()
    numbers = copies * span + position_ids
    if attention_mask is not None:
        numbers = numbers.masked_fill(~attention_mask.bool(), -span)
    ordered, order = numbers.sort(dim=-1)
    batch, query = torch.arange(B, device=numbers.device)[:, None], torch.arange(L, device=numbers.device)

    def find(wanted):
        flat = wanted.transpose(0, 1).reshape(B, -1)
        found = torch.searchsorted(ordered, flat).clamp(max=L - 1)
        exists, source = ordered.gather(1, found) == flat, order.gather(1, found)
        exists, source = (x.view(B, len(offsets), L).transpose(0, 1) for x in (exists, source))
        return source, exists & pattern(batch, 0, query, source)

    wanted = numbers + torch.tensor([*offsets], device=numbers.device)[:, None, None]
    source, allowed = find(wanted)
    clean_source, clean_allowed = find(wanted - span * is_noisy.long())
    return torch.where(allowed, source, clean_source) + batch * L, allowed | clean_allowed

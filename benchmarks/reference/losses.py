"""Losses of all families over dense logits; each takes the batch of the family's collator."""

import torch
from torch.nn.functional import one_hot, pad


def padded(batch: dict[str, torch.Tensor], block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of a batch, padded on the right to `block` columns."""
    missing = block - batch["input_ids"].shape[1]
    return pad(batch["input_ids"], (0, missing)), pad(batch["attention_mask"], (0, missing))


def _in_block(index: torch.Tensor, batch: dict[str, torch.Tensor], block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of flat indices into a batch; the columns are those of the block too."""
    width = batch["input_ids"].shape[1]
    return index // width, index % width


def _cross_entropies(logits: torch.Tensor, rows, columns, targets, dense: bool) -> torch.Tensor:
    """Cross-entropies of `targets` at (rows, columns), as a (B, L) grid that is 0 elsewhere."""
    B, L, V = logits.shape
    if not dense:
        losses = logits.logsumexp(dim=-1)
        picked = torch.zeros(B, L).index_put((rows, columns), losses[rows, columns] - logits[rows, columns, targets])
        return picked
    grid = torch.zeros(B, L, V)
    grid[rows, columns] = one_hot(targets, V).float()
    log_probabilities = logits.log_softmax(dim=-1).masked_fill(grid == 0, 0.0)
    return -(grid * log_probabilities).sum(dim=-1)


def left_to_right_loss(model, batch: dict[str, torch.Tensor], block: int, dense: bool) -> torch.Tensor:
    """Sum of the cross-entropies of the next tokens."""
    ids, mask = padded(batch, block)
    logits = model(ids, attention_mask=mask).logits.float()
    return _cross_entropies(logits, *_in_block(batch["logits_index"], batch, block), batch["target_ids"], dense).sum()


def masked_loss(model, batch: dict[str, torch.Tensor], block: int, dense: bool) -> torch.Tensor:
    """Sum of the cross-entropies of the masked tokens."""
    ids, mask = padded(batch, block)
    logits = model(ids, attention_mask=mask).logits.float()
    return _cross_entropies(logits, *_in_block(batch["logits_index"], batch, block), batch["target_ids"], dense).sum()


def diffusion_loss(model, batch: dict[str, torch.Tensor], block: int, dense: bool) -> torch.Tensor:
    """Sum of the weighted cross-entropies of the masked tokens (arXiv 2406.07524, equation 10)."""
    ids, mask = padded(batch, block)
    logits = model(ids, attention_mask=mask, alpha=batch["alpha"]).logits.float()
    losses = _cross_entropies(logits, *_in_block(batch["logits_index"], batch, block), batch["target_ids"], dense)
    return (batch["weights"] * losses.sum(dim=-1)).sum()


def insertion_loss(model, batch: dict[str, torch.Tensor], block: int, dense: bool) -> torch.Tensor:
    """Sum over the sequences of the mean of -log p(slot, token) over the dropped tokens, plus the stopping loss."""
    ids, mask = padded(batch, block)
    outputs = model(ids, attention_mask=mask)
    rows, columns = _in_block(batch["slot_index"], batch, block)
    is_slot = torch.zeros(ids.shape, dtype=torch.bool).index_put((rows, columns), torch.tensor(True))
    missing = batch["num_dropped"] > 0
    # A row that lacks nothing has no slots; whatever its softmax runs over, its loss is 0.
    logits = outputs.logits.float().masked_fill(~(is_slot | ~missing[:, None])[..., None], -torch.inf)
    at = rows[batch["target_slots"]], columns[batch["target_slots"]], batch["target_ids"]
    shares = 1.0 / batch["num_dropped"][at[0]]
    if dense:
        targets = torch.zeros_like(logits).index_put(at, shares, accumulate=True)
        log_probabilities = logits.flatten(1).log_softmax(dim=-1).view_as(logits).masked_fill(targets == 0, 0.0)
        token_losses = -(targets * log_probabilities).sum(dim=(1, 2))
    else:
        means = torch.zeros(len(ids)).index_add(0, at[0], logits[at] * shares)
        token_losses = torch.where(missing, logits.flatten(1).logsumexp(dim=-1) - means, 0.0)
    stop_losses = torch.nn.functional.cross_entropy(outputs.stop_logits.float(), missing.long(), reduction="sum")
    return token_losses.sum() + stop_losses


LOSSES = {"ilm": insertion_loss, "arlm": left_to_right_loss, "mlm": masked_loss, "mdlm": diffusion_loss}

"""The training objective of the insertion language model, on sparse targets."""

import torch
from torch import nn

from xlm_hf.modules.loss_output import LossOutput, model_inputs


class ILMLoss:
    """Cross-entropy of the dropped tokens over all (slot, token) pairs, plus the stopping loss.

    For a sequence from which n tokens were dropped, with c(i, v) the number of times that token v was dropped from
    slot i (arXiv 2505.05755, section 3),

        loss = -1/n sum_{i,v} c(i, v) log softmax(logits)_{(i, v)} + stop_loss_weight x CE(stop_logits, 1[n > 0]),

    the softmax running jointly over all slots and tokens of the sequence; with n = 0 the first term is zero. The dense
    target c is never formed: the first term is one logsumexp over the grid minus the mean logit of the dropped tokens.

    Args:
        stop_loss_weight: weight of the stopping loss.
        stop_class_weights: weights of the classes (complete, something is missing) in the stopping loss.
    """

    def __init__(self, stop_loss_weight: float = 1.0, stop_class_weights: tuple[float, float] | None = None):
        self.stop_loss_weight = stop_loss_weight
        self.stop_class_weights = stop_class_weights

    def num_items(self, batch: dict[str, torch.Tensor]) -> int:
        """Number of sequences in the batch."""
        return len(batch["num_dropped"])

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        """Sum the loss over the batch of an `ILMCollator...` (see there for its tensors).

        Returns:
            `LossOutput` whose items are sequences; its metrics are `token_loss` (mean over the sequences with a
            dropped token), `stop_loss` and `stop_accuracy`.
        """
        outputs = model(**model_inputs(batch), slot_index=batch["slot_index"], cls_index=batch["cls_index"])
        num_dropped = batch["num_dropped"]
        token_losses = self._token_losses(outputs.logits, batch)
        missing = (num_dropped > 0).long()
        stop_logits = _at_least_float32(outputs.stop_logits)
        weight = None if self.stop_class_weights is None else stop_logits.new_tensor(self.stop_class_weights)
        stop_losses = nn.functional.cross_entropy(stop_logits, missing, weight=weight, reduction="none")
        num_items = self.num_items(batch)
        return LossOutput(
            loss_sum=token_losses.sum() + self.stop_loss_weight * stop_losses.sum(),
            num_items=num_items,
            metrics={
                "token_loss": (token_losses.detach().sum(), missing.sum()),
                "stop_loss": (stop_losses.detach().sum(), num_items),
                "stop_accuracy": ((stop_logits.detach().argmax(dim=-1) == missing).sum(), num_items),
            },
        )

    def _token_losses(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """First term of the loss for each sequence, (B,), at least in float32; `logits` is (S, V)."""
        num_dropped, documents = batch["num_dropped"], batch["slot_documents"]
        logits = _at_least_float32(logits)
        # Slots of one sequence side by side: (D, most slots), so that the second logsumexp runs along a row.
        slots = logits.new_full((len(num_dropped), batch["input_ids"].shape[1]), -torch.inf)
        # Each slot stands in the column of its token, of which a sequence has no two.
        slots[documents, batch["slot_index"] % batch["input_ids"].shape[1]] = logits.logsumexp(dim=-1)
        has_target = num_dropped > 0
        normaliser = slots.masked_fill(~has_target[:, None], 0.0).logsumexp(dim=-1)
        target_documents = documents[batch["target_slots"]]
        target_logits = logits[batch["target_slots"], batch["target_ids"]]
        mean_logits = torch.zeros_like(normaliser).index_add(
            0, target_documents, target_logits / num_dropped[target_documents]
        )
        return torch.where(has_target, normaliser - mean_logits, 0.0)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

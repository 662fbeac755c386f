"""The training objective of the insertion language model, on sparse targets."""

from functools import partial

import torch
from torch import nn

from xlm_hf.objectives.head_operator import linear_cross_entropy
from xlm_hf.objectives.loss_output import LossOutput, model_inputs


class ILMLoss:
    """Cross-entropy of the dropped tokens over all (slot, token) pairs, plus the stopping loss.

    For a sequence from which n tokens were dropped, with c(i, v) the number of times that token v was dropped from
    slot i (arXiv 2505.05755, section 3),

        loss = -1/n sum_{i,v} c(i, v) log softmax(logits)_{(i, v)} + stop_loss_weight x CE(stop_logits, 1[n > 0]),

    the softmax running jointly over all slots and tokens of the sequence; with n = 0 the first term is zero. The dense
    target c is never formed: the first term is one logsumexp over the grid minus the mean logit of the dropped tokens.

    Args:
        stop_loss_weight: weight of the stopping loss.
        stop_class_weights: weights of the classes (complete, something is missing) in the stopping loss. Where the
            stopping head has more classes, the class is min(n, num_missing_classes - 1).
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
        num_dropped, documents, slots = batch["num_dropped"], batch["slot_documents"], batch["target_slots"]
        joint_cross_entropy = partial(
            linear_cross_entropy,
            target_ids=batch["target_ids"],
            target_weights=1 / num_dropped[documents[slots]],
            target_rows=slots,
            groups=documents,
        )
        outputs = model(
            **model_inputs(batch),
            slot_index=batch["slot_index"],
            cls_index=batch["cls_index"],
            head_function=joint_cross_entropy,
        )
        if outputs.stop_logits is None:
            raise ValueError("num_missing_classes is 0: a model without a stopping head cannot be trained; choose 2.")
        token_loss = outputs.head_output.loss_sum
        missing = num_dropped > 0
        stop_class = num_dropped.clamp(max=outputs.stop_logits.shape[-1] - 1)
        stop_logits = outputs.stop_logits.to(torch.promote_types(outputs.stop_logits.dtype, torch.float32))
        stop_losses = nn.functional.cross_entropy(stop_logits, stop_class, reduction="none")
        if self.stop_class_weights is not None:
            complete, incomplete = self.stop_class_weights
            stop_losses = stop_losses * torch.where(missing, incomplete, complete)
        num_items = self.num_items(batch)
        return LossOutput(
            loss_sum=token_loss + self.stop_loss_weight * stop_losses.sum(),
            num_items=num_items,
            metrics={
                "token_loss": (token_loss.detach(), missing.sum()),
                "stop_loss": (stop_losses.detach().sum(), num_items),
                "stop_accuracy": ((stop_logits.detach().argmax(dim=-1) == stop_class).sum(), num_items),
            },
        )

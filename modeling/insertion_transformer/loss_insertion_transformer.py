"""The training objective of the Insertion Transformer, on sparse targets."""

from functools import partial

import torch
from torch import nn

from xlm_hf.objectives.head_operator import IGNORED_ID, linear_cross_entropy
from xlm_hf.objectives.loss_output import LossOutput, model_inputs


class InsertionTransformerLoss:
    """Cross-entropy of what each slot lacks, or of `[EOS]` if it lacks nothing, each slot with a softmax of its own.

    For a sequence with K slots, of which slot l lacks the tokens x_{l,i} with weights w_{l,i} that sum to 1 (arXiv
    1902.03249),

        loss = -1/K sum_l sum_i w_{l,i} log softmax(logits_l)_{x_{l,i}},

    where a slot that lacks nothing has the one target `[EOS]`. The weights are the collator's: uniform, or those of a
    balanced binary tree. This is no bound on a likelihood.
    """

    def num_items(self, batch: dict[str, torch.Tensor]) -> int:
        """Number of sequences in the batch."""
        return len(batch["num_dropped"])

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        """Sum the loss over the batch of an `InsertionTransformerCollator` (see there for its tensors).

        Returns:
            `LossOutput` whose items are sequences. Its metric is `slot_accuracy`, the share of the slots whose most
            probable token is one of their targets.
        """
        slots, ids = batch["target_slots"], batch["target_ids"]
        # Each slot is a group of its own, which may have any number of targets.
        cross_entropy = partial(
            linear_cross_entropy,
            target_ids=ids,
            target_weights=batch["target_weights"],
            target_rows=slots,
            groups=torch.arange(len(batch["slot_index"]), device=slots.device),
        )
        outputs = model(**model_inputs(batch), logits_index=batch["slot_index"], head_function=cross_entropy)
        loss_sum, _, correct = outputs.head_output
        marks = torch.stack((correct, ids != IGNORED_ID)).float()
        right, known = (marks.new_zeros(2, len(batch["slot_index"])).index_add(1, slots, marks) > 0).sum(dim=1)
        return LossOutput(loss_sum, self.num_items(batch), metrics={"slot_accuracy": (right, known)})

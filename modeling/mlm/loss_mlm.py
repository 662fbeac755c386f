"""The training objective of the masked language model."""

from functools import partial

import torch
from torch import nn

from xlm_hf.objectives.head_operator import linear_cross_entropy
from xlm_hf.objectives.loss_output import LossOutput, model_inputs


class MLMLoss:
    """Cross-entropy of the masked tokens.

    Over the masked positions M of all sequences,

        loss = sum_{i in M} -log softmax(logits_i)_{x_i},    items = |M|,

    so that the trainer minimises the mean over the masked tokens of a whole optimiser step. There is no weight 1/t: a
    sequence counts by how much of it was masked, and the loss is no bound on a likelihood.
    """

    def num_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number of masked tokens in the batch."""
        return (batch["target_ids"] >= 0).sum()

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        """Sum the loss over the batch of an `MLMCollator...` (see there for its tensors).

        Returns:
            `LossOutput` whose items are masked tokens; its metric is `masked_accuracy`, the share of them that
            none is more probable than.
        """
        cross_entropy = partial(linear_cross_entropy, target_ids=batch["target_ids"])
        outputs = model(**model_inputs(batch), logits_index=batch["logits_index"], head_function=cross_entropy)
        num_items = self.num_items(batch)
        return LossOutput(
            loss_sum=outputs.head_output.loss_sum,
            num_items=num_items,
            metrics={"masked_accuracy": (outputs.head_output.correct.sum(), num_items)},
        )

"""The training objective of the masked language model."""

from functools import partial

import torch
from torch import nn

from xlm_hf.objectives.head_operator import IGNORED_ID, linear_cross_entropy
from xlm_hf.objectives.loss_output import LossOutput, model_inputs


class MLMLoss:
    """Cross-entropy of the masked tokens.

    Over the masked positions M of all sequences,

        loss = sum_{i in M} -log softmax(logits_i)_{x_i},    items = |M|,

    so that the trainer minimises the mean over the masked tokens of a whole optimiser step. There is no weight 1/t: a
    sequence counts by how much of it was masked, and the loss is no bound on a likelihood.

    Where the model predicts lengths (mask-predict, arXiv 1904.09324), -log p(L) of the length of each canvas is added.
    Then there is a bound for a text x of L tokens, of which k ~ U{1..L} are masked:

        -log p(x | prompt) <= -log p(L | prompt) + E[ L / k x sum over masked l of -log p(x_l | what is not masked) ].

    With `mask_beta` k has another law and L / k is reweighted, so that the bound stays.

    Args:
        length_loss_weight: factor of the length's loss in what is trained. A length counts like one token; the
            published factor of 0.1 is between a mean over texts and a mean over masked tokens.
    """

    def __init__(self, length_loss_weight: float = 1.0):
        if not 0 <= length_loss_weight < float("inf"):
            raise ValueError(f"length_loss_weight must be at least 0 and finite, and is {length_loss_weight}.")
        self.length_loss_weight = length_loss_weight

    def num_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number of masked tokens in the batch."""
        return (batch["target_ids"] >= 0).sum()

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        """Sum the loss over the batch of an `MLMCollator...` (see there for its tensors).

        Returns:
            `LossOutput` whose items are masked tokens. Its metrics:
                masked_accuracy: share of them that none is more probable than.
                length_cross_entropy, length_accuracy: of the lengths, and sequence_nelbo: nats per document of the
                    bound, all three where the model predicts lengths.
        """
        cross_entropy = partial(linear_cross_entropy, target_ids=batch["target_ids"])
        inputs = {**model_inputs(batch), "logits_index": batch["logits_index"]}
        if "length_index" in batch:
            inputs["length_index"] = batch["length_index"]
        outputs = model(**inputs, head_function=cross_entropy)
        (loss_sum, losses, correct), num_items = outputs.head_output, self.num_items(batch)
        result = LossOutput(loss_sum, num_items, {"masked_accuracy": (correct.sum(), num_items)})
        return self._with_lengths(result, losses, outputs.length_logits, batch) if "length_index" in batch else result

    def _with_lengths(self, result: LossOutput, losses, length_logits, batch: dict[str, torch.Tensor]) -> LossOutput:
        """The same with the loss of the lengths, and the bound."""
        targets, weights, documents = batch["length_targets"], batch["weights"], batch["target_documents"]
        of_lengths = nn.functional.cross_entropy(length_logits, targets, ignore_index=IGNORED_ID, reduction="none")
        right, num_lengths = (length_logits.argmax(dim=-1) == targets).sum(), (targets >= 0).sum()
        nats = torch.zeros_like(weights).index_add(0, documents, (weights[documents] * losses).to(weights.dtype))
        nats = nats.index_add(0, batch["length_documents"], of_lengths.detach())
        result.loss_sum = result.loss_sum + self.length_loss_weight * of_lengths.sum()
        result.metrics |= {
            "length_cross_entropy": (of_lengths.detach().sum(), num_lengths),
            "length_accuracy": (right, num_lengths),
            "sequence_nelbo": (nats.sum(), len(nats)),
        }
        result.sequence_nats, result.sequence_tokens = nats, batch["sequence_tokens"]
        return result

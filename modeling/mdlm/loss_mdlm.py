"""The training objective of the masked diffusion language model: the bound on the negative log-likelihood."""

from functools import partial

import torch
from torch import nn

from xlm_hf.objectives.head_operator import linear_cross_entropy
from xlm_hf.objectives.loss_output import LossOutput, model_inputs


class MDLMLoss:
    """Weighted cross-entropy of the masked tokens, an estimate of a bound on the negative log-likelihood.

    For a canvas x of L tokens (arXiv 2406.07524, equation 10),

        -log p(x | prompt) <= NELBO = E_t[ -alpha'_t / (1 - alpha_t) x sum over masked l of -log p(x_l | x_t, prompt) ].

    The collator draws t and the masks and gives the weight of each document, so that the sum here is an unbiased
    estimate of the NELBO of the batch. Training divides it by all canvas tokens, masked or not. A likelihood is per
    token of the text and its end (`sequence_tokens`): the padding of the canvas adds nats and no tokens. With its
    `mask_beta` the sum weighs every masked token alike and is no bound; `sequence_nats` still is the bound.
    """

    def num_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number of canvas tokens in the batch."""
        return batch["canvas_lengths"].sum()

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        """Sum the loss over the batch of an `MDLMCollator...` (see there for its tensors).

        Returns:
            `LossOutput` whose items are canvas tokens. Its metrics:
                masked_cross_entropy, masked_accuracy: over the masked tokens, without weights.
                sequence_nelbo: nats per document.
        """
        weights, documents = batch["weights"], batch["target_documents"]
        loss_weights, num_masked = batch.get("loss_weights", weights)[documents], (batch["target_ids"] >= 0).sum()
        cross_entropy = partial(linear_cross_entropy, target_ids=batch["target_ids"], target_weights=loss_weights)
        inputs = {**model_inputs(batch), "alpha": batch["alpha"], "logits_index": batch["logits_index"]}
        loss_sum, losses, correct = model(**inputs, head_function=cross_entropy).head_output
        nelbo = torch.zeros_like(weights).index_add(0, documents, (weights[documents] * losses).to(weights.dtype))
        return LossOutput(
            loss_sum=loss_sum,
            num_items=self.num_items(batch),
            metrics={
                "masked_cross_entropy": (losses.sum(), num_masked),
                "masked_accuracy": (correct.sum(), num_masked),
                "sequence_nelbo": (nelbo.sum(), len(weights)),
            },
            sequence_nats=nelbo,
            sequence_tokens=batch["sequence_tokens"],
            sequence_given={"length": batch["given_length"]},
        )

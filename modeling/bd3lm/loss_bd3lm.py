"""The training objective of block diffusion: the bound on the negative log-likelihood, block by block."""

from functools import partial
from typing import Any

import torch
from torch import nn

from xlm_hf.objectives.head_operator import linear_cross_entropy
from xlm_hf.objectives.loss_output import LossOutput, model_inputs


class BD3LMLoss:
    """Weighted cross-entropy of the masked tokens, an estimate of a bound on the negative log-likelihood.

    For a canvas of blocks x^1 .. x^n, of which block b has B_b tokens, k_b of them masked (arXiv 2503.09573, equation 8
    with k in place of the time),

        -log p(x | prompt) <= sum over b of E_k[ B_b / k_b x sum over masked l of -log p(x_l | x_k^b, x^<b, prompt) ].

    The collator draws the masks and gives the weight of each block, so that the sum here is an unbiased estimate of the
    bound of the batch. Training divides it by all canvas tokens, masked or not. A likelihood is per token of the text
    and its end (`sequence_tokens`): the padding of the last block adds nats and no tokens. With the collator's
    `mask_beta` or `mask_range` what is trained is another sum and no bound; the first still reports the bound, by
    importance weights, the second reports none.
    """

    def num_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number of canvas tokens in the batch."""
        return batch["canvas_lengths"].sum()

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        """Sum the loss over the batch of a `BD3LMCollator` (see there for its tensors).

        Returns:
            `LossOutput` whose items are canvas tokens. Its metrics:
                masked_cross_entropy, masked_accuracy: over the masked tokens, without weights.
                sequence_nelbo: nats per document, where the batch has the weights of the bound.
        """
        weights, blocks = batch.get("weights"), batch["target_blocks"]
        of_loss = batch["loss_weights"] if "loss_weights" in batch else batch["weights"]
        loss_weights, num_masked = of_loss[blocks], (batch["target_ids"] >= 0).sum()
        cross_entropy = partial(linear_cross_entropy, target_ids=batch["target_ids"], target_weights=loss_weights)
        copies = {name: batch[name] for name in ("block_ids", "is_noisy") if name in batch}
        inputs: Any = {**model_inputs(batch), **copies, "logits_index": batch["logits_index"]}
        loss_sum, losses, correct = model(**inputs, head_function=cross_entropy).head_output
        output = LossOutput(
            loss_sum=loss_sum,
            num_items=self.num_items(batch),
            metrics={
                "masked_cross_entropy": (losses.sum(), num_masked),
                "masked_accuracy": (correct.sum(), num_masked),
            },
        )
        if weights is not None:
            nats = torch.zeros_like(batch["canvas_lengths"], dtype=weights.dtype)
            nelbo = nats.index_add(0, batch["block_documents"][blocks], (weights[blocks] * losses).to(weights.dtype))
            output.metrics["sequence_nelbo"] = (nelbo.sum(), len(nelbo))
            output.sequence_nats, output.sequence_tokens = nelbo, batch["sequence_tokens"]
        return output

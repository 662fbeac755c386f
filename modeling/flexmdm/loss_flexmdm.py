"""The training objective of flexible masked diffusion: the tight bound on the negative log-likelihood."""

from functools import partial

import torch
from torch import Tensor, nn

from xlm_hf.objectives.head_operator import linear_cross_entropy
from xlm_hf.objectives.loss_output import LossOutput, model_inputs


class FlexMDMLoss:
    """Cross-entropy of the masks and a Poisson deviance of the gaps, each weighted by the hazard of its schedule.

    With h_b and h_a the hazards of the unmasking and the insertion schedule, c the number of tokens missing in a gap
    and n its prediction,

        -log p(x | prompt) <= E_t[ h_b sum over masks of -log p(x_l | x_t) + h_a sum over gaps of (n - c - c log n) ],

    with equality for every text at the exact conditionals, n = E[c | x_t, t] among them. (arXiv 2509.01025, equation 9,
    adds c log c for each gap: terms that are never negative, of a sum that is looser by about 1.2 nats a token.) The
    collator draws t and the state, and gives the weights. A text that ends pays for its length here, so the bound is
    per token of the text and its end.

    With the collator's `noise_beta` every mask and every gap counts 1, and the sum is no bound; `sequence_nats` still
    is. The head "distribution" is trained by the cross-entropy of c in place of the deviance; the bound takes its mean.
    """

    def num_items(self, batch: dict[str, Tensor]) -> Tensor:
        """Number of tokens of the texts and their ends; in infilling of the hidden tokens."""
        return batch["sequence_tokens"].sum()

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        """Sum the loss over the batch of a `FlexMDMCollator` (see there for its tensors).

        Returns:
            `LossOutput` whose items are tokens. Its metrics:
                masked_cross_entropy, masked_accuracy: over the masks, without weights.
                gap_deviance: n - c - c log n + c log c, which is 0 where n = c, over the gaps, without weights.
                sequence_nelbo: nats per document, the bound above.
        """
        documents, of_gaps, counts = batch["target_documents"], batch["gap_documents"], batch["gap_counts"]
        for_masks, for_gaps = batch["unmasking_weights"], batch["insertion_weights"]
        loss_weights = batch.get("loss_weights")
        token_weights = (for_masks if loss_weights is None else loss_weights)[documents]
        cross_entropy = partial(linear_cross_entropy, target_ids=batch["target_ids"], target_weights=token_weights)
        inputs = {name: batch[name] for name in ("times", "logits_index", "gap_index")}
        outputs = model(**model_inputs(batch), **inputs, head_function=cross_entropy)
        token_loss, losses, correct = outputs.head_output
        is_gap = counts >= 0
        counts = counts.clamp(min=0)
        tight = _poisson_losses(outputs.expected_counts, counts).where(is_gap, 0.0)
        trained = tight
        if outputs.count_logits is not None:
            classes = counts.clamp(max=outputs.count_logits.shape[-1] - 1)
            trained = nn.functional.cross_entropy(outputs.count_logits, classes, reduction="none").where(is_gap, 0.0)
        gap_loss = ((for_gaps if loss_weights is None else loss_weights)[of_gaps] * trained).sum()
        tight = tight.detach()
        of_masks = torch.zeros_like(for_masks).index_add(0, documents, losses.to(for_masks.dtype))
        nelbo = for_masks * of_masks + for_gaps * torch.zeros_like(for_gaps).index_add(0, of_gaps, tight.to(for_gaps))
        num_masks, num_gaps = (batch["target_ids"] >= 0).sum(), is_gap.sum()
        exact = torch.special.xlogy(counts, counts).where(is_gap, 0.0).sum()
        return LossOutput(
            loss_sum=token_loss + gap_loss,
            num_items=self.num_items(batch),
            metrics={
                "masked_cross_entropy": (losses.sum(), num_masks),
                "masked_accuracy": (correct.sum(), num_masks),
                "gap_deviance": (tight.sum() + exact, num_gaps),
                "sequence_nelbo": (nelbo.sum(), len(nelbo)),
            },
            sequence_nats=nelbo,
            sequence_tokens=batch["sequence_tokens"],
            sequence_given={"open_gaps": batch["open_gaps"]},
        )


def _poisson_losses(expected: Tensor, counts: Tensor) -> Tensor:
    """N - c - c log n of gaps with counts c and expected counts n."""
    # A mean of probabilities can be as small as float32 gets.
    return expected - counts - torch.special.xlogy(counts, expected.clamp(min=torch.finfo(expected.dtype).tiny))

"""The training objective of GIDD: the bound on the negative log-likelihood, or one with other weights."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xlm_hf.objectives.head_operator import head_losses
from xlm_hf.objectives.loss_output import LossOutput, model_inputs
from xlm_hf.objectives.row_functions import CrossEntropy, HybridBound, RowFunction


@dataclass
class Denoising(CrossEntropy):
    """`CrossEntropy` of the token by all positions, its own included, that follows from the prediction by the others.

    Attributes:
        noisy_ids: (S,) z.
        evidence: (S,) log q(z | x = z) - log q(z | another x), which is 0 at masks.
    """

    noisy_ids: Tensor
    evidence: Tensor

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        logits.scatter_add_(1, self.noisy_ids[:, None], self.evidence[:, None].to(logits.dtype))
        return super().losses_and_gradient_(logits, num_ids)


class GIDDLoss:
    """The rate of the bound at a random time, summed over the positions of the canvas.

    For a canvas x of L tokens with noise z at time t (arXiv 2503.04482, theorem 1),

        -log p(x | prompt) <= NELBO = E_t[ sum over l of w_t(z_l, x_l) (KL(q_t || p_t) + r - 1 - log r) ],

    the last factor being `HybridBound` of the prediction of x_l. The collator draws t and z and gives the weight of
    each token, so that the sum here is an unbiased estimate of the NELBO of the batch; t runs from pure noise to the
    text, so there is no prior and no reconstruction term. Training divides it by the canvas tokens. A likelihood is per
    token of the text and its end (`sequence_tokens`): the padding of the canvas adds nats and no tokens. With the
    weights "clip", "dynamic" or "even" of the collator the sum is no bound; `sequence_nats` still is. With "denoising"
    it is the cross-entropy -log p(x_l | z) at every position alike, and no likelihood is reported. By Bayes' rule
    p(x_l | z) is proportional to the prediction of x_l, by the other positions, times q_t(z_l | x_l); so the best
    prediction is the same.

    Without uniform noise the last factor is alpha_t times the cross-entropy at masks, and the NELBO that of MDLM.
    """

    def num_items(self, batch: dict[str, Tensor]) -> Tensor:
        """Number of canvas tokens in the batch."""
        return batch["canvas_lengths"].sum()

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        """Sum the loss over the batch of a `GIDDCollator` (see there for its tensors).

        Returns:
            `LossOutput` whose items are canvas tokens. Its metrics:
                accuracy: share of the canvas tokens that are the most probable ones.
                sequence_nelbo: nats per document; but with "denoising"
                denoising_cross_entropy: over the canvas tokens.
        """
        targets, index, documents = (batch[name] for name in ("target_ids", "logits_index", "target_documents"))
        inputs: Any = {**model_inputs(batch), "timesteps": batch["timesteps"], "logits_index": index}
        if "is_given" in batch:
            inputs["is_given"] = batch["is_given"]
        config: Any = getattr(model, "module", model).config
        head_function = partial(head_losses, row_function=self._row_function(model, batch))
        loss_sum, losses, correct = model(**inputs, head_function=head_function).head_output
        num_items, lengths = self.num_items(batch), batch["canvas_lengths"]
        output = LossOutput(loss_sum, num_items, {"accuracy": (correct.sum(), (targets >= 0).sum())})
        if "weights" not in batch:
            output.metrics["denoising_cross_entropy"] = (losses.sum(), num_items)
            return output
        rates = batch["weights"] * losses * (1.0 if config.uniform_share > 0 else batch["alpha"][documents])
        nelbo = torch.zeros_like(batch["alpha"]).index_add(0, documents, rates.to(batch["alpha"].dtype))
        output.metrics["sequence_nelbo"] = (nelbo.sum(), len(lengths))
        output.sequence_nats, output.sequence_tokens = nelbo, batch["sequence_tokens"]
        output.sequence_given = {"length": batch["given_length"]}
        return output

    def _row_function(self, model: nn.Module, batch: dict[str, Tensor]) -> RowFunction:
        """The loss of each canvas token."""
        config: Any = getattr(model, "module", model).config
        documents = batch["target_documents"]
        targets, weights = batch["target_ids"], batch["loss_weights" if "loss_weights" in batch else "weights"]
        noisy_ids = batch["input_ids"].flatten()[batch["logits_index"]]
        alpha, uniform = batch["alpha"][documents], batch["uniform"][documents]
        if "weights" not in batch:
            evidence = torch.log1p(alpha / uniform).masked_fill(noisy_ids == config.mask_token_id, 0.0)
            return Denoising(targets, weights, noisy_ids, evidence)
        if config.uniform_share > 0:
            return HybridBound(targets, weights, noisy_ids, alpha, uniform)
        return CrossEntropy(targets, weights * alpha)

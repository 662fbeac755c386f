"""The training objective of score entropy diffusion: the bound on the negative log-likelihood by free scores."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xlm_hf.objectives.head_operator import head_losses
from xlm_hf.objectives.loss_output import LossOutput, model_inputs
from xlm_hf.objectives.row_functions import RowFunction


@dataclass
class ScoreEntropy(RowFunction):
    """Score entropy of free scores s_y = exp(logit_y + offset) > 0 (arXiv 2310.16834, definition 3.3).

        loss = sum_{y != z} [s_y - R_y log s_y + R_y (log R_y - 1)],

    over the ids that are not suppressed. R_y, the true ratio of the probabilities of y and z, is one number at the
    target x and another at all other ids. Where z is a mask it is suppressed, and R_y = 0 but for x.

    Attributes:
        noisy_ids: (S,) z.
        target_ratios: (S,) R_x; not used where z = x.
        ratios: (S,) R_y of all other ids.
        offsets: (S,) added to the logits.
    """

    noisy_ids: Tensor
    target_ratios: Tensor
    ratios: Tensor
    offsets: Tensor

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        ids, noisy_ids, weights = self.target_ids[:, None], self.noisy_ids[:, None], self.weights[:, None]
        ratios, is_kept = self.ratios.to(logits.dtype)[:, None], ids == noisy_ids
        target_ratios = self.target_ratios.to(logits.dtype)[:, None].where(~is_kept, ratios)
        logits.add_(self.offsets.to(logits.dtype)[:, None])
        has_z = logits.gather(1, noisy_ids) > -torch.inf
        # The score of z is 1; it counts among the largest, and then no more.
        logits.scatter_(1, noisy_ids, torch.where(has_z, 0.0, -torch.inf).to(logits.dtype))
        correct = logits.gather(1, ids) >= logits.amax(dim=-1, keepdim=True)
        logits.scatter_(1, noisy_ids, -torch.inf)
        counted = logits > -torch.inf
        more = target_ratios - ratios
        losses = -(more * logits.gather(1, ids)).where(~is_kept, 0.0)
        losses -= ratios * logits.where(counted, 0.0).sum(dim=-1, keepdim=True)
        losses += logits.exp_().sum(dim=-1, keepdim=True)
        num_others = num_ids - has_z.to(logits.dtype)
        losses += num_others * _least(ratios) + _least(target_ratios) - _least(ratios)
        logits.sub_(counted * ratios).scatter_add_(1, ids, -more).mul_(weights)
        return losses[:, 0], correct[:, 0]


def _least(ratios: Tensor) -> Tensor:
    """R (log R - 1), which makes a term of the score entropy 0 where s = R."""
    return torch.special.xlogy(ratios, ratios) - ratios


@dataclass
class MaskScores(RowFunction):
    """Score entropy at a mask over alpha / (1 - alpha): with s_y = p_y alpha / (1 - alpha), sum_y p_y - 1 - log p_x.

    It is at least the cross-entropy of p / sum p, and equal to it where p sums to 1. Over 1 - alpha it is the rate of
    the bound in the time 1 - alpha.

    Attributes:
        noise: (S,) 1 - alpha, in (0, 1].
    """

    noise: Tensor
    is_scaled: ClassVar[bool] = True

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        one = torch.ones_like(self.noise)
        offsets = -torch.log(num_ids * one)
        if not self.is_scaled:
            offsets = self.noise.log() - torch.log1p(-self.noise.clamp(max=1 - torch.finfo(self.noise.dtype).eps))
        # No id stands there: one that is suppressed has no score.
        absent = logits.argmin(dim=-1)
        kind = ScoreEntropy(self.target_ids, self.weights, absent, one, torch.zeros_like(one), offsets)
        return kind.losses_and_gradient_(logits, num_ids)


@dataclass
class RawMaskScores(MaskScores):
    """`MaskScores` of log s = logits."""

    is_scaled: ClassVar[bool] = False


@dataclass
class NoiseScores(RowFunction):
    """Score entropy at a token of uniform noise over N alpha: the rate of the bound in the time 1 - alpha.

    With log s = logits kappa / (1 + kappa), kappa = N alpha / (1 - alpha); and true ratios (1 + kappa) at the clean
    token and 1 elsewhere, over that of the token which stands there.

    Attributes:
        noisy_ids: (S,) z.
        noise: (S,) 1 - alpha, in (0, 1].
    """

    noisy_ids: Tensor
    noise: Tensor
    is_scaled: ClassVar[bool] = True

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        noise, is_kept = self.noise.to(logits.dtype), self.target_ids == self.noisy_ids
        # At alpha = 0 the rate is 0; near it alpha cancels.
        alpha = (1 - noise).clamp(min=torch.finfo(noise.dtype).eps)
        kappa = num_ids * alpha / noise
        scales = kappa / (1 + kappa) if self.is_scaled else torch.ones_like(kappa)
        ratios = torch.where(is_kept, 1 / (1 + kappa), 1.0)
        rates = 1 / (num_ids * alpha)
        # An id that is suppressed stays at -inf.
        logits.mul_(scales[:, None])
        of_rows = (self.noisy_ids, 1 + kappa, ratios, torch.zeros_like(kappa))
        kind = ScoreEntropy(self.target_ids, self.weights * rates * scales, *of_rows)
        losses, correct = kind.losses_and_gradient_(logits, num_ids)
        return rates * losses, correct


@dataclass
class RawNoiseScores(NoiseScores):
    """`NoiseScores` of log s = logits."""

    is_scaled: ClassVar[bool] = False


class SEDDLoss:
    """The score entropy at a random time, summed over the positions of the canvas.

    For a canvas x of L tokens with noise z at time t (arXiv 2310.16834, equation 9 and theorem 3.6),

        -log p(x | prompt) <= NELBO = E_t[ sigma'_t x sum over l of the score entropy at l ],    sigma = -log alpha.

    With masks it is sigma' / (e^sigma - 1) x `MaskScores` at every mask, with uniform noise sigma' / N x the score
    entropy of N - 1 ratios at every position. The collator draws t and z and gives the weight of each document, so that
    the sum here is an unbiased estimate of the NELBO of the batch; t runs from pure noise to the text, so there is no
    prior and no reconstruction term. Training divides it by the canvas tokens. A likelihood is per token of the text
    and its end (`sequence_tokens`). With the collator's `noise_beta` the sum weighs all targets alike and is no bound;
    `sequence_nats` still is the bound.
    """

    def num_items(self, batch: dict[str, Tensor]) -> Tensor:
        """Number of canvas tokens in the batch."""
        return batch["canvas_lengths"].sum()

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        """Sum the loss over the batch of a `SEDDCollator` (see there for its tensors).

        Returns:
            `LossOutput` whose items are canvas tokens. Its metrics:
                accuracy: share of the targets whose score is the largest.
                sequence_nelbo: nats per document; not with scores whose bound is infinite (`SEDDConfig.scaled_scores`).
        """
        documents, index, targets = (batch[f"{name}"] for name in ("target_documents", "logits_index", "target_ids"))
        wrapped: Any = model
        config = getattr(wrapped, "module", wrapped).config
        noise, weights = batch["noise"][documents], batch["weights"]
        of_loss = batch.get("loss_weights", weights)[documents]
        if config.kernel == "absorb":
            row_function: RowFunction = (MaskScores if config.scaled_scores else RawMaskScores)(targets, of_loss, noise)
        else:
            noisy_ids = batch["input_ids"].flatten()[index]
            kind = NoiseScores if config.scaled_scores else RawNoiseScores
            row_function = kind(targets, of_loss, noisy_ids, noise)
        inputs: Any = {**model_inputs(batch), "alpha": batch["alpha"], "logits_index": index}
        if "is_given" in batch:
            inputs["is_given"] = batch["is_given"]
        head_function = partial(head_losses, row_function=row_function)
        loss_sum, losses, correct = model(**inputs, head_function=head_function).head_output
        output = LossOutput(loss_sum, self.num_items(batch), {"accuracy": (correct.sum(), (targets >= 0).sum())})
        if config.kernel == "absorb" or config.scaled_scores:
            nelbo = torch.zeros_like(weights).index_add(0, documents, (weights[documents] * losses).to(weights.dtype))
            output.metrics["sequence_nelbo"] = (nelbo.sum(), len(nelbo))
            output.sequence_nats, output.sequence_tokens = nelbo, batch["sequence_tokens"]
            output.sequence_given = {"length": batch["given_length"]}
        return output

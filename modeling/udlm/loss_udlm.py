"""The training objective of uniform diffusion: the bound on the negative log-likelihood, or denoising."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xlm_hf.objectives.head_operator import head_losses
from xlm_hf.objectives.loss_output import LossOutput, model_inputs
from xlm_hf.objectives.row_functions import CrossEntropy, HybridBound, RowFunction

from .curriculum_udlm import gaussian_tokens


def add_own_evidence_(logits: Tensor, noisy_ids: Tensor, noise: Tensor, num_ids: int, sign: int) -> None:
    """Add sign x log(1 + N alpha / (1 - alpha)) to the logit of each row's own noisy token, 1 - alpha being `noise`.

    This turns the prediction by the other positions into the one by all of them, and with sign -1 back.
    """
    evidence = torch.log1p(num_ids * (1 - noise) / noise).to(logits.dtype)
    logits.scatter_add_(1, noisy_ids[:, None], sign * evidence[:, None])


@dataclass
class UniformBound(RowFunction):
    """The rate of uniform diffusion's bound, in the noise time t = 1 - alpha (arXiv 2412.10193, equation 16).

    A token is itself with probability alpha, and else any of the N ids that are not suppressed. This is `HybridBound`
    with u = (1 - alpha) / N, times rho(z) / q(z) = 1 / (N alpha q(z)). Integrated over t from 0 to 1 it bounds the
    negative log-likelihood of the row's token, if softmax(logits) does not look at the row's own z.

    Attributes:
        noisy_ids: (S,) z.
        noise: (S,) t in (0, 1]; not alpha, which float32 rounds to 1 before the noise is gone.
    """

    noisy_ids: Tensor
    noise: Tensor

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        noise = self.noise.to(logits.dtype)
        # At alpha = 0 the rate is 0; near it alpha cancels.
        alpha = (1 - noise).clamp(min=torch.finfo(noise.dtype).eps)
        rates = 1 / (alpha * (num_ids * alpha + noise).where(self.target_ids == self.noisy_ids, noise))
        bound = HybridBound(self.target_ids, self.weights * rates, self.noisy_ids, alpha, noise / num_ids)
        losses, correct = bound.losses_and_gradient_(logits, num_ids)
        return rates * losses, correct


@dataclass
class DenoiserBound(UniformBound):
    """`UniformBound` of the leave-one-out prediction that follows from a denoiser's logits."""

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        add_own_evidence_(logits, self.noisy_ids, self.noise, num_ids, sign=-1)
        return super().losses_and_gradient_(logits, num_ids)


@dataclass
class LeaveOneOutCrossEntropy(CrossEntropy):
    """`CrossEntropy` of the denoiser that follows from the leave-one-out logits.

    Attributes:
        noisy_ids: (S,) z.
        noise: (S,) 1 - alpha, in (0, 1].
    """

    noisy_ids: Tensor
    noise: Tensor

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        add_own_evidence_(logits, self.noisy_ids, self.noise, num_ids, sign=1)
        return super().losses_and_gradient_(logits, num_ids)


class UDLMLoss:
    """The rate of the bound at a random time, summed over the positions of the canvas.

    For a canvas x of L tokens with noise z at time t (arXiv 2412.10193, equation 16; 2506.10892, equation 12),

        -log p(x | prompt) <= NELBO = E_t[ -alpha'_t x sum over l of f(x_l, z_l, x_theta,l) ],

    f being `UniformBound` of the leave-one-out prediction x_theta,l. The collator draws t and z and gives the weight of
    each document, so that the sum here is an unbiased estimate of the NELBO of the batch; t runs from pure noise to the
    text, so there is no prior and no reconstruction term. Training divides it by the canvas tokens. A likelihood is per
    token of the text and its end (`sequence_tokens`): the padding of the canvas adds nats and no tokens.

    Two batches train on something else, and report no likelihood. With `noise_beta` the loss is the cross-entropy of
    the denoiser, -log p(x_l | z), at every position alike; its minimiser is the same. With the `curriculum` the network
    is shown soft tokens (`curriculum_udlm.py`), and f is integrated over a part of the times.
    """

    def num_items(self, batch: dict[str, Tensor]) -> Tensor:
        """Number of canvas tokens in the batch."""
        return batch["canvas_lengths"].sum()

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        """Sum the loss over the batch of a `UDLMCollator` (see there for its tensors).

        Returns:
            `LossOutput` whose items are canvas tokens. Its metrics:
                accuracy: share of the canvas tokens that are the most probable ones; of the denoiser with `noise_beta`,
                    and else of the leave-one-out prediction.
                sequence_nelbo: nats per document, where the batch has the weights of the bound.
                denoising_cross_entropy: over the canvas tokens, where that is the loss.
        """
        documents, index, targets = (batch[f"{name}"] for name in ("target_documents", "logits_index", "target_ids"))
        config = _config(model)
        noise, weights = batch["noise"][documents], batch.get("weights")
        inputs: Any = {**model_inputs(batch), "alpha": batch["alpha"], "logits_index": index}
        if "is_given" in batch:
            inputs["is_given"] = batch["is_given"]
        noisy_ids = batch["input_ids"].flatten()[index]
        if "noise_keys" in batch:
            noisy_ids, inputs["soft_tokens"] = _soft_tokens(config, batch, noisy_ids)
        is_denoiser = config.prediction_type == "denoiser"
        of_loss = batch["loss_weights"] if weights is None else weights
        given = (targets, of_loss[documents])
        if weights is None and "noise_keys" not in batch:
            row_function: RowFunction = CrossEntropy(*given)
            if not is_denoiser:
                row_function = LeaveOneOutCrossEntropy(*given, noisy_ids, noise)
        else:
            row_function = (DenoiserBound if is_denoiser else UniformBound)(*given, noisy_ids, noise)
        head_function = partial(head_losses, row_function=row_function)
        loss_sum, losses, correct = model(**inputs, head_function=head_function).head_output
        num_items, count = self.num_items(batch), (targets >= 0).sum()
        output = LossOutput(loss_sum, num_items, {"accuracy": (correct.sum(), count)})
        if weights is not None:
            nelbo = torch.zeros_like(weights).index_add(0, documents, (weights[documents] * losses).to(weights.dtype))
            output.metrics["sequence_nelbo"] = (nelbo.sum(), len(nelbo))
            output.sequence_nats, output.sequence_tokens = nelbo, batch["sequence_tokens"]
            output.sequence_given = {"length": batch["given_length"]}
        elif "noise_keys" not in batch:
            output.metrics["denoising_cross_entropy"] = (losses.sum(), count)
        return output


def _config(model: Any) -> Any:
    """The configuration of a model that may be wrapped for several devices."""
    return getattr(model, "module", model).config


def _soft_tokens(config: Any, batch: dict[str, Tensor], clean_ids: Tensor) -> tuple[Tensor, Any]:
    """The noisy tokens (S,) of a batch with a curriculum, and what the network is shown for them."""
    documents = batch["target_documents"]
    gamma, temperature = batch["gamma"][documents], batch["temperature"][documents]
    noisy, ids, weights = gaussian_tokens(
        batch["noise_keys"], clean_ids, gamma, temperature, config.vocab_size, config.suppressed_ids
    )
    return noisy, (batch["logits_index"], ids, weights)

"""The training objective of Gaussian diffusion: the bound on the negative log-likelihood, or denoising."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from xlm_hf.objectives.head_operator import head_losses
from xlm_hf.objectives.loss_output import LossOutput, model_inputs
from xlm_hf.objectives.row_functions import RowFunction, softmax_

from .modeling_plaid import NoisyHead


@dataclass
class VectorError(RowFunction):
    """1/2 |e_x - sum_v p_v e_v|^2 of the target x, with p = softmax(z); or -log p_x.

    With e' = sum_v p_v e_v and g = e' - e_x the gradients of the first are

        by z_v: p_v g (e_v - e'),      by e_v: (p_v - [v = x]) g.

    Attributes:
        is_cross_entropy: (S,) 1.0 for rows whose loss is the second, 0.0 for the others.
    """

    is_cross_entropy: Tensor

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        table, *gradient = self.of_table
        ids, is_cross_entropy = self.target_ids[:, None], self.is_cross_entropy
        log_p, correct = softmax_(logits, ids)
        expected = logits @ table
        error = expected - table[self.target_ids]
        losses = torch.where(is_cross_entropy > 0, -log_p[:, 0], error.square().sum(dim=-1) / 2)
        of_log = self.weights * is_cross_entropy
        of_error = (self.weights - of_log)[:, None] * error
        for total in gradient:
            total.addmm_(logits.T, of_error).index_add_(0, self.target_ids, of_error, alpha=-1)
        constant = of_log - (of_error * expected).sum(dim=-1)
        logits.mul_(torch.addmm(constant[:, None], of_error, table.T)).scatter_add_(1, ids, -of_log[:, None])
        return losses, correct[:, 0]


class PlaidLoss:
    """The bound at a random time, summed over the positions of the canvas.

    For a canvas x of L tokens with vectors e (arXiv 2305.18619, section 2; 2107.00630, equations 11 to 15),

        -log p(x | prompt) <= prior + diffusion + reconstruction
            prior = L/2 (a^2 + D (s^2 - 1 - log s^2))            at time 1, of vectors of D dimensions and length 1
            diffusion = 1/2 E_{t, z}[ exp(-gamma) gamma'(t) sum over l of |e_l - e'_l(z)|^2 ]
            reconstruction = E_z[ sum over l of -log p(x_l | z) ]    at time 0,

    where e' is the expected vector by p. The collator decides which of the last two a document estimates, and gives its
    weight, so that the sum here is an unbiased estimate of the bound of the batch. Training divides it by the canvas
    tokens. A likelihood is per token of the text and its end: the padding of the canvas adds nats and no tokens.

    The ends of a learnt schedule minimise the bound. Of its shape the bound is independent: it minimises the second
    moment of the diffusion term's estimates, E[l^2]. If p(gamma) is the density of the times' gammas, l is inversely
    proportional to it, so the gradient is that of -l^2 log p(gamma) at fixed l and gamma. Plaid's own estimate of it
    goes through the network.

    With `noise_beta` the loss is the cross-entropy -log p(x_l | z) at every position and time alike, whose minimiser is
    the same p. Vectors learn from it, a schedule does not. It is no likelihood.
    """

    def num_items(self, batch: dict[str, Tensor]) -> Tensor:
        """Number of canvas tokens in the batch."""
        return batch["canvas_lengths"].sum()

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        """Sum the loss over the batch of a `PlaidCollator` (see there for its tensors).

        Returns:
            `LossOutput` whose items are canvas tokens. Its metrics:
                accuracy: share of the canvas tokens that are the most probable ones.
                sequence_nelbo: nats per document, where the batch has the weights of the bound.
                prior, diffusion, reconstruction: its three parts.
                denoising_cross_entropy: over the canvas tokens, where that is the loss.
        """
        names = ("times", "time_index", "is_canvas", "noise", "self_conditioned", "logits_index")
        inputs = {**model_inputs(batch), **{name: batch[name] for name in names}}
        terms = model(**inputs, head_function=partial(_terms, batch)).head_output
        loss_sum, losses, correct, of_documents, prior = terms
        num_items, count = self.num_items(batch), (batch["target_ids"] >= 0).sum()
        output = LossOutput(loss_sum, num_items, {"accuracy": (correct.sum(), count)})
        if "weights" not in batch:
            output.metrics["denoising_cross_entropy"] = (losses.sum(), count)
            return output
        nelbo, is_reconstruction = of_documents + prior, batch["is_reconstruction"]
        parts = {
            "sequence_nelbo": nelbo,
            "prior": prior,
            "diffusion": of_documents.masked_fill(is_reconstruction, 0.0),
            "reconstruction": of_documents.masked_fill(~is_reconstruction, 0.0),
        }
        output.metrics.update({name: (x.sum(), len(x)) for name, x in parts.items()})
        output.sequence_nats, output.sequence_tokens = nelbo, batch["sequence_tokens"]
        output.sequence_given = {"length": batch["given_length"]}
        return output


def _terms(
    batch: dict[str, Tensor], states: Tensor, head: NoisyHead, suppressed_ids: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The head function of the loss.

    Returns:
        the sum that is differentiated; of each target its loss and whether it is the most probable token; and of each
        document (D,) its weighted loss and its prior term.
    """
    targets, documents, of_bound = batch["target_ids"], batch["target_documents"], "weights" in batch
    is_reconstruction = batch["is_reconstruction"]
    weights = (batch["weights"] if of_bound else batch["loss_weights"]).to(head.table.dtype)
    is_cross_entropy = is_reconstruction[documents]
    rates = (torch.exp(-head.gamma) * head.slope).masked_fill(is_cross_entropy, 1.0)
    row_weights = (weights[documents] * rates).detach()
    row_function = VectorError(targets, row_weights, is_cross_entropy.to(rates.dtype))
    hidden, query = head.parts(states)
    row_function.of_table = (query, head.table)
    output = head_losses(hidden, head.lm_head, suppressed_ids, row_function)
    of_documents = torch.zeros_like(weights).index_add(0, documents, row_weights * output.losses)
    lengths, gamma = batch["canvas_lengths"].to(weights.dtype), head.level.end
    signal, size = torch.sigmoid(-gamma), head.table.shape[1]
    prior = lengths * (signal * (1 - size) - size * logsigmoid(gamma)) / 2
    loss_sum = output.loss_sum
    if of_bound:
        # Their values are 0; they have the gradients of the rates and of the shape of the schedule.
        of_rates = weights[documents] * (rates - rates.detach()) * output.losses
        squares = (of_documents / weights).square() / lengths.clamp(min=1) * weights
        of_shape = (squares * head.level.score).masked_fill(is_reconstruction, 0.0)
        loss_sum = loss_sum + of_rates.sum() + of_shape.sum() + prior.sum()
    return loss_sum, output.losses, output.correct, of_documents, prior.detach()

"""The training objective of the insertion language model, on sparse targets."""

from functools import partial
from typing import Annotated

import torch
from torch import nn

from xlm_hf.modules.checked_options import Interval, NotNegative, checked
from xlm_hf.objectives.head_operator import linear_cross_entropy
from xlm_hf.objectives.loss_output import LossOutput, model_inputs


class ILMLoss:
    """Cross-entropy of the dropped tokens over all (slot, token) pairs, plus the stopping loss.

    For a sequence from which n tokens were dropped, with c(i, v) the number of times that token v was dropped from
    slot i (arXiv 2505.05755, section 3),

        loss = -1/n sum_{i,v} c(i, v) log softmax(logits)_{(i, v)} + stop_loss_weight x CE(stop_logits, 1[n > 0]),

    where the softmax runs jointly over all slots and tokens of the sequence. With n = 0 the first term is zero. The
    dense target c is never formed: the first term is one logsumexp over the grid minus the mean logit of the dropped
    tokens. A piece of a text that goes on in another example is never complete, and what it lacks is not known. So with
    n = 0 it has no stopping loss.

    L insertions and a stop write a text of L tokens, in any of L! orders. The orders are in bijection with the paths of
    the sampler (`stopping="sample"`, one insertion a step). So, by Jensen's inequality over the orders,

        -log p(x) <= (L + 1) E_n[ token loss - 1[n = 0] log P(complete) - 1[n > 0] log P(incomplete) ] - log L!

    over n ~ U{0..L} and n-subsets, with equality at the exact conditionals. `sequence_nats` estimates this bound,
    whatever is trained. For a piece that goes on it leaves out the stop. It then bounds the probability that the
    sampler's path passes through the piece, like the probability of a prefix in a left-to-right model.

    Args:
        stop_loss_weight: weight of the stopping loss.
        stop_class_weights: weights of the classes (complete, something is missing) in the stopping loss. Where the
            stopping head has more classes, the class is min(n, num_missing_classes - 1).
    """

    @checked
    def __init__(
        self,
        stop_loss_weight: NotNegative = 1.0,
        stop_class_weights: Annotated[tuple[float, float], Interval("[0, inf)")] | None = None,
    ):
        self.stop_loss_weight = stop_loss_weight
        self.stop_class_weights = stop_class_weights

    def num_items(self, batch: dict[str, torch.Tensor]) -> int:
        """Number of sequences in the batch."""
        return len(batch["num_dropped"])

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        """Sum the loss over the batch of an `ILMCollator` (see there for its tensors).

        Returns:
            `LossOutput` whose items are sequences. Its metrics:
                token_loss: mean over the sequences with a dropped token.
                stop_loss, stop_accuracy: means over the sequences with a stopping loss.
                sequence_nelbo: nats per document, the bound above.
        """
        num_dropped, documents, slots = batch["num_dropped"], batch["slot_documents"], batch["target_slots"]
        target_documents = documents[slots]
        joint_cross_entropy = partial(
            linear_cross_entropy,
            target_ids=batch["target_ids"],
            target_weights=1 / num_dropped[target_documents],
            target_rows=slots,
            groups=documents,
        )
        outputs = model(
            **model_inputs(batch),
            slot_index=batch["slot_index"],
            cls_index=batch["cls_index"],
            head_function=joint_cross_entropy,
        )
        if outputs.stop_logits is None:
            raise ValueError("num_missing_classes is 0: a model without a stopping head cannot be trained; choose 2.")
        token_loss, losses, _ = outputs.head_output
        missing = num_dropped > 0
        stops = missing | batch["ends"]
        stop_class = num_dropped.clamp(max=outputs.stop_logits.shape[-1] - 1)
        stop_logits = outputs.stop_logits.to(torch.promote_types(outputs.stop_logits.dtype, torch.float32))
        stop_losses = nn.functional.cross_entropy(stop_logits, stop_class, reduction="none").where(stops, 0.0)
        if self.stop_class_weights is not None:
            complete, incomplete = self.stop_class_weights
            stop_losses = stop_losses * torch.where(missing, incomplete, complete)
        # What pads a batch to one shape has no loss, and may fall on a document that lacks nothing.
        nats = (losses / num_dropped[target_documents].clamp(min=1)).to(stop_logits.dtype)
        token_nats = stop_logits.new_zeros(len(num_dropped)).index_add(0, target_documents, nats)
        nelbo = _bound(batch, token_nats, stop_logits.detach())
        stop_correct = (stop_logits.detach().argmax(dim=-1) == stop_class) & stops
        return LossOutput(
            loss_sum=token_loss + self.stop_loss_weight * stop_losses.sum(),
            num_items=self.num_items(batch),
            metrics={
                "token_loss": (token_loss.detach(), missing.sum()),
                "stop_loss": (stop_losses.detach().sum(), stops.sum()),
                "stop_accuracy": (stop_correct.sum(), stops.sum()),
                "sequence_nelbo": (nelbo.sum(), len(nelbo)),
            },
            sequence_nats=nelbo,
            sequence_tokens=batch["sequence_tokens"],
        )


def _bound(batch: dict[str, torch.Tensor], token_nats: torch.Tensor, stop_logits: torch.Tensor) -> torch.Tensor:
    """(D,) the estimate of the bound of `ILMLoss` from the token loss (D,) and stopping logits (D, classes)."""
    log_p, missing = stop_logits.log_softmax(dim=-1), batch["num_dropped"] > 0
    stop_nats = -torch.where(missing, log_p[:, 1:].logsumexp(dim=-1), log_p[:, 0].where(batch["ends"], 0.0))
    lengths = batch["sequence_tokens"] - batch["ends"].long()
    orders = torch.lgamma((lengths + 1).to(token_nats.dtype))
    return batch["weights"] * (token_nats + stop_nats) - orders

"""The training objective of edit flows: the bound on the negative log-likelihood of the text, given its beginning."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xlm_hf.modules.rotary_transformer import take_of_rows
from xlm_hf.objectives.head_operator import HeadLosses, head_losses, linear_cross_entropy
from xlm_hf.objectives.loss_output import LossOutput, model_inputs
from xlm_hf.objectives.row_functions import CrossEntropy

from .collator_edit_flow import DELETED, KEPT, SUBSTITUTED
from .generation_edit_flow import DELETE, INSERT, SUBSTITUTE


@dataclass
class SubstituteCrossEntropy(CrossEntropy):
    """`CrossEntropy` of a token that stands in for another, which has no probability.

    Attributes:
        own_ids: (S,) the other.
    """

    own_ids: Tensor

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        return super().losses_and_gradient_(logits.scatter_(1, self.own_ids[:, None], -torch.inf), num_ids)


class EditFlowLoss:
    """Expected edits less the logarithms of those that remain (arXiv 2506.09018): Poisson deviances, cross-entropies.

    With alpha the share of the time that is over, and n_e = (1 - alpha) r_e the expected number of an edit e at its
    rate r_e (an insertion of v into a slot has the rate of the slot times the probability of v),

        -log p(x | x_0) <= E_alpha[ 1 / (1 - alpha) ( sum over all e of n_e - sum over remaining e of 1 + log n_e ) ].

    The collator draws alpha and the state, and gives weights in place of 1 / (1 - alpha). If the flow begins with
    nothing, the bound holds with equality for every text at the exact expectations, and is one of -log p(x). Otherwise
    it is one of the text given its beginning x_0, and never tight: no Markov process knows which tokens are to go. Its
    metrics then have another name (`..._given_source`).

    With `insertion_head="joint"` the insertions of a sequence have one rate, and a softmax over all pairs (slot,
    token).
    """

    def num_items(self, batch: dict[str, Tensor]) -> Tensor:
        """Number of tokens of the texts and their ends."""
        return batch["sequence_tokens"].sum()

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        """Sum the loss over the batch of an `EditFlowCollator` (see there for its tensors).

        Returns:
            `LossOutput` whose items are tokens. Its metrics:
                edit_cross_entropy, edit_accuracy: of the tokens of the remaining insertions and substitutions, without
                    weights.
                edit_deviance: per document, sum of n - c - c log n + c log c over slots and tokens with c remaining
                    edits of a kind, which is 0 where n = c.
                sequence_nelbo: nats per document, the bound above.
        """
        has_changes, slots = "token_edits" in batch, batch["slot_index"]
        # Slots that fill up a list belong to no document.
        documents = batch["slot_documents"].clamp(max=len(batch["weights"]) - 1)
        weights = batch.get("loss_weights", batch["weights"])
        config: Any = model.config
        is_joint = config.insertion_head == "joint"
        of_targets = batch["filled_slots"][batch["target_rows"]]

        def cross_entropies(hidden_states, head, suppressed_ids, rates) -> list[HeadLosses]:
            rows, groups = batch["target_rows"], torch.arange(len(batch["filled_slots"]), device=slots.device)
            if is_joint:
                rows, groups = of_targets, batch["slot_documents"]
            options = (batch["target_ids"], weights[documents[of_targets]], rows, groups)
            losses = linear_cross_entropy(hidden_states[: len(groups)], head, suppressed_ids, *options)
            if not has_changes:
                return [losses]
            changed = batch["changed_slots"]
            own_ids = batch["input_ids"].flatten()[slots[changed]]
            function = SubstituteCrossEntropy(batch["substitute_ids"], weights[documents[changed]], own_ids)
            return [losses, head_losses(hidden_states[len(groups) :], head, suppressed_ids, function)]

        outputs = model(
            **model_inputs(batch),
            time_left=batch["time_left"],
            slot_index=slots,
            insertion_slots=None if is_joint else batch["filled_slots"],
            substitution_slots=batch.get("changed_slots"),
            head_function=cross_entropies,
        )
        deviances, least = self._deviances(outputs.rates, batch, documents, is_joint)
        losses, token_nats = outputs.head_output, torch.zeros_like(deviances)
        for part, of_slots in zip(losses, (of_targets, batch.get("changed_slots")), strict=False):
            token_nats = token_nats.index_add(0, documents[of_slots], part.losses.to(token_nats.dtype))
        nelbo = batch["weights"] * (deviances.detach() + token_nats)
        num_tokens = sum((batch[name] >= 0).sum() for name in ("target_ids", "substitute_ids") if name in batch)
        return LossOutput(
            loss_sum=sum(part.loss_sum for part in losses) + (weights * deviances).sum(),
            num_items=self.num_items(batch),
            metrics={
                "edit_cross_entropy": (token_nats.sum(), num_tokens),
                "edit_accuracy": (sum(part.correct.sum() for part in losses), num_tokens),
                "edit_deviance": (deviances.detach().sum() - least, len(deviances)),
                "sequence_nelbo": (nelbo.sum(), len(nelbo)),
            },
            sequence_nats=nelbo,
            sequence_tokens=batch["sequence_tokens"],
            sequence_given={"source": torch.full_like(batch["sequence_tokens"], has_changes, dtype=torch.bool)},
        )

    def _deviances(self, rates, batch: dict[str, Tensor], documents: Tensor, is_joint: bool) -> tuple[Tensor, Tensor]:
        """(D,) expected edits less 1 + log n for each that remains, without their tokens; and the least sum of all."""
        time_left = batch["time_left"]
        time_left = time_left if time_left.dim() == 2 else time_left[:, None]
        expected = rates.expected(take_of_rows(time_left[..., None], batch["input_ids"].shape[1], batch["slot_index"]))
        # A count is as small as its type allows.
        expected = expected.clamp(min=torch.finfo(expected.dtype).tiny)
        counts = batch["insertion_counts"]
        is_slot, counts = counts >= 0, counts.clamp(min=0).to(expected.dtype)

        def summed(of_slots: Tensor) -> Tensor:
            zeros = torch.zeros_like(batch["weights"], dtype=expected.dtype)
            return zeros.index_add(0, documents, of_slots.where(is_slot, 0.0))

        inserted = expected[:, INSERT]
        if is_joint:
            inserted, counts = inserted[batch["first_slots"]], summed(counts)
            total = inserted - counts * (1 + inserted.log())
        else:
            total = summed(inserted - counts * (1 + inserted.log()))
        if "token_edits" in batch:
            edits = batch["token_edits"]
            for kind, remains in ((DELETE, DELETED), (SUBSTITUTE, SUBSTITUTED)):
                n = expected[:, kind]
                total = total + summed((n - (edits == remains) * (1 + n.log())).where(edits >= KEPT, 0.0))
        return total, -torch.special.xlogy(counts, counts).sum()

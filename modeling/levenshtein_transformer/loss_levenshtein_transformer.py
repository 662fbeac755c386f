"""The training objective of the Levenshtein Transformer: its three heads imitate an oracle."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from xlm_hf.modules.vocabulary_head import LogitsOnDemand
from xlm_hf.objectives.head_operator import IGNORED_ID, HeadLosses, linear_cross_entropy, rows_per_chunk
from xlm_hf.objectives.loss_output import LossOutput, model_inputs

from .collator_levenshtein_transformer import common_tokens


class LevenshteinTransformerLoss:
    """Cross-entropies of three policies against the oracle with the fewest deletions and insertions.

    In the words of the paper (arXiv 1905.11006, section 4), with a state y of the collator,

        loss = - sum over gaps of log p(number of missing tokens | gap, y)
               - sum over placeholders of log p(missing token | placeholder, y with its placeholders)
               - sum over tokens of log p(to be deleted or not | token, z).

    z is what the model itself makes of y: every placeholder is filled with its most probable token. The tokens of z
    that are not on a longest common subsequence with the text are to be deleted. Where a text is given, z is this text
    for a part of the documents. No gradient flows through the choice of z, which is a function of model and batch. The
    three heads weigh alike. This is no bound on a likelihood.
    """

    def num_items(self, batch: dict[str, Tensor]) -> Tensor:
        """Number of tokens of the texts and their ends."""
        return batch["sequence_tokens"].sum()

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        """Sum the loss over the batch of a `LevenshteinTransformerCollator` (see there for its tensors).

        Returns:
            `LossOutput` whose items are tokens. Its metrics are of each head, per gap, placeholder and token:
                placeholder_cross_entropy, placeholder_accuracy: of the number of missing tokens.
                fill_cross_entropy, fill_accuracy: of the missing tokens.
                deletion_cross_entropy, deletion_accuracy: of what is to be deleted.
        """
        fills, insertions = self._insertions(model, batch)
        inputs = model_inputs(batch)
        if "edited_ids" in batch:
            inputs.update(input_ids=batch["edited_ids"], attention_mask=batch["edited_mask"])
        config: Any = model.config
        ids: Any = inputs["input_ids"]
        filled = ids.flatten().scatter(0, batch["logits_index"], fills).view_as(ids)
        inputs["input_ids"] = torch.where(ids == config.mask_token_id, filled, ids)
        tokens, of_tokens = batch["token_index"], batch["token_documents"]
        texts = (batch["text_ids"], batch["text_documents"], len(batch["sequence_tokens"]))
        wrong = wrong_tokens(inputs["input_ids"].flatten()[tokens], of_tokens, *texts)
        logits = model(**inputs, token_index=tokens).deletion_logits
        losses = binary_cross_entropy_with_logits(logits, wrong.to(logits.dtype), reduction="none")
        deletions = _head_sums(losses, (logits > 0) == wrong, of_tokens >= 0)
        metrics, loss_sum = {}, deletions[0] + sum(loss for loss, *_ in insertions.values())
        for name, (loss, right, num) in {**insertions, "deletion": deletions}.items():
            metrics.update({f"{name}_cross_entropy": (loss.detach(), num), f"{name}_accuracy": (right, num)})
        return LossOutput(loss_sum, self.num_items(batch), metrics)

    def _insertions(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, tuple]]:
        """The most probable tokens (S,) of the placeholders, and `_head_sums` of two heads."""
        inputs, kept_mask = model_inputs(batch), batch["kept_mask"]
        mask = inputs.pop("attention_mask", torch.ones_like(kept_mask))
        # Both views of the documents in one forward pass, the one with gaps first.
        views = {name: torch.cat((x, x)) for name, x in inputs.items()}
        views["input_ids"] = torch.cat((batch["kept_ids"], batch["input_ids"]))
        views["attention_mask"] = torch.cat((kept_mask, mask))

        def tokens_and_fills(hidden_states, head, suppressed_ids) -> tuple[HeadLosses, Tensor]:
            losses = linear_cross_entropy(hidden_states, head, suppressed_ids, batch["target_ids"])
            return losses, likeliest_tokens(hidden_states, head, suppressed_ids)

        index = batch["logits_index"] + kept_mask.numel()
        output = model(**views, gap_index=batch["gap_index"], logits_index=index, head_function=tokens_and_fills)
        (tokens, fills), logits = output.head_output, output.placeholder_logits
        counts = batch["gap_counts"].clamp(max=logits.shape[-1] - 1)
        losses = cross_entropy(logits, counts, ignore_index=IGNORED_ID, reduction="none")
        placeholder = _head_sums(losses, logits.argmax(dim=-1) == counts, counts != IGNORED_ID)
        fill = _head_sums(tokens.losses, tokens.correct, batch["target_ids"] != IGNORED_ID)
        # Of a head that is computed in chunks, the sum alone has a gradient.
        return fills, {"placeholder": placeholder, "fill": (tokens.loss_sum, *fill[1:])}


def _head_sums(losses: Tensor, correct: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, how many are right and how many there are, of those that exist."""
    return losses.where(exists, 0.0).sum(), (correct & exists).sum(), exists.sum()


@torch.no_grad()
def likeliest_tokens(hidden_states: Tensor, head: nn.Module, suppressed_ids: Any) -> Tensor:
    """The most probable tokens (S,) of hidden states (S, H), from some rows of the logits at a time."""
    logits = LogitsOnDemand(hidden_states.detach(), head, suppressed_ids)
    size = rows_per_chunk(logits[:1].shape[-1], hidden_states.device)
    parts = torch.arange(len(hidden_states), device=hidden_states.device).split(size)
    return torch.cat([logits[part].argmax(dim=-1) for part in parts])


# An operator of its own: the alignment is made on the host, and a compiled step holds it as one node.
@torch.library.custom_op("xlm_hf::wrong_tokens", mutates_args=())
def wrong_tokens(
    ids: Tensor, documents: Tensor, text_ids: Tensor, text_documents: Tensor, num_documents: int
) -> Tensor:
    """Which tokens of sequences are not on their longest common subsequence with the texts (see `common_tokens`).

    Args:
        ids: (T,) the sequences, one after the other.
        documents: (T,) of which document each token is, ascending; -1 for what fills up the list, behind the others.
        text_ids: (N,) the texts, one after the other.
        text_documents: (N,) likewise.
        num_documents: how many there are.

    Returns:
        (T,) bool, False for what fills up the list.
    """
    values = [x.cpu().numpy() for x in (ids, documents, text_ids, text_documents)]
    sides = []
    for tokens, numbers in (values[:2], values[2:]):
        is_there = numbers >= 0
        sides += [tokens[is_there], np.bincount(numbers[is_there], minlength=num_documents)]
    wrong = np.zeros(len(ids), dtype=bool)
    wrong[: len(sides[0])] = ~common_tokens(*sides)[0]
    return torch.from_numpy(wrong).to(ids.device)


@wrong_tokens.register_fake
def _(ids, documents, text_ids, text_documents, num_documents):
    return torch.empty_like(ids, dtype=torch.bool)

"""From examples to batches for the Insertion Transformer: which tokens are dropped, and what each slot lacks."""

from dataclasses import dataclass

import numpy as np
import torch

from xlm_hf.modules.checked_options import Positive
from xlm_hf.objectives.collation import Documents, random_subset, segment_numbers, segment_ranges
from xlm_hf.objectives.collators import Collator, Entry
from xlm_hf.objectives.head_operator import IGNORED_ID


def tree_weights(num_targets: np.ndarray, temperature: float | None) -> np.ndarray:
    """Weights of the targets of each slot, one slot after the other; those of a slot sum to 1.

    The i-th of m targets weighs softmax(-|i - (m - 1) / 2| / temperature). The middle one weighs most, so that the
    order of insertions is a balanced binary tree (arXiv 1902.03249).

    Args:
        num_targets: (S,) m of each slot.
        temperature: towards 0 the middle alone counts; None means that all weigh 1 / m.

    Returns:
        (sum of num_targets,) float64.
    """
    if temperature is None:
        return np.repeat(1 / np.maximum(num_targets, 1), num_targets)
    # Rounded down: for even m this takes 1/2 off all of them, and their softmax cannot underflow.
    distances = np.floor(np.abs(segment_ranges(0, num_targets) - np.repeat((num_targets - 1) / 2, num_targets)))
    weights, slots = np.exp(-distances / temperature), segment_numbers(num_targets)
    return weights / np.bincount(slots, weights)[slots]


def slot_targets(
    target_ids: np.ndarray,
    lengths: np.ndarray,
    is_dropped: np.ndarray,
    ends: np.ndarray,
    end_token_id: int,
    temperature: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What the slots of texts lack, and how much each missing token weighs in its slot.

    The slots of a text are left of its first kept token and right of each kept token. A token that is missing twice in
    a slot is there twice. A slot that lacks nothing has the end symbol as its one target. The last slot of a text that
    goes on is an exception: nothing is known about what follows, so it has only the targets that are known to be
    missing.

    Args:
        target_ids: (N,) the texts, one after the other.
        lengths: (D,) tokens of each.
        is_dropped: (N,) bool.
        ends: (D,) bool, False for a text that goes on.
        end_token_id: the end symbol.
        temperature: of `tree_weights`.

    Returns:
        slots (T,) of the targets, ascending, numbered over all texts; ids (T,); weights (T,), see `tree_weights`; and
        how many slots of each text have a target, (D,).
    """
    dropped, document = np.flatnonzero(is_dropped), segment_numbers(lengths)
    num_slots = lengths + 1 - np.bincount(document[dropped], minlength=len(lengths))
    # As many slots as kept tokens come before, and one more for each text before.
    of_dropped = dropped - np.arange(len(dropped)) + document[dropped]
    missing = np.bincount(of_dropped, minlength=num_slots.sum())
    num_targets = np.maximum(missing, 1)
    is_open = np.zeros_like(num_targets, dtype=bool)
    is_open[num_slots.cumsum()[~ends] - 1] = True
    num_targets[is_open] = missing[is_open]
    ids = np.full(num_targets.sum(), end_token_id)
    ids[np.repeat(missing > 0, num_targets)] = target_ids[dropped]
    with_targets = np.bincount(segment_numbers(num_slots), num_targets > 0, len(lengths)).astype(np.int64)
    return segment_numbers(num_targets), ids, tree_weights(num_targets, temperature), with_targets


@dataclass(eq=False)
class InsertionTransformerCollator(Collator):
    """Documents `prompt [BOS] target` with a part of the target dropped, and prompts `prompt [BOS]`.

    For a target of L tokens, n = floor(r (L + 1)) of them are dropped, r ~ Beta(drop_beta, 1), every n-subset alike.
    With drop_beta = 1 that is n ~ U{0..L} (arXiv 1902.03249). All draws are functions of (seed, epoch,
    example_id, position) and the document's number alone. What each slot lacks says `slot_targets`.

    Further arguments are those of `Collator`.

    Args:
        tree_temperature: of the weights in a slot (`tree_weights`); None is the uniform loss.
        drop_beta: skews the share of dropped tokens, as above; a larger one shows emptier sequences.
        packing: as in `Collator`; rows hold at most `max_length` tokens after the dropping.

    A training batch holds, for D documents in B rows of at most L tokens, with S slots and T targets in all:
        input_ids (B, L): what is left of the documents, padded on the right.
        attention_mask (B, L): True for tokens.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        num_dropped (D,): n of each document.
        slot_index (S,): the slots, as indices into the flattened (B x L) tokens.
        target_slots (T,): where the slot of each target stands in `slot_index`; in ascending order.
        target_ids (T,): the dropped tokens, and `[EOS]` for each slot that lacks nothing.
        target_weights (T,): float32; those of a document sum to 1, and each of its slots has an equal share.
        example_id: of the examples, as given.
    """

    layouts = {"lm": "[BOS] target", "seq2seq": "prompt [BOS] target"}
    entries = {
        **Collator.entries,
        "num_dropped": Entry("document"),
        "slot_index": Entry("slot", index_of="position"),
        "target_slots": Entry("target", index_of="slot"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "target_weights": Entry("target"),
    }

    tree_temperature: Positive | None = None
    drop_beta: Positive = 1.0

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """What is left of the documents, their slots, and what these lack."""
        self.check_content(documents.target_ids)
        lengths = documents.target_lengths
        self.check_lengths(documents.prompt_lengths + len(self.specials) + lengths, "sequence", self.specials)
        # The number n, evenly spread over the epoch; then the n tokens with the smallest random keys go.
        share = documents.low_discrepancy_draws(self.seed) ** (1 / self.drop_beta)
        num_dropped = (share * (lengths + 1)).astype(np.int64)
        is_dropped, _ = random_subset(documents.random_bits(self.seed, lengths), lengths, num_dropped)
        num_kept = lengths - num_dropped

        rows, starts = self.rows_of(documents, num_kept)
        rows.write(starts, num_kept, documents.target_ids[~is_dropped])
        slots, ids, weights, num_slots = slot_targets(
            documents.target_ids, lengths, is_dropped, documents.ends > 0, self.eos_token_id, self.tree_temperature
        )
        of_documents = segment_numbers(num_kept + 1)[slots]
        return rows.batch(
            num_dropped=num_dropped,
            slot_index=rows.index(starts - 1, num_kept + 1),
            target_slots=slots,
            target_ids=ids,
            target_weights=(weights / num_slots[of_documents]).astype(np.float32),
        )

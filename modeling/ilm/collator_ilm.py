"""From examples to batches for the insertion language model: which tokens are dropped, and where they belong."""

from dataclasses import dataclass

import numpy as np
import torch

from xlm_hf.modules.checked_options import Positive
from xlm_hf.objectives.collation import Documents, random_subset, segment_numbers, segment_starts
from xlm_hf.objectives.collators import Collator, Entry
from xlm_hf.objectives.head_operator import IGNORED_ID


@dataclass(eq=False)
class ILMCollator(Collator):
    """Documents `[CLS] prompt [BOS] target` with a part of the target dropped, and prompts `[CLS] prompt [BOS]`.

    For a target of L tokens, n = floor(r (L + 1)) of them are dropped, r ~ Beta(drop_beta, 1), every n-subset alike.
    With drop_beta = 1 that is n ~ U{0..L} (arXiv 2505.05755, section 3.2); a larger one shows emptier sequences, in
    which fewer tokens can be copied from their neighbours. It changes how often each n is trained, not what is optimal
    at it. All draws are functions of (seed, epoch, example_id, position) and the document's number alone.

    Further arguments are those of `Collator`.

    Args:
        drop_beta: skews the share of dropped tokens, as above.
        packing: as in `Collator`; rows hold at most `max_length` tokens after the dropping.

    A training batch holds, for D documents in B rows of at most L tokens, with S slots and T dropped tokens in all:
        input_ids (B, L): what is left of the documents, padded on the right.
        attention_mask (B, L): True for tokens.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        cls_index (D,): `[CLS]` of each document, as an index into the flattened (B x L) tokens.
        num_dropped (D,): n of each document.
        ends (D,): True for a document with an end; False for one that goes on in another example (`continues`).
        weights (D,): float32, 1 / P(n) under the law above, the weight of the document's losses in the bound; L + 1
            with drop_beta = 1.
        sequence_tokens (D,): L, and 1 for the end where there is one.
        slot_index (S,): the slots of the documents with n > 0, as indices into the flattened (B x L) tokens.
        slot_documents (S,): their documents, in ascending order.
        target_slots (T,): for each dropped token, where its slot stands in `slot_index`; in ascending order.
        target_ids (T,): the dropped tokens.
        example_id: of the examples, as given.
    """

    layouts = {"lm": "[CLS] [BOS] target", "seq2seq": "[CLS] prompt [BOS] target"}
    entries = {
        **Collator.entries,
        "cls_index": Entry("document", index_of="position"),
        "num_dropped": Entry("document"),
        "ends": Entry("document"),
        "weights": Entry("document"),
        "sequence_tokens": Entry("document"),
        "slot_index": Entry("slot", index_of="position"),
        # Slots that fill up a list are a group of their own, so that no softmax runs over them.
        "slot_documents": Entry("slot", index_of="document", padding="next"),
        "target_slots": Entry("target", index_of="slot"),
        "target_ids": Entry("target", padding=IGNORED_ID),
    }

    drop_beta: Positive = 1.0

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """What is left of the documents, their slots, and the dropped tokens."""
        target_lengths = documents.target_lengths
        num_specials = len(self.specials)
        self.check_lengths(documents.prompt_lengths + num_specials + target_lengths, "sequence", self.specials)
        if (documents.target_ids == self.eos_token_id).any():
            raise ValueError(
                "A text holds the end-of-sequence token, but this model ends a text by its stopping head: keep "
                "documents apart by task.document_masks=true."
            )

        # The number n, evenly spread over the epoch; then the n tokens with the smallest random keys go.
        share = documents.low_discrepancy_draws(self.seed) ** (1 / self.drop_beta)
        num_dropped = (share * (target_lengths + 1)).astype(np.int64)
        # With the first bit turned, in the order of the signed integers that tensors hold.
        keys = documents.random_bits(self.seed, target_lengths) ^ np.uint64(1 << 63)
        is_dropped, _ = random_subset(keys, target_lengths, num_dropped)
        dropped, kept = np.flatnonzero(is_dropped), np.flatnonzero(~is_dropped)
        num_kept = target_lengths - num_dropped

        rows, starts = self.rows_of(documents, num_kept)
        rows.write(starts, num_kept, documents.target_ids[kept])

        # Slots of documents that lack something, one after the other: [BOS], then every kept token.
        num_slots = np.where(num_dropped > 0, num_kept + 1, 0)
        kept_before = dropped - np.arange(len(dropped))
        slots, beta = target_lengths + 1, self.drop_beta
        probabilities = ((num_dropped + 1) / slots) ** beta - (num_dropped / slots) ** beta
        return rows.batch(
            cls_index=rows.first,
            num_dropped=num_dropped,
            ends=documents.ends > 0,
            weights=(1 / probabilities).astype(np.float32),
            sequence_tokens=target_lengths + documents.ends,
            slot_index=rows.index(starts - 1, num_slots),
            slot_documents=segment_numbers(num_slots),
            target_slots=kept_before + np.repeat(segment_starts(num_slots) - segment_starts(num_kept), num_dropped),
            target_ids=documents.target_ids[dropped],
        )

"""From examples to batches for the left-to-right language model. Nothing is corrupted."""

import numpy as np
import torch

from xlm_hf.objectives.collation import Documents, segment_numbers, segment_ranges, segment_starts
from xlm_hf.objectives.collators import Collator, Entry
from xlm_hf.objectives.head_operator import IGNORED_ID


class ARLMCollator(Collator):
    """Documents `prompt [BOS] target`, which learn `target [EOS]`, and prompts `prompt [BOS]` for `generate`.

    Takes the arguments of `Collator`; the seed is not used, since nothing is drawn. A training batch holds, for D
    documents in B rows of at most L tokens without `[EOS]` (never an input) and S predicted tokens in all:
        input_ids (B, L): the documents, padded on the right.
        attention_mask (B, L): True for tokens.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        logits_index (S,): `[BOS]` and the tokens of the targets, as indices into the flattened (B x L) tokens.
        target_ids (S,): the token that follows each of them.
        target_documents (S,): the documents they belong to.
        target_lengths (D,): predicted tokens of each document.
        example_id: of the examples, as given.
    """

    layouts = {"lm": "[BOS] target [EOS]", "seq2seq": "prompt [BOS] target [EOS]"}
    entries = {
        **Collator.entries,
        "logits_index": Entry("target", index_of="position"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "target_documents": Entry("target", index_of="document"),
        "target_lengths": Entry("document"),
    }

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """Every token of a target predicted from those before it."""
        lengths = documents.target_lengths
        self.check_lengths(documents.prompt_lengths + 1 + lengths + 1, "sequence", self.specials)
        rows, starts = self.rows_of(documents, lengths)
        rows.write(starts, lengths, documents.target_ids)
        # A document's last tokens, from [BOS] on, each predict the one after it.
        predicted = lengths + documents.ends
        target_ids = np.full(predicted.sum(), self.eos_token_id)
        target_ids[segment_ranges(segment_starts(predicted), lengths)] = documents.target_ids
        return rows.batch(
            logits_index=rows.index(starts - 1, predicted),
            target_ids=target_ids,
            target_documents=segment_numbers(predicted),
            target_lengths=predicted,
        )

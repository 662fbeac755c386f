"""From examples to batches for the Levenshtein Transformer: texts that lack tokens, and texts to be corrected."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from xlm_hf.modules.checked_options import Positive
from xlm_hf.objectives.alignment import DELETE, INSERT, PAIR, aligned
from xlm_hf.objectives.collation import Documents, Examples, Rows, random_subset, segment_numbers, tensors
from xlm_hf.objectives.collators import Collator, Entry
from xlm_hf.objectives.head_operator import IGNORED_ID

SOURCE_SHARE = 0.5  # of the documents whose edits begin with the given text; the others begin with their own


def common_tokens(
    sources: np.ndarray, source_lengths: np.ndarray, targets: np.ndarray, target_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of sources, and which of their targets, are on a longest common subsequence of both, bool.

    The oracle deletes the other tokens of a source, and inserts the others of its target. No other way takes fewer
    deletions and insertions. The arguments are those of `aligned`.
    """
    moves, _ = aligned(sources, source_lengths, targets, target_lengths, substitutions=False)
    return moves[moves != INSERT] == PAIR, moves[moves != DELETE] == PAIR


def missing_tokens(is_dropped: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many tokens each gap lacks: (sum of kept tokens + 1 of each text,) int64.

    Args:
        is_dropped: (N,) bool, of the tokens of all texts, one after the other.
        lengths: (D,) tokens of each text.
    """
    # As many gaps as kept tokens come before, and one more for each text before.
    gaps = (~is_dropped).cumsum() + segment_numbers(lengths)
    return np.bincount(gaps[is_dropped], minlength=(~is_dropped).sum() + len(lengths))


@dataclass(eq=False)
class LevenshteinTransformerCollator(Collator):
    """Documents `prompt [BOS] target` in up to three views, of which each trains a head.

    1. Some tokens of the target are missing: how many are missing in each gap?
    2. Placeholders stand for them: which tokens are they?
    3. The text to be corrected: which of its tokens are not of the target? This text is the second view, whose
       placeholders the model itself fills in the loss.

    For a target of L tokens, n = floor(r (L + 1)) are missing, r ~ Beta(drop_beta, 1), every n-subset alike. With
    drop_beta = 1 that is n ~ U{0..L} (arXiv 1905.11006, section 4). With `initial_text="source"` the examples have a
    column `source_ids`, texts that are to be corrected. Then half of the documents, drawn, lack what is not on the
    longest common subsequence with the source instead. And half of them, drawn apart from these, have the source as
    their third view. The paper calls the shares beta and alpha. All draws are functions of (seed, epoch, example_id,
    position) and the document's number alone.

    Further arguments are those of `Collator`.

    Args:
        initial_text: what is edited first: "empty", nothing, or "source", a text that is given.
        drop_beta: as above; a larger one than 1 shows emptier texts.

    A training batch holds, for D documents in B rows of at most L tokens, views of the same length:
        input_ids, attention_mask (B, L): the second view; all views are padded behind each document.
        kept_ids, kept_mask (B, L): the first view.
        edited_ids, edited_mask (B, L): the third view, before its placeholders are filled; left out if it is always the
            second.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        gap_index (G,): the gaps of the first view, by the tokens left of them, as indices into the flattened (B x L)
            tokens.
        gap_counts (G,): how many tokens are missing there; `IGNORED_ID` behind the end of a text that goes on.
        logits_index (S,): the placeholders of the second view, likewise.
        target_ids (S,): their tokens.
        token_index (T,): the tokens after `[BOS]` of the third view, likewise.
        token_documents (T,): the document of each.
        text_ids, text_documents (N,): the targets, one after the other, and the document of each token.
        sequence_tokens (D,): tokens of the text, and 1 for its end where there is one.
        example_id: of the examples, as given.
    """

    layouts = {"lm": "[BOS] target", "seq2seq": "prompt [BOS] target"}
    entries = {
        **Collator.entries,
        "source_ids": Entry("example"),
        "source_mask": Entry("example"),
        "kept_ids": Entry("position"),
        "kept_mask": Entry("position", padding=0),
        "edited_ids": Entry("position"),
        "edited_mask": Entry("position", padding=0),
        "gap_index": Entry("gap", index_of="position"),
        "gap_counts": Entry("gap", padding=IGNORED_ID),
        "logits_index": Entry("placeholder", index_of="position"),
        "target_ids": Entry("placeholder", padding=IGNORED_ID),
        "token_index": Entry("token", index_of="position"),
        "token_documents": Entry("token", index_of="document", padding=-1),
        "text_ids": Entry("text"),
        "text_documents": Entry("text", index_of="document", padding=-1),
        "sequence_tokens": Entry("document"),
    }

    initial_text: Literal["empty", "source"] = "empty"
    drop_beta: Positive = 1.0

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """The three views of the documents, and what the first two lack."""
        self.check_content(documents.target_ids)
        lengths, targets = documents.target_lengths, documents.target_ids
        # The number n, evenly spread over the epoch; then the n tokens with the smallest random keys go.
        share = documents.low_discrepancy_draws(self.seed) ** (1 / self.drop_beta)
        num_dropped = (share * (lengths + 1)).astype(np.int64)
        is_missing, _ = random_subset(documents.random_bits(self.seed, lengths), lengths, num_dropped)
        sources = self.sources(documents.examples) if self.initial_text == "source" else None
        if sources is not None:
            begins = documents.uniforms(self.seed, "insertion") < SOURCE_SHARE
            is_common = common_tokens(*sources, targets, lengths)[1]
            is_missing = np.where(np.repeat(begins, lengths), ~is_common, is_missing)
        filled, edited_lengths = np.where(is_missing, self.mask_token_id, targets), lengths
        if sources is not None:
            begins = documents.uniforms(self.seed, "deletion") < SOURCE_SHARE
            edited, edited_lengths = _chosen(begins, sources, (filled, lengths))

        longest, num_kept = np.maximum(lengths, edited_lengths), lengths - _sums(is_missing, lengths)
        self.check_lengths(documents.prompt_lengths + len(self.specials) + longest, "sequence", self.specials)
        rows, starts = self.rows_of(documents, longest)
        views = _view("kept_ids", "kept_mask", rows, starts, targets[~is_missing], num_kept)
        if sources is not None:
            views |= _view("edited_ids", "edited_mask", rows, starts, edited, edited_lengths)
        views |= _view("input_ids", "attention_mask", rows, starts, filled, lengths)
        gap_counts = missing_tokens(is_missing, lengths)
        gap_counts[(num_kept + 1).cumsum()[documents.ends == 0] - 1] = IGNORED_ID
        batch = rows.batch(
            gap_index=rows.index(starts - 1, num_kept + 1),
            gap_counts=gap_counts,
            logits_index=rows.index(starts, lengths)[is_missing],
            target_ids=targets[is_missing],
            token_index=rows.index(starts, edited_lengths),
            token_documents=segment_numbers(edited_lengths),
            text_ids=targets,
            text_documents=segment_numbers(lengths),
            sequence_tokens=lengths + documents.ends,
        )
        return {**batch, **tensors(**views)}

    def prediction_batch(self, examples: Examples) -> dict[str, torch.Tensor]:
        """The prompts for `generate` and, with "source", the texts to be corrected, padded on the right."""
        batch = super().prediction_batch(examples)
        return batch | self.padded_sources(examples) if self.initial_text == "source" else batch


def _sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many `values` (N,) bool are true in each part (D,)."""
    return np.bincount(segment_numbers(lengths)[values], minlength=len(lengths))


def _chosen(
    is_first: np.ndarray, first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Of two lists of texts, each as tokens and lengths (D,), the first one's where `is_first` (D,) says."""
    lengths = np.where(is_first, first[1], second[1])
    tokens, from_first = np.empty(lengths.sum(), dtype=np.int64), np.repeat(is_first, lengths)
    tokens[from_first] = first[0][np.repeat(is_first, first[1])]
    tokens[~from_first] = second[0][np.repeat(~is_first, second[1])]
    return tokens, lengths


def _view(
    ids_name: str, mask_name: str, rows: Rows, starts: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
) -> dict[str, np.ndarray]:
    """Ids and mask (B, L) of the rows with `tokens`, `lengths` (D,) of them, where their texts start."""
    ids, mask = rows.input_ids.copy(), np.zeros(len(rows.input_ids), dtype=bool)
    ids[rows.index(starts, lengths)] = tokens
    mask[rows.index(0, starts + lengths)] = True
    return {ids_name: ids.reshape(rows.shape), mask_name: mask.reshape(rows.shape)}

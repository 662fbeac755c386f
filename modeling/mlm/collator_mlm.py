"""From examples to batches for the masked language model: which tokens are masked."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from xlm_hf.modules.checked_options import Count, Positive
from xlm_hf.objectives.collation import Documents, Examples, Rows, segment_numbers
from xlm_hf.objectives.collators import CanvasCollator, Entry
from xlm_hf.objectives.corruption import bernoulli_masks, exact_masks
from xlm_hf.objectives.head_operator import IGNORED_ID


@dataclass(eq=False)
class MLMCollator(CanvasCollator):
    """Documents `prompt [BOS] target [EOS]` with a part of what follows `[BOS]` masked, and prompts `prompt [BOS]`.

    For each sequence t ~ Beta(mask_beta, 1), and each token of its canvas - what follows `[BOS]` - is masked with
    probability t independently. With mask_beta = 1 that is t ~ U(0, 1) (arXiv 2505.05755); a larger one shows emptier
    canvases, in which fewer tokens can be copied from their neighbours. It changes how often each t is trained, not
    what is optimal at it. All draws are functions of (seed, epoch, example_id, position) and the document's number
    alone. In infilling only what the input leaves open is masked; the row shows `target_ids` everywhere else.

    Further arguments are those of `CanvasCollator`. With a number as `canvas_length` the model learns to write `[EOS]
    [PAD] ...` after a sequence. With None, `generate` must be given the length.

    With `max_canvas_length` the model predicts the length itself (mask-predict, arXiv 1904.09324): documents read
    `prompt [BOS] target`, k ~ U{1..L} of the L target tokens are masked, or k / L (rounded up) is Beta(mask_beta, 1),
    and the batch says where each `[BOS]` is, how long its canvas is, and what a masked token weighs in the bound.

    Args:
        mask_beta: skews the masking rate, as above.
        max_canvas_length: of the model: the longest target that its length head can name; None for a model without.

    A training batch holds, for B rows of at most L tokens, of which S are masked in all:
        input_ids (B, L): the documents with their masks, padded on the right.
        attention_mask (B, L): True for tokens, padding content included.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        logits_index (S,): where the masked tokens are, as indices into the flattened (B x L) tokens.
        target_ids (S,): the masked tokens.
        target_documents (S,): with `max_canvas_length`, the documents they belong to; the next five come with it too.
        weights (D,): float32, weight of the cross-entropy of each masked token of the document in the bound.
        length_index (D,): where each `[BOS]` is; none of a document to fill in.
        length_targets (D,): length of each canvas, likewise.
        sequence_tokens (D,): tokens of the text, and 1 for its end where it has one; in infilling the blanks.
        example_id: of the examples, as given.
    Where lengths are given (`canvas_length=None`), prompts of examples with a target come with `canvas_lengths` (B,),
    those of the targets with `[EOS]`; inputs to fill in with 0. Otherwise the options of `generate` decide, or the
    model's length head.

    Raises:
        ValueError: for options out of range, or `canvas_length` beside `max_canvas_length`.
    """

    entries = {
        **CanvasCollator.entries,
        "logits_index": Entry("target", index_of="position"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "target_documents": Entry("target", index_of="document"),
        "weights": Entry("document"),
        "length_index": Entry("length", index_of="position"),
        "length_targets": Entry("length", padding=IGNORED_ID),
        "length_documents": Entry("length", index_of="document"),
        "sequence_tokens": Entry("document"),
        "canvas_lengths": Entry("example"),
    }

    mask_beta: Positive = 1.0
    max_canvas_length: Count | None = None

    # Nothing is guided.
    condition_dropout: ClassVar[float] = 0.0  # type: ignore[misc]

    def __post_init__(self):
        super().__post_init__()
        if self.canvas_length is not None and self.max_canvas_length is not None:
            raise ValueError(
                f"The length of a canvas is either predicted (max_canvas_length, here {self.max_canvas_length}) or "
                f"fixed (canvas_length, here {self.canvas_length}): set canvas_length to null."
            )
        if self.max_canvas_length is not None:
            # A canvas holds neither: its length is known.
            ends = [token_id for token_id in (self.pad_token_id, self.eos_token_id) if token_id is not None]
            self.is_suppressed[ends] = True

    @property
    def given(self) -> tuple[str, ...]:
        """The length of the text, where it is neither fixed nor predicted."""
        is_told = self.prediction and self.kind != "infill"
        return ("length",) if is_told and self.canvas_length is None and self.max_canvas_length is None else ()

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """The documents with a part of their canvases masked, at rates evenly spread over the epoch."""
        self._check_prompts(documents.prompt_ids)
        self.check_content(documents.target_ids)
        if self.max_canvas_length is not None:
            return self._batch_of_predicted_lengths(documents)
        rows, starts, lengths = self.canvas(documents)
        t = documents.low_discrepancy_draws(self.seed) ** (1 / self.mask_beta)
        masked = bernoulli_masks(documents.random_bits(self.seed, lengths, starts), lengths, t)
        logits_index = rows.index(starts, lengths)[masked if documents.blank is None else masked & documents.blank]
        target_ids = rows.input_ids[logits_index]
        rows.input_ids[logits_index] = self.mask_token_id
        return rows.batch(logits_index=logits_index, target_ids=target_ids)

    def canvas(self, documents: Documents) -> tuple[Rows, np.ndarray, np.ndarray]:
        """As in `CanvasCollator`; where the model predicts lengths, a canvas is the target alone."""
        if self.max_canvas_length is None or self.kind == "infill":
            return super().canvas(documents)
        lengths = documents.target_lengths
        if lengths.max() > self.max_canvas_length:
            raise ValueError(
                f"A target has {lengths.max()} tokens and max_canvas_length is {self.max_canvas_length}: raise it, or "
                "shorten the target."
            )
        self.check_lengths(
            documents.prompt_lengths + len(self.prompt_specials) + lengths, "sequence", self.prompt_specials
        )
        rows, starts = self.rows_of(documents, lengths)
        rows.write(starts, lengths, documents.target_ids)
        return rows, starts, lengths

    def _batch_of_predicted_lengths(self, documents: Documents) -> dict[str, torch.Tensor]:
        """The documents with k of the L tokens of each canvas masked."""
        rows, starts, lengths = self.canvas(documents)
        index, bits = rows.index(starts, lengths), documents.random_bits(self.seed, lengths, starts)
        with_length = np.arange(len(lengths))
        if documents.blank is not None:
            index, bits, with_length = index[documents.blank], bits[documents.blank], with_length[:0]
            lengths = np.bincount(segment_numbers(lengths)[documents.blank], minlength=len(lengths))
        draws = documents.low_discrepancy_draws(self.seed)
        masked, _, weights = exact_masks(bits, lengths, draws, self.mask_beta)
        logits_index = index[masked]
        target_ids = rows.input_ids[logits_index]
        rows.input_ids[logits_index] = self.mask_token_id
        return rows.batch(
            logits_index=logits_index,
            target_ids=target_ids,
            target_documents=segment_numbers(lengths)[masked],
            weights=weights.astype(np.float32),
            length_index=(rows.first + starts - 1)[with_length],
            length_targets=lengths[with_length],
            length_documents=with_length,
            sequence_tokens=lengths + (0 if documents.blank is not None else documents.ends),
        )

    def prediction_batch(self, examples: Examples) -> dict[str, torch.Tensor]:
        """The prompts for `generate`, with the lengths of their canvases where these are given."""
        batch = super().prediction_batch(examples)
        if self.kind == "infill":
            return {**batch, "canvas_lengths": torch.zeros(len(examples), dtype=torch.int64)}
        self._check_prompts(batch["input_ids"].numpy())
        if self.given and all(self.target_column in example for example in examples):
            batch["canvas_lengths"] = torch.tensor([len(example[self.target_column]) + 1 for example in examples])
        return batch

    def _check_prompts(self, ids: np.ndarray) -> None:
        if (ids == self.mask_token_id).any():
            raise ValueError(
                f"A prompt holds the mask token (id {self.mask_token_id}), which marks positions to be written: "
                "tokenize the data without special tokens."
            )

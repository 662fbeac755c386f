"""From examples to batches for block diffusion: two copies of each document, and the masks of each block."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from xlm_hf.modules.checked_options import Positive, PositiveInt
from xlm_hf.objectives.collation import Documents, segment_numbers, segment_ranges, segment_starts, tensors
from xlm_hf.objectives.collators import CanvasCollator, Entry
from xlm_hf.objectives.corruption import bernoulli_masks, exact_masks, skewed_times
from xlm_hf.objectives.head_operator import IGNORED_ID


@dataclass(eq=False)
class BD3LMCollator(CanvasCollator):
    """Documents `prompt [BOS] canvas` in a clean and a noisy copy, and prompts `prompt [BOS]` for `generate`.

    A canvas holds the text, `[EOS]` where the document ends, and then `[PAD]` up to the end of that block, or to the
    model's last position if it comes first. A document that goes on in another example has no `[EOS]` and its canvas
    ends where it is cut. The clean copy reads `prompt [BOS]` and all blocks but the last, which nobody would read; the
    noisy copy follows it and reads the whole canvas. Both have the same positions. In infilling the whole sequence is
    one block, its blanks are what is masked and learnt, and there is no clean copy.

    How much of a block is masked is low-discrepancy over documents and blocks, the masks are functions of (seed, epoch,
    example_id), so neither depends on the rest of the batch.

    Further arguments are those of `CanvasCollator`. `max_length` bounds a document, not its two copies; a packed row
    holds up to twice as many tokens.

    Args:
        block_length: tokens of a block, the model's `block_length`.
        masking: "exact" draws k ~ U{1..B} for each block of B tokens and masks exactly k, for a weight of B / k;
            "bernoulli" draws t ~ U(0, 1] for each block and masks each token with probability t, for a weight of 1 / t.
            Both are unbiased for the same bound, and only the first has a finite variance.
        mask_beta: None trains on the bound. A number, for training alone, draws k / B (rounded up) or t from
            Beta(mask_beta, 1), and every masked token counts 1 in the loss.
        mask_range: None, or for training alone the bounds (low, high) within which t, or k / B, is uniform ("clipped",
            arXiv 2503.09573, section 5); its batches have no `weights`, since no weight makes the bound of them.

    A training batch holds, for D documents with N blocks in B rows of at most L tokens, with M masks in all:
        input_ids (B, L): both copies of each document, padded on the right.
        attention_mask, position_ids (B, L): whether a token exists; its position in its document.
        block_ids (B, L): its block, 0 for the prompt and `[BOS]`. is_noisy (B, L): its copy. Not in infilling.
        segment_ids (B, L): document of each token, where a row holds several.
        logits_index (M,): the masks, as indices into the flattened (B x L) tokens.
        target_ids (M,), target_blocks (M,): what they hide, and the block they belong to.
        block_documents (N,): the document of each block.
        weights (N,): float32, weight of the cross-entropy of each masked token of the block in the bound.
        loss_weights (N,): float32, the same in the loss, where `mask_beta` or `mask_range` make it another one.
        canvas_lengths (D,): tokens that could have been masked.
        sequence_tokens (D,): tokens of the text, and 1 for its end where it has one; in infilling the blanks.
        example_id: of the examples, as given.

    Raises:
        ValueError: for an unknown masking, or a number out of its range.
    """

    entries = {
        **CanvasCollator.entries,
        "block_ids": Entry("position"),
        "is_noisy": Entry("position"),
        "logits_index": Entry("target", index_of="position"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "target_blocks": Entry("target", index_of="block"),
        "block_documents": Entry("block", index_of="document"),
        "weights": Entry("block"),
        "loss_weights": Entry("block"),
        "canvas_lengths": Entry("document"),
        "sequence_tokens": Entry("document"),
    }

    block_length: PositiveInt = 4
    masking: Literal["exact", "bernoulli"] = "exact"
    mask_beta: Positive | None = None
    mask_range: tuple[float, float] | None = None

    # A canvas ends with the last block of its text.
    canvas_length: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self):
        super().__post_init__()
        low, high = self.mask_range or (0.0, 1.0)
        if not 0 <= low < high <= 1:
            raise ValueError(f"mask_range must be 0 <= low < high <= 1 and is ({low}, {high}).")
        if self.mask_range and self.mask_beta:
            raise ValueError("mask_beta and mask_range both say how much is masked: set one of them to None.")
        # A row holds two copies.
        self.row_capacity = 2 * self.max_length if self.packing else None

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """Both copies of the documents, and of each block the masks and the weight."""
        content, lengths = self._contents(documents)
        # Sizes of the last blocks, which have no clean copy; the whole sequence in infilling.
        before = 0 if documents.blank is not None else np.maximum(self._num_blocks(lengths) - 1, 0)
        last = lengths - self.block_length * before
        rows, starts = self.rows_of(documents, 2 * lengths - last)
        index = rows.index(starts + lengths - last, lengths)
        number = segment_ranges(0, lengths)
        kept = number < np.repeat(lengths - last, lengths)
        rows.input_ids[index], position_ids = content, np.zeros_like(rows.input_ids)
        rows.write(starts, lengths - last, content[kept])
        position_ids[rows.index(0, starts + lengths - last)] = segment_ranges(0, starts + lengths - last)
        position_ids[index] = segment_ranges(starts, lengths)
        block_ids, is_noisy = np.zeros_like(position_ids), np.zeros(position_ids.shape, dtype=bool)
        of_canvas = number // self.block_length + 1
        block_ids[index], is_noisy[index] = of_canvas, True
        block_ids[rows.index(starts, lengths - last)] = of_canvas[kept]

        bits = documents.random_bits(self.seed, lengths, starts)
        if documents.blank is not None:
            index, bits, content = (x[documents.blank] for x in (index, bits, content))
            lengths = np.bincount(segment_numbers(lengths)[documents.blank], minlength=len(lengths))
        masks, blocks = self._masks(documents, bits, lengths)
        rows.input_ids[index[masks]] = self.mask_token_id
        batch = rows.batch(
            logits_index=index[masks],
            target_ids=content[masks],
            **blocks,
            canvas_lengths=lengths,
            sequence_tokens=lengths if documents.blank is not None else documents.target_lengths + documents.ends,
        )
        of_tokens = {"position_ids": position_ids, "block_ids": block_ids, "is_noisy": is_noisy}
        if documents.blank is not None:
            of_tokens = {"position_ids": position_ids}
        return batch | tensors(**{name: x.reshape(rows.shape) for name, x in of_tokens.items()})

    def _num_blocks(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.block_length)

    def _contents(self, documents: Documents) -> tuple[np.ndarray, np.ndarray]:
        """What the canvases hold, one after the other, and their lengths (D,); in infilling the whole sequences."""
        targets, capacity = documents.target_lengths, self.max_length - len(self.prompt_specials)
        lengths = targets
        if documents.blank is None:
            ended = targets + documents.ends
            filled = np.minimum(self._num_blocks(ended) * self.block_length, capacity - documents.prompt_lengths)
            lengths = np.where(documents.ends > 0, np.maximum(filled, ended), ended)
        self.check_lengths(documents.prompt_lengths + lengths + len(self.prompt_specials), "sequence", self.specials)
        content = np.full(lengths.sum(), self.pad_token_id)
        content[segment_ranges(segment_starts(lengths), targets)] = documents.target_ids
        content[(segment_starts(lengths) + targets)[targets < lengths]] = self.eos_token_id
        self.check_content(content if documents.blank is None else content[documents.blank])
        return content, lengths

    def _masks(
        self, documents: Documents, bits: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Which tokens of the canvases are masked, as indices, and what a batch says of the blocks."""
        num_blocks = np.ones_like(lengths) if documents.blank is not None else self._num_blocks(lengths)
        number, of = segment_ranges(0, num_blocks), segment_numbers(num_blocks)
        sizes = lengths[of]
        if documents.blank is None:
            sizes = np.minimum(sizes - number * self.block_length, self.block_length)
        # The golden ratio, sqrt(2), sqrt(3) and 1 are linearly independent over the rationals: see `Documents`.
        draws, beta = (documents.low_discrepancy_draws(self.seed)[of] + number * math.sqrt(3)) % 1.0, self.mask_beta
        low, high = self.mask_range or (0.0, 1.0)
        if self.masking == "exact":
            if self.mask_range:
                least = np.maximum(np.ceil(low * sizes), 1)
                k = least + np.floor(draws * np.maximum(np.floor(high * sizes) - least + 1, 1))
                draws = (k - 0.5) / np.maximum(sizes, 1)
            masked, _, weights = exact_masks(bits, sizes, draws, beta or 1.0)
        else:
            t, weights = skewed_times(draws, beta or 1.0)
            t = low + (high - low) * t
            masked, weights = bernoulli_masks(bits, sizes, t), weights / t
        masks = np.flatnonzero(masked)
        weights = weights.astype(np.float32)
        names = ("loss_weights",) if self.mask_range else ("weights",)
        blocks = dict.fromkeys(names, weights)
        if beta is not None:
            blocks["loss_weights"] = np.ones_like(weights)
        return masks, {**blocks, "target_blocks": segment_numbers(sizes)[masks], "block_documents": of}

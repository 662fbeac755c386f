"""From examples to batches for the masked diffusion language model: the canvas, the time and the masks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from xlm_hf.modules.checked_options import Positive
from xlm_hf.modules.noise_schedules import make_whole_schedule
from xlm_hf.objectives.collation import Documents, segment_numbers
from xlm_hf.objectives.collators import CanvasCollator, Entry
from xlm_hf.objectives.corruption import bernoulli_masks, exact_masks, schedule_at, skewed_times
from xlm_hf.objectives.head_operator import IGNORED_ID


@dataclass(eq=False)
class MDLMCollator(CanvasCollator):
    """Documents `prompt [BOS] canvas` with a part of the canvas masked, and prompts `prompt [BOS]` for `generate`.

    The time (or the number of masks) is low-discrepancy over the epoch, the masks are functions of (seed, epoch,
    example_id), so neither depends on the rest of the batch. In infilling the blanks are the canvas, and what is masked
    and learnt.

    Further arguments are those of `CanvasCollator`.

    Args:
        masking: "bernoulli" draws t ~ U(0, 1] and masks each of the L canvas tokens with probability 1 - alpha_t, for a
            weight of -alpha'_t / (1 - alpha_t). "exact" draws k ~ U{1..L}, masks exactly k and tells the network a time
            from the law of t given k, for a weight of L / k. Both are unbiased for the same bound, and only the second
            has a finite variance.
        noise_schedule: alpha_t of "bernoulli", as `make_schedule` takes it; "exact" does not depend on it.
        mask_beta: None trains on the bound. A number, for training alone, draws k / L (rounded up) or t from
            Beta(mask_beta, 1), and every masked token counts 1 in the loss, as in MaskGIT (arXiv 2202.04200).

    A training batch holds, for D documents in B rows of at most L tokens, with M masks in all:
        input_ids (B, L): the documents with their masks, padded on the right.
        attention_mask (B, L): True for the documents, the `[PAD]` of their canvases included.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        logits_index (M,): the masks, as indices into the flattened (B x L) tokens.
        target_ids (M,): what they hide.
        target_documents (M,): the documents they belong to.
        alpha (B,): float32, alpha_t, which tells a time-conditioned network the time; (B, L) where a row holds several
            documents.
        weights (D,): float32, weight of the cross-entropy of each masked token of the document in the bound.
        loss_weights (D,): float32, the same in the loss, where `mask_beta` makes it another one.
        canvas_lengths (D,): L of each document, the tokens that could have been masked.
        sequence_tokens (D,): tokens of the text, and 1 for its end where it has one; in infilling the blanks.
        given_length (D,): True where the canvas tells the length of a text that ends, for want of padding.
        example_id: of the examples, as given.

    Raises:
        ValueError: for an unknown masking, or a schedule that is unknown or not whole.
    """

    entries = {
        **CanvasCollator.entries,
        "logits_index": Entry("target", index_of="position"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "target_documents": Entry("target", index_of="document"),
        "alpha": Entry("row"),
        "weights": Entry("document"),
        "loss_weights": Entry("document"),
        "canvas_lengths": Entry("document"),
        "sequence_tokens": Entry("document"),
        "given_length": Entry("document"),
    }

    masking: Literal["exact", "bernoulli"] = "exact"
    noise_schedule: str | Mapping[str, Any] = "log_linear"
    mask_beta: Positive | None = None

    def __post_init__(self):
        super().__post_init__()
        self.schedule = make_whole_schedule(self.noise_schedule)

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """The documents with masks among their canvases, their times and weights."""
        rows, starts, lengths = self.canvas(documents)
        index, bits = rows.index(starts, lengths), documents.random_bits(self.seed, lengths, starts)
        if documents.blank is not None:
            index, bits = index[documents.blank], bits[documents.blank]
            lengths = np.bincount(segment_numbers(lengths)[documents.blank], minlength=len(lengths))
        tokens = documents.target_lengths + documents.ends if documents.blank is None else lengths
        is_told = documents.blank is None and self.canvas_length is None
        content = rows.input_ids[index]
        self.check_content(content)
        draws, beta = documents.low_discrepancy_draws(self.seed), self.mask_beta or 1.0
        if self.masking == "exact":
            masked, alpha, weights = exact_masks(bits, lengths, draws, beta)
        else:
            t, weights = skewed_times(draws, beta)
            alpha, mask_probability, hazard = schedule_at(self.schedule, t)
            masked, weights = bernoulli_masks(bits, lengths, mask_probability), hazard * weights
        masks = np.flatnonzero(masked)
        rows.input_ids[index[masks]] = self.mask_token_id
        even = {} if self.mask_beta is None else {"loss_weights": np.ones(len(lengths), np.float32)}
        return rows.batch(
            logits_index=index[masks],
            target_ids=content[masks],
            target_documents=segment_numbers(lengths)[masks],
            alpha=rows.shared(alpha.astype(np.float32)),
            weights=weights.astype(np.float32),
            canvas_lengths=lengths,
            sequence_tokens=tokens,
            given_length=(documents.ends > 0) & is_told,
            **even,
        )

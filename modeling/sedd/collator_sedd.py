"""From examples to batches for score entropy diffusion: the canvas, the time, and masks or noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from xlm_hf.modules.checked_options import Positive
from xlm_hf.modules.noise_schedules import make_whole_schedule
from xlm_hf.objectives.collation import Documents, segment_numbers
from xlm_hf.objectives.collators import CanvasCollator, Entry
from xlm_hf.objectives.corruption import bernoulli_masks, exact_masks, exact_noise, mixed_noise, skewed_times
from xlm_hf.objectives.head_operator import IGNORED_ID


@dataclass(eq=False)
class SEDDCollator(CanvasCollator):
    """Documents `prompt [BOS] canvas` with masks or noise on the canvas, and prompts `prompt [BOS]` for `generate`.

    How much meets noise is low-discrepancy over the epoch, and what does is a function of (seed, epoch, example_id). In
    infilling the blanks are the canvas.

    Further arguments are those of `CanvasCollator`.

    Args:
        kernel: that of the model's configuration. "absorb" masks exactly k ~ U{1..L} of the L canvas tokens; "uniform"
            lets exactly k ~ U{0..L} meet noise. The time comes from its law given k (`exact_masks`, `exact_noise`).
        noise_schedule: of the model's configuration. Times are drawn in alpha, from 1 to 0, so nothing here depends on
            it. That of masks must be whole: a sampler that ends above pure noise would not have the law of the bound.
        noise_beta: None trains on the bound. A number, for training alone, draws t = 1 - alpha from Beta(noise_beta,
            1). With "absorb" every mask then counts 1, and with "uniform" every rate N alpha / (1 + kappa), kappa = N
            alpha / (1 - alpha), so that no time has much more weight than another.

    A training batch holds, for D documents in B rows of at most L tokens, with M targets in all:
        input_ids (B, L): the documents with their masks or noise, padded on the right.
        attention_mask (B, L): True for the documents, the `[PAD]` of their canvases included.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        is_given (B, L): True for tokens that have no noise at any time; in infilling.
        logits_index (M,): the masks, or with noise the canvases, as indices into the flattened (B x L) tokens.
        target_ids (M,): their clean tokens. target_documents (M,): the documents they belong to.
        alpha (B,): float32, alpha_t, which the network is told; (B, L) where a row holds several documents.
        noise (D,): float32, 1 - alpha_t, which is not rounded to 0.
        weights (D,): float32, weight in the bound of the rate of each target, for masks times 1 - alpha_t.
        loss_weights (D,): float32, the same in the loss, where `noise_beta` makes it another one.
        canvas_lengths (D,): tokens of each canvas.
        sequence_tokens (D,): tokens of the text, and 1 for its end where it has one; in infilling the blanks.
        given_length (D,): True where the canvas tells the length of a text that ends, for want of padding.
        example_id: of the examples, as given.

    Raises:
        ValueError: for an unknown kernel, a number out of its range, or a schedule of masks that is not whole.
    """

    entries = {
        **CanvasCollator.entries,
        "is_given": Entry("position"),
        "logits_index": Entry("target", index_of="position"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "target_documents": Entry("target", index_of="document"),
        "alpha": Entry("row"),
        **{name: Entry("document") for name in ("noise", "weights", "loss_weights")},
        **{name: Entry("document") for name in ("canvas_lengths", "sequence_tokens", "given_length")},
    }

    kernel: Literal["absorb", "uniform"] = "absorb"
    noise_schedule: str | Mapping[str, Any] = "log_linear"
    noise_beta: Positive | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.kernel == "absorb":
            make_whole_schedule(self.noise_schedule)

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """The documents with masks or noise on their canvases, their times and weights."""
        rows, starts, lengths = self.canvas(documents)
        index, bits = rows.index(starts, lengths), documents.random_bits(self.seed, lengths, starts)
        entries: dict[str, np.ndarray] = {}
        if documents.blank is not None:
            index, bits = index[documents.blank], bits[documents.blank]
            lengths = np.bincount(segment_numbers(lengths)[documents.blank], minlength=len(lengths))
            entries["is_given"] = np.ones(rows.shape, dtype=bool)
            entries["is_given"].reshape(-1)[index] = False
        tokens = documents.target_lengths + documents.ends if documents.blank is None else lengths
        is_told = documents.blank is None and self.canvas_length is None
        content, owners = rows.input_ids[index], segment_numbers(lengths)
        self.check_content(content)
        noise, weights, met = self._noise(documents.low_discrepancy_draws(self.seed), bits, lengths)
        if self.kernel == "absorb":
            index, content, owners = index[met], content[met], owners[met]
            rows.input_ids[index] = self.mask_token_id
        else:
            none = np.zeros(len(lengths))
            other, _ = mixed_noise(content, bits, lengths, none, none, self.writable_ids)
            rows.input_ids[index] = np.where(met, other, content)
        if self.noise_beta is not None:
            entries["loss_weights"] = np.ones_like(noise, dtype=np.float32)
            if self.kernel == "uniform":
                alpha_n = len(self.writable_ids) * (1 - noise)
                entries["loss_weights"] = (alpha_n / (1 + alpha_n / noise)).astype(np.float32)
        return rows.batch(
            logits_index=index,
            target_ids=content,
            target_documents=owners,
            alpha=rows.shared((1 - noise).astype(np.float32)),
            noise=noise.astype(np.float32),
            weights=weights.astype(np.float32),
            canvas_lengths=lengths,
            sequence_tokens=tokens,
            given_length=(documents.ends > 0) & is_told,
            **entries,
        )

    def _noise(
        self, draws: np.ndarray, bits: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """1 - alpha and the weight in the bound of each document, float64 (D,), and which tokens (N,) meet noise."""
        if self.noise_beta is not None:
            noise, weights = skewed_times(draws, self.noise_beta)
            met, of_masks = bernoulli_masks(bits, lengths, noise), 1 / noise
            weights = weights * of_masks if self.kernel == "absorb" else weights
        elif self.kernel == "absorb":
            met, alpha, weights = exact_masks(bits, lengths, draws)
            noise = 1 - alpha
        else:
            noise, weights, met = exact_noise(bits, lengths, draws)
        # What float32 does not round to 0.
        return np.maximum(noise, 1e-30), weights, met

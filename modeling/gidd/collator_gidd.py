"""From examples to batches for GIDD: the canvas, the time, the noise and the weights of the bound."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch

from xlm_hf.modules.checked_options import Interval, PartialShare, Positive
from xlm_hf.objectives.collation import Documents, Examples, ragged, segment_numbers
from xlm_hf.objectives.collators import CanvasCollator, Entry
from xlm_hf.objectives.corruption import mixed_noise, skewed_times
from xlm_hf.objectives.head_operator import IGNORED_ID

from .kernel_gidd import MixedKernel

# The largest weight of "clip".
_MAX_WEIGHT = 2.0
# Beyond this t the rate of the bound, which goes to 0, is taken to be 0; below 1, where alpha_t and U_t vanish.
_LAST_TIME = 1 - 2.0**-40


def bound_weights(
    t: np.ndarray, share: np.ndarray, gamma: float, is_mask: np.ndarray, is_kept: np.ndarray
) -> np.ndarray:
    """w_t(z, x) = rho(z) / q_t(z | x) of the bound (see `HybridBound`), for the noise of `MixedKernel`.

    With h = 1 / (1 - t) + c'_t / c_t it is 1 / (t (1 - t)) at a mask, h where z is another token than x, and h times
    the `share` of noise in q_t(x | x), (U_t / N) / (alpha_t + U_t / N), where z = x.

    Args:
        t: (M,) in (0, 1), float64.
        share: (M,) as above; 0 without uniform noise.
        gamma: of the kernel.
        is_mask: (M,) whether z is the mask.
        is_kept: (M,) whether z = x.
    """
    at_mask = 1 / (t * (1 - t))
    # c' / c = (g / 2) (1 - 2t) / (t (1 - t)).
    replaced = (t + gamma / 2 * (1 - 2 * t)) * at_mask
    return np.where(is_mask, at_mask, np.where(is_kept, replaced * share, replaced))


@dataclass(eq=False)
class GIDDCollator(CanvasCollator):
    """Documents `prompt [BOS] canvas` with masks and uniform noise on the canvas, and prompts for `generate`.

    The time is low-discrepancy over the epoch, the noise is a function of (seed, epoch, example_id), so neither depends
    on the rest of the batch. In infilling the blanks are the canvas.

    Further arguments are those of `CanvasCollator`.

    Args:
        uniform_share: of the noise, that of the model's configuration.
        gamma: likewise.
        loss_weighting: "bound" trains on the bound. The others are for training alone. "clip" cuts the weights of the
            bound off at 2. "dynamic" multiplies them by 2 t (1 - t), so that a mask counts 2 at all times, and "even"
            by t, so that a mask's cross-entropy counts alike. These are factors of the time, so the best prediction at
            each noisy canvas stays that of the bound; with "clip" it does not. "denoising" is the cross-entropy of the
            clean tokens, at all positions alike (see `GIDDLoss`).
        corrects: whether prompts for `generate` come with the texts of the column `source_ids`, which the sampler
            "self_correction" corrects. They get the `[EOS]` of a finished text, if
            the canvas has a position for it.
        noise_beta: with another weighting than the bound's the time is drawn from Beta(noise_beta, 1). None means 1,
            the published choice; above 1 canvases are noisier. For the bound it is Beta(gamma / 4, 1), by importance
            weights, for a finite variance: the weights of the bound grow as 1 / t.

    A training batch holds, for D documents in B rows of at most L tokens, with M canvas tokens in all:
        input_ids (B, L): the documents with their noise, padded on the right.
        attention_mask (B, L): True for the documents, the `[PAD]` of their canvases included.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        is_given (B, L): True for tokens that have no noise at any time; in infilling.
        logits_index (M,): the canvases, as indices into the flattened (B x L) tokens.
        target_ids (M,): their clean tokens. target_documents (M,): the documents they belong to.
        timesteps (B,): float32, the time t, which the network is told; (B, L) where a row holds several documents.
        alpha, uniform (D,): float32, alpha_t and U_t / N of each document.
        weights (M,): float32, the weight of each token in the bound, over the density of t; not with "denoising".
        loss_weights (M,): float32, that in the loss, where it is another one.
        canvas_lengths (D,): tokens of each canvas.
        sequence_tokens (D,): tokens of the text, and 1 for its end where it has one; in infilling the blanks.
        given_length (D,): True where the canvas tells the length of a text that ends, for want of padding.
        example_id: of the examples, as given.

    Raises:
        ValueError: for an unknown weighting, a number out of its range, or `noise_beta` with the bound.
    """

    entries = {
        **CanvasCollator.entries,
        "is_given": Entry("position"),
        "logits_index": Entry("target", index_of="position"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "target_documents": Entry("target", index_of="document"),
        "timesteps": Entry("row"),
        **{name: Entry("example") for name in ("source_ids", "source_mask")},
        **{name: Entry("target") for name in ("weights", "loss_weights")},
        **{name: Entry("document") for name in ("alpha", "uniform")},
        **{name: Entry("document") for name in ("canvas_lengths", "sequence_tokens", "given_length")},
    }

    uniform_share: PartialShare = 0.2
    gamma: Annotated[float, Interval("(0, 2]")] = 1.0
    loss_weighting: Literal["bound", "clip", "dynamic", "even", "denoising"] = "bound"
    noise_beta: Positive | None = None
    corrects: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.noise_beta is not None and self.loss_weighting == "bound":
            raise ValueError(
                f"noise_beta is {self.noise_beta} and loss_weighting {self.loss_weighting!r}: noise_beta chooses the "
                "times of another weighting than the bound's, such as 'dynamic'."
            )
        self.kernel = MixedKernel(uniform_share=self.uniform_share, gamma=self.gamma)

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """The documents with noise on their canvases, their times and weights."""
        rows, starts, lengths = self.canvas(documents)
        index, bits = rows.index(starts, lengths), documents.random_bits(self.seed, lengths, starts)
        entries: dict[str, np.ndarray] = {}
        if documents.blank is not None:
            entries["is_given"] = np.ones(rows.shape, dtype=bool)
            index, bits = index[documents.blank], bits[documents.blank]
            entries["is_given"].reshape(-1)[index] = False
            lengths = np.bincount(segment_numbers(lengths)[documents.blank], minlength=len(lengths))
        tokens = documents.target_lengths + documents.ends if documents.blank is None else lengths
        is_told = documents.blank is None and self.canvas_length is None
        content = rows.input_ids[index]
        self.check_content(content)
        draws, gamma = documents.low_discrepancy_draws(self.seed), self.kernel.gamma
        beta = gamma / 4 if self.loss_weighting == "bound" else self.noise_beta or 1.0
        t, over_density = skewed_times(draws, beta)
        t = np.minimum(t, _LAST_TIME)
        alpha, mask, uniform = (share.numpy() for share in self.kernel.shares(torch.from_numpy(t)))
        uniform = uniform / len(self.writable_ids)
        noisy, _ = mixed_noise(content, bits, lengths, alpha, mask, self.writable_ids, self.mask_token_id)
        rows.input_ids[index] = noisy
        of_tokens, share, over_density = (np.repeat(x, lengths) for x in (t, uniform / (alpha + uniform), over_density))
        weights = bound_weights(of_tokens, share, gamma, noisy == self.mask_token_id, noisy == content)
        if self.loss_weighting == "denoising":
            entries["loss_weights"] = np.ones_like(weights)
        else:
            entries["weights"] = weights * over_density
        if self.loss_weighting in ("clip", "dynamic", "even"):
            entries["loss_weights"] = self._training_weights(of_tokens, weights)
        return rows.batch(
            logits_index=index,
            target_ids=content,
            target_documents=segment_numbers(lengths),
            timesteps=rows.shared(t.astype(np.float32)),
            alpha=alpha.astype(np.float32),
            # What float32 does not round to 0.
            uniform=np.maximum(uniform, 1e-30).astype(np.float32),
            canvas_lengths=lengths,
            sequence_tokens=tokens,
            given_length=(documents.ends > 0) & is_told,
            **{name: x if x.dtype == bool else x.astype(np.float32) for name, x in entries.items()},
        )

    def prediction_batch(self, examples: Examples) -> dict[str, torch.Tensor]:
        """The prompts for `generate`, and the texts that are to be corrected, padded on the right."""
        batch = super().prediction_batch(examples)
        if self.corrects:
            ids, lengths = ragged([[*e["source_ids"], self.eos_token_id][: self.canvas_length] for e in examples])
            self.check_content(ids)
            mask = np.arange(lengths.max()) < lengths[:, None]
            padded = np.full(mask.shape, self.pad_token_id)
            padded[mask] = ids
            batch.update(source_ids=torch.from_numpy(padded), source_mask=torch.from_numpy(mask))
        return batch

    def _training_weights(self, t: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """What stands in the loss for the `weights` (M,) of the bound at times t (M,)."""
        if self.loss_weighting == "clip":
            return np.minimum(weights, _MAX_WEIGHT)
        return weights * (t if self.loss_weighting == "even" else 2 * t * (1 - t))

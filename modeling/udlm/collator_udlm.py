"""From examples to batches for uniform diffusion: the canvas, the time and the noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from xlm_hf.modules.checked_options import Positive, check_arguments
from xlm_hf.modules.noise_schedules import make_whole_schedule
from xlm_hf.objectives.collation import Documents, segment_numbers
from xlm_hf.objectives.collators import CanvasCollator, Entry
from xlm_hf.objectives.corruption import bernoulli_masks, exact_noise, mixed_noise, schedule_at, skewed_times
from xlm_hf.objectives.head_operator import IGNORED_ID

from .curriculum_udlm import uniform_noise


def published_curriculum(gamma_min: float = -3.55, gamma_max: float = -1.85, temperature: Positive = 1e-3) -> dict:
    """The options of the curriculum by name; by default those published for OpenWebText (arXiv 2506.10892)."""
    return {"gamma_min": gamma_min, "gamma_max": gamma_max, "temperature": temperature}


@dataclass(eq=False)
class UDLMCollator(CanvasCollator):
    """Documents `prompt [BOS] canvas` with uniform noise on the canvas, and prompts `prompt [BOS]` for `generate`.

    The time is low-discrepancy over the epoch, the noise is a function of (seed, epoch, example_id), so neither depends
    on the rest of the batch. In infilling the blanks are the canvas.

    Further arguments are those of `CanvasCollator`.

    Args:
        noise_schedule: alpha_t of "bernoulli", as `make_schedule` takes it: that of the model's configuration. The
            bound does not depend on it.
        noising: "exact" draws k ~ U{0..L}, lets exactly k of the L canvas tokens meet noise, and tells the network a
            time from the law of t given k. "bernoulli" draws t = v^2, v ~ U(0, 1], and lets each token meet noise with
            probability 1 - alpha_t. Both are unbiased for the same bound with finite variances, and the first has the
            smaller one.
        noise_beta: None trains on the bound. A number, for training alone, draws t from Beta(noise_beta, 1) and noise
            as in "bernoulli"; the loss is the denoiser's cross-entropy at every position alike (see `UDLMLoss`). Above
            1 it shows noisier canvases.
        curriculum: None, or for training alone options of Duo's Gaussian curriculum (`gamma_min`, `gamma_max`,
            `temperature`; {} takes the published ones).

    A training batch holds, for D documents in B rows of at most L tokens, with M canvas tokens in all:
        input_ids (B, L): the documents with their noise, padded on the right; with a curriculum without.
        attention_mask (B, L): True for the documents, the `[PAD]` of their canvases included.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        is_given (B, L): True for tokens that have no noise at any time; in infilling.
        logits_index (M,): the canvases, as indices into the flattened (B x L) tokens.
        target_ids (M,): their clean tokens. target_documents (M,): the documents they belong to.
        noise_keys (M,): random bits of each; gamma, temperature (D,): of the noise. With a curriculum.
        alpha (B,): float32, alpha_t, which the network is told; (B, L) where a row holds several documents.
        noise (D,): float32, 1 - alpha_t, which is not rounded to 0.
        weights (D,): float32, weight of the rate of the bound at each token of the document.
        loss_weights (D,): float32, that of the loss, in its place, with `noise_beta` or a curriculum.
        canvas_lengths (D,): tokens of each canvas.
        sequence_tokens (D,): tokens of the text, and 1 for its end where it has one; in infilling the blanks.
        given_length (D,): True where the canvas tells the length of a text that ends, for want of padding.
        example_id: of the examples, as given.

    Raises:
        ValueError: for an unknown noising, a number out of its range, an unknown option of the curriculum, or a
            schedule that is unknown or not whole.
    """

    entries = {
        **CanvasCollator.entries,
        "is_given": Entry("position"),
        "logits_index": Entry("target", index_of="position"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "target_documents": Entry("target", index_of="document"),
        "noise_keys": Entry("target"),
        "alpha": Entry("row"),
        **{name: Entry("document") for name in ("noise", "gamma", "temperature", "weights", "loss_weights")},
        **{name: Entry("document") for name in ("canvas_lengths", "sequence_tokens", "given_length")},
    }

    noise_schedule: str | Mapping[str, Any] = "log_linear"
    noising: Literal["exact", "bernoulli"] = "exact"
    noise_beta: Positive | None = None
    curriculum: Mapping[str, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.noise_beta is not None and self.curriculum is not None:
            raise ValueError("noise_beta and curriculum are two objectives of training: set one of them to null.")
        if self.curriculum is not None:
            check_arguments("curriculum", dict(self.curriculum), published_curriculum)
            self.curriculum = published_curriculum(**self.curriculum)
        self.schedule = make_whole_schedule(self.noise_schedule)

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
        draws = documents.low_discrepancy_draws(self.seed)
        if self.curriculum is not None:
            of_noise, entries["noise_keys"] = self._gaussian_times(draws), bits.view(np.int64)
        else:
            of_noise, met = self._uniform_noise(draws, bits, lengths)
            none = np.zeros(len(lengths))
            other, _ = mixed_noise(content, bits, lengths, none, none, self.writable_ids)
            rows.input_ids[index] = np.where(met, other, content)
        return rows.batch(
            logits_index=index,
            target_ids=content,
            target_documents=segment_numbers(lengths),
            alpha=rows.shared((1 - of_noise["noise"]).astype(np.float32)),
            canvas_lengths=lengths,
            sequence_tokens=tokens,
            given_length=(documents.ends > 0) & is_told,
            **entries,
            **{name: values.astype(np.float32) for name, values in of_noise.items()},
        )

    def _gaussian_times(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        """What belongs to the time of each document with a curriculum, float64 (D,), by the names of its entries."""
        options: Any = self.curriculum
        low, high, temperature = (options[name] for name in ("gamma_min", "gamma_max", "temperature"))
        gamma = low + (high - low) * draws
        noise, slope = uniform_noise(gamma, len(self.writable_ids))
        of_temperature = {"temperature": np.full_like(gamma, temperature)}
        return {"noise": noise, "gamma": gamma, "loss_weights": slope * (high - low), **of_temperature}

    def _uniform_noise(
        self, draws: np.ndarray, bits: np.ndarray, lengths: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What belongs to the time of each document, likewise, and which tokens (N,) meet noise."""
        if self.noising == "exact" and self.noise_beta is None:
            noise, weights, met = exact_noise(bits, lengths, draws)
        else:
            t, weights = skewed_times(draws, self.noise_beta or 0.5)
            _, noise, hazard = schedule_at(self.schedule, t)
            met, weights = bernoulli_masks(bits, lengths, noise), hazard * noise * weights
        # What float32 does not round to 0.
        noise = np.maximum(noise, 1e-30)
        if self.noise_beta is not None:
            return {"noise": noise, "loss_weights": np.ones_like(noise)}, met
        return {"noise": noise, "weights": weights}, met

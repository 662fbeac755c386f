"""From examples to batches for Gaussian diffusion: the canvas, the time and the noise."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch

from xlm_hf.modules.checked_options import Interval, Positive, PositiveInt
from xlm_hf.objectives.collation import Documents, segment_numbers
from xlm_hf.objectives.collators import CanvasCollator, Entry
from xlm_hf.objectives.corruption import skewed_times
from xlm_hf.objectives.head_operator import IGNORED_ID


@dataclass(eq=False)
class PlaidCollator(CanvasCollator):
    """Documents `prompt [BOS] canvas`, Gaussian noise for the canvas, and prompts `prompt [BOS]` for `generate`.

    The time is low-discrepancy over the epoch, the noise is a function of (seed, epoch, example_id), so neither depends
    on the rest of the batch. In infilling the blanks are the canvas.

    Further arguments are those of `CanvasCollator`.

    Args:
        embedding_size: dimensions of the noise of a token: that of the model's configuration.
        reconstruction_share: rho, the share of the documents that have time 0 and estimate the reconstruction term of
            the bound; all others have a uniform time and estimate its diffusion term. Both are weighted so that the sum
            is unbiased.
        self_conditioning: share of the documents of which the network is shown what it expected of them before. A
            bound is of what `generate` does, which always shows it; in training a quarter is as published.
        noise_beta: None trains on the bound. A number, for training alone, draws times from Beta(noise_beta, 1), and
            the loss is the cross-entropy of the tokens at every position alike (see `PlaidLoss`). Above 1 it shows
            noisier canvases.

    A training batch holds, for D documents in B rows of at most L tokens, with M canvas tokens in all:
        input_ids (B, L): the documents, clean, padded on the right.
        attention_mask (B, L): True for the documents, the `[PAD]` of their canvases included.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        is_canvas (B, L): True for tokens of which the network sees noisy vectors.
        noise (B, L, embedding_size): float32, normal on the canvas and 0 elsewhere.
        times (D,): float32, of the noise.
        time_index (B,): the document of each row, whose time it has; (B, L), that of each token, where a row holds
            several documents.
        self_conditioned (B,) or (B, L): likewise, whether its document is.
        logits_index (M,): the canvases, as indices into the flattened (B x L) tokens.
        target_ids (M,): their tokens. target_documents (M,): the documents they belong to.
        is_reconstruction (D,): True where the loss is the cross-entropy.
        weights (D,): float32, 1 / rho or 1 / (1 - rho). loss_weights (D,): 1 in its place, with `noise_beta`.
        canvas_lengths (D,): tokens of each canvas.
        sequence_tokens (D,): tokens of the text, and 1 for its end where it has one; in infilling the blanks.
        given_length (D,): True where the canvas tells the length of a text that ends, for want of padding.
        example_id: of the examples, as given.

    Raises:
        ValueError: for a number out of its range.
    """

    entries = {
        **CanvasCollator.entries,
        "is_canvas": Entry("position", padding=0),
        "noise": Entry("position", padding=0),
        "times": Entry("document"),
        "time_index": Entry("row", index_of="document"),
        "self_conditioned": Entry("row"),
        "logits_index": Entry("target", index_of="position"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "target_documents": Entry("target", index_of="document"),
        **{name: Entry("document") for name in ("is_reconstruction", "weights", "loss_weights")},
        **{name: Entry("document") for name in ("canvas_lengths", "sequence_tokens", "given_length")},
    }

    embedding_size: PositiveInt = 16
    reconstruction_share: Annotated[float, Interval("(0, 1)")] = 0.125
    self_conditioning: Annotated[float, Interval("[0, 1]")] = 1.0
    noise_beta: Positive | None = None

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """The documents, the noise of their canvases, their times and weights."""
        rows, starts, lengths = self.canvas(documents)
        index = rows.index(starts, lengths)
        uniforms = documents.uniforms(self.seed, "noise", lengths, starts, num=self.embedding_size)
        if documents.blank is not None:
            index, uniforms = index[documents.blank], uniforms[documents.blank]
            lengths = np.bincount(segment_numbers(lengths)[documents.blank], minlength=len(lengths))
        self.check_content(rows.input_ids[index])
        noise, is_canvas = np.zeros((*rows.shape, self.embedding_size), np.float32), np.zeros(rows.shape, dtype=bool)
        # At 0 a normal number would be infinite; 2^-54 is less than any other number here.
        normal = torch.special.ndtri(torch.from_numpy(uniforms + 2.0**-54))
        noise.reshape(-1, self.embedding_size)[index] = normal.numpy()
        is_canvas.reshape(-1)[index] = True
        is_told = documents.blank is None and self.canvas_length is None
        shown = documents.uniforms(self.seed, "self-conditioning") < self.self_conditioning
        return rows.batch(
            is_canvas=is_canvas,
            noise=noise,
            time_index=rows.shared(np.arange(len(lengths))),
            self_conditioned=rows.shared(shown),
            logits_index=index,
            target_ids=rows.input_ids[index],
            target_documents=segment_numbers(lengths),
            canvas_lengths=lengths,
            sequence_tokens=documents.target_lengths + documents.ends if documents.blank is None else lengths,
            given_length=(documents.ends > 0) & is_told,
            **self._of_documents(documents.low_discrepancy_draws(self.seed)),
        )

    def _of_documents(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Times (D,) and what belongs to them, by the names of their entries."""
        if self.noise_beta is not None:
            times, _ = skewed_times(draws, self.noise_beta)
            is_reconstruction, weights = np.ones_like(draws, dtype=bool), np.ones_like(draws)
        else:
            share = self.reconstruction_share
            is_reconstruction = draws < share
            times = np.where(is_reconstruction, 0.0, (draws - share) / (1 - share))
            weights = 1 / np.where(is_reconstruction, share, 1 - share)
        name = "weights" if self.noise_beta is None else "loss_weights"
        return {
            "times": times.astype(np.float32),
            "is_reconstruction": is_reconstruction,
            name: weights.astype(np.float32),
        }

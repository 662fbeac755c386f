"""From examples to batches for flexible masked diffusion: which tokens are absent, and which are masks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from xlm_hf.modules.checked_options import Positive
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.objectives.collation import Documents, segment_numbers, segment_starts
from xlm_hf.objectives.collators import Collator, Entry
from xlm_hf.objectives.corruption import schedule_at, skewed_times
from xlm_hf.objectives.head_operator import IGNORED_ID


@dataclass(eq=False)
class FlexMDMCollator(Collator):
    """Documents `prompt [BOS] target` with a part of the target absent and a part masked, and prompts `prompt [BOS]`.

    At time t, which falls from 1 (nothing) to 0 (the text), a token is absent with probability 1 - alpha_t, alpha being
    the insertion schedule. One that came at the time s > t is still a mask with probability (1 - beta_t) / (1 -
    beta_s), beta being the unmasking schedule (arXiv 2509.01025, section 4). Times are low-discrepancy over the epoch;
    all other draws are functions of (seed, epoch, example_id) and the document's number alone.

    In infilling the mask tokens of an example are what is absent or masked, and a run of them is one open gap: how many
    tokens it hides is not told. All other gaps are closed.

    Further arguments are those of `Collator`.

    Args:
        insertion_schedule: alpha, as `make_schedule` takes it; that of the model.
        unmasking_schedule: likewise beta.
        noise_beta: None trains on the bound, with t = v^2 for uniform v, which keeps the variance of its weights
            finite. A number, for training alone, draws t from Beta(noise_beta, 1), and every mask and every gap counts
            1 in the loss: a larger one shows emptier states.
        end_token: that of the model: "eos" or "pad" stands behind the text, and gaps are those left of a token.

    A training batch holds, for D documents in B rows of at most L tokens, with M masks and G gaps in all:
        input_ids (B, L): what is there of the documents, padded on the right.
        attention_mask (B, L): True for tokens.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        times (B,): float32, t; (B, L) where a row holds several documents. A share that is left, not one that is done:
            float32 tells small ones apart.
        logits_index (M,): the masks, as indices into the flattened (B x L) tokens.
        target_ids, target_documents (M,): what they hide, and the documents they belong to.
        gap_index (G,): the tokens whose gaps are open, as indices into the flattened (B x L) tokens.
        gap_counts, gap_documents (G,): how many tokens are missing there, and the documents.
        unmasking_weights, insertion_weights (D,): float32, weights of the losses of each mask and each gap in the
            bound: the hazards of the two schedules, divided by the density of t.
        loss_weights (D,): float32, in their place in the loss, with `noise_beta`.
        sequence_tokens (D,): tokens of the text, and 1 for its end where it has one; in infilling the hidden ones.
        open_gaps (D,): True in infilling.
        example_id: of the examples, as given.
    """

    layouts = {"lm": "[BOS] target", "seq2seq": "prompt [BOS] target", "infill": "[BOS] target"}
    entries = {
        **Collator.entries,
        "times": Entry("row"),
        "logits_index": Entry("target", index_of="position"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "target_documents": Entry("target", index_of="document"),
        "gap_index": Entry("gap", index_of="position"),
        "gap_counts": Entry("gap", padding=IGNORED_ID),
        "gap_documents": Entry("gap", index_of="document"),
        "unmasking_weights": Entry("document"),
        "insertion_weights": Entry("document"),
        "loss_weights": Entry("document"),
        "sequence_tokens": Entry("document"),
        "open_gaps": Entry("document"),
    }

    insertion_schedule: str | Mapping[str, Any] = "linear"
    unmasking_schedule: str | Mapping[str, Any] = "linear"
    noise_beta: Positive | None = None
    end_token: Literal["eos", "pad"] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.insertion = make_schedule(self.insertion_schedule)
        self.unmasking = make_schedule(self.unmasking_schedule)
        self.end_token_id = self.end_token and getattr(self.tokenizer, f"{self.end_token}_token_id")

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """What is there of the documents at their times, the tokens behind the masks, and what is missing where."""
        lengths, targets, has_end = documents.target_lengths, documents.target_ids, self.end_token_id is not None
        self.check_lengths(documents.prompt_lengths + len(self.specials) + lengths + has_end, "sequence", self.specials)
        self.check_content(targets)
        t, density_weights = skewed_times(documents.low_discrepancy_draws(self.seed), self.noise_beta or 0.5)
        hidden = np.ones(len(targets), dtype=bool) if documents.blank is None else documents.blank
        absent, masked = self.corrupted(documents, t, hidden)
        there, of_tokens = ~absent, segment_numbers(lengths)
        num_kept = lengths - np.bincount(of_tokens[absent], minlength=len(lengths))
        rows, starts = self.rows_of(documents, num_kept + has_end)
        rows.write(starts, num_kept, np.where(masked, self.mask_token_id, targets)[there])
        if has_end:
            rows.input_ids[rows.first + starts + num_kept] = self.end_token_id

        # A gap for [BOS] and for each token that is there; an absent token is missing in that of the last one before.
        gaps = num_kept + 1
        counts = np.bincount((there.cumsum() + of_tokens)[absent], minlength=gaps.sum())
        is_open = self.open_gaps(hidden, there, lengths, gaps)
        even = {} if self.noise_beta is None else {"loss_weights": np.ones(len(lengths), np.float32)}
        of_blanks = np.bincount(of_tokens[hidden], minlength=len(lengths))
        hazards = [schedule_at(schedule, t)[2] * density_weights for schedule in (self.unmasking, self.insertion)]
        return rows.batch(
            times=rows.shared(t.astype(np.float32)),
            logits_index=rows.index(starts, num_kept)[masked[there]],
            target_ids=targets[masked],
            target_documents=of_tokens[masked],
            gap_index=rows.index(starts - 1 + has_end, gaps)[is_open],
            gap_counts=counts[is_open],
            gap_documents=segment_numbers(gaps)[is_open],
            unmasking_weights=hazards[0].astype(np.float32),
            insertion_weights=hazards[1].astype(np.float32),
            sequence_tokens=lengths + documents.ends if documents.blank is None else of_blanks,
            open_gaps=np.full(len(lengths), documents.blank is not None),
            **even,
        )

    def corrupted(self, documents: Documents, t: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens are absent and which are masks at the times t (D,) of their documents, among the `hidden`."""
        streams, lengths = ("insertion", "unmasking"), documents.target_lengths
        come, turn = (documents.uniforms(self.seed, stream, lengths) for stream in streams)
        # What depends on the time alone is computed once for each document.
        shares = [s.mask_probability(torch.from_numpy(t)).numpy() for s in (self.insertion, self.unmasking)]
        absent_share, mask_share = (np.repeat(share, lengths) for share in shares)
        absent = hidden & (come < absent_share)
        came_at = self.insertion.inverse(1 - torch.from_numpy(come))
        still_mask = turn * self.unmasking.mask_probability(came_at).numpy() < mask_share
        return absent, hidden & ~absent & still_mask

    @staticmethod
    def open_gaps(hidden: np.ndarray, there: np.ndarray, lengths: np.ndarray, gaps: np.ndarray) -> np.ndarray:
        """Which gaps are open: those beside a hidden token."""
        is_open = np.ones(gaps.sum(), dtype=bool)
        if hidden.all():
            return is_open
        first, has_tokens = segment_starts(gaps), lengths > 0
        before_hidden = np.append(hidden[1:], False)
        before_hidden[(lengths.cumsum() - 1)[has_tokens]] = False
        is_first = np.zeros_like(is_open)
        is_first[first] = True
        is_open[~is_first] = (hidden | before_hidden)[there]
        is_open[first[has_tokens]] = hidden[segment_starts(lengths)[has_tokens]]
        return is_open

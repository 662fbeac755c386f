"""From examples to batches for the masked diffusion language model: the canvas, the time and the masks."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from xlm_hf.modules.counter_random import low_discrepancy, uniform
from xlm_hf.modules.messages import did_you_mean
from xlm_hf.modules.noise_schedules import NOISE_SCHEDULES

MASKINGS = ("exact", "bernoulli")


def _column(examples: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.from_numpy(np.fromiter((example[name] for example in examples), dtype=np.int64, count=len(examples)))


class _MDLMCollator:
    """What all collators of the family share: special ids, padding, and the checks on what comes in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int = 0):
        self.pad_token_id = tokenizer.pad_token_id
        self.mask_token_id = tokenizer.mask_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = tokenizer.eos_token_id
        self.vocab_size = len(tokenizer)
        self.max_length = max_length
        self.seed = seed

    def _pad(self, rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Check rows of ids and pad them: ids and the mask of what is not padding, both (B, longest).

        Raises:
            ValueError: if an id is outside the vocabulary or a row does not fit.
        """
        lengths = torch.from_numpy(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
        values = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
        outside = values[(values < 0) | (values >= self.vocab_size)]
        if len(outside):
            raise ValueError(
                f"Token id {int(outside[0])} is outside the vocabulary of {self.vocab_size}: tokenize the data with "
                "the tokenizer of this run."
            )
        longest = int(lengths.max())
        if longest > self.max_length:
            raise ValueError(
                f"A sequence has {longest} tokens with its special ones and its canvas, and the model has "
                f"{self.max_length} positions: shorten it or raise max_position_embeddings."
            )
        columns = torch.arange(longest)
        real = columns < lengths[:, None] if side == "right" else columns >= longest - lengths[:, None]
        return torch.full((len(rows), longest), self.pad_token_id).masked_scatter_(real, torch.from_numpy(values)), real

    def _prompts(self, examples: list[dict[str, Any]], rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = self._pad(rows, "left")
        return {"input_ids": input_ids, "attention_mask": attention_mask, "example_id": _column(examples, "example_id")}


class _MDLMTrainingCollator(_MDLMCollator):
    """Draws times and masks.

    Args:
        tokenizer: names the special tokens.
        max_length: positions of the model; a longer sequence is refused.
        seed: of the corruption.
        canvas_length: places of the canvas: the text, `[EOS]` and `[PAD]` up to here; a text that fills the canvas has
            no `[EOS]`. None means the text and one `[EOS]`.
        masking: "bernoulli" draws t ~ U(0, 1] and masks each of the L canvas tokens with probability 1 - alpha_t, for a
            weight of -alpha'_t / (1 - alpha_t). "exact" draws k ~ U{1..L}, masks exactly k and tells the network a time
            from the law of t given k, for a weight of L / k. Both are unbiased for the same bound; the weight of the
            first is unbounded and its variance infinite (a mask at a time near 0 is rare and counts 1 / t), that of
            the second at most L.
        noise_schedule: alpha_t of "bernoulli", a name from `NOISE_SCHEDULES`; "exact" does not depend on it.

    Raises:
        ValueError: for an unknown masking or schedule.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int = 0,
        canvas_length: int | None = None,
        masking: str = "exact",
        noise_schedule: str = "log_linear",
    ):
        super().__init__(tokenizer, max_length, seed)
        if masking not in MASKINGS:
            raise ValueError(f"masking {masking!r} does not exist: {did_you_mean(masking, MASKINGS)}")
        if noise_schedule not in NOISE_SCHEDULES:
            raise ValueError(
                f"noise_schedule {noise_schedule!r} does not exist: {did_you_mean(noise_schedule, NOISE_SCHEDULES)}"
            )
        writable = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
        self.never_written = torch.tensor(sorted(set(tokenizer.all_special_ids) - writable))
        self.canvas_length = canvas_length
        self.masking = masking
        self.schedule = NOISE_SCHEDULES[noise_schedule]

    def _canvas(self, text: Sequence[int]) -> list[int]:
        """The text, `[EOS]` if there is room, and `[PAD]` up to the end."""
        if self.canvas_length is None:
            return [*text, self.eos_token_id]
        if len(text) > self.canvas_length:
            raise ValueError(
                f"A text has {len(text)} tokens and the canvas {self.canvas_length} places: raise canvas_length "
                "(max_new_tokens of the task)."
            )
        ended = [*text, self.eos_token_id][: self.canvas_length]
        return ended + [self.pad_token_id] * (self.canvas_length - len(ended))

    def _write(self, examples, prompts, texts) -> dict[str, torch.Tensor]:
        """Batches of `prompt [BOS] canvas`."""
        rows = [[*p, self.bos_token_id, *self._canvas(t)] for p, t in zip(prompts, texts, strict=True)]
        ids, real = self._pad(rows, "right")
        starts = torch.from_numpy(np.fromiter(map(len, prompts), dtype=np.int64, count=len(rows))) + 1
        return self._corrupt(examples, ids, real, real & (torch.arange(ids.shape[1]) >= starts[:, None]))

    def _corrupt(self, examples, ids, attention_mask, maskable) -> dict[str, torch.Tensor]:
        """Mask a part of `maskable`; all of (B, L)."""
        special = ids[maskable & torch.isin(ids, self.never_written)]
        if len(special):
            raise ValueError(
                f"A text holds the special token {int(special[0])}, which this model never writes: tokenize the data "
                "without special tokens."
            )
        epoch, position, example_id = (_column(examples, name) for name in ("epoch", "position", "example_id"))
        lengths = maskable.sum(dim=-1)
        u = low_discrepancy(self.seed, epoch, position)
        keys = uniform(self.seed, epoch[:, None], example_id[:, None], torch.arange(ids.shape[1]))
        keys = keys.masked_fill(~maskable, 1.0)
        if self.masking == "exact":
            k = (u * lengths).long() + 1
            # The k smallest of L uniform keys are a uniformly random k-subset, and the k-th is, independently, a
            # Beta(k, L - k + 1) draw: the law of the mask probability given that k of L tokens are masked.
            threshold = keys.sort(dim=-1).values.gather(-1, k[:, None] - 1).squeeze(-1)
            masked = maskable & (keys <= threshold[:, None])
            alpha, weights = 1 - threshold, lengths / k
        else:
            t = 1 - u
            alpha, weights = self.schedule.alpha(t), self.schedule.weight(t)
            masked = maskable & (keys < self.schedule.mask_probability(t)[:, None])
        return {
            "input_ids": ids.masked_fill(masked, self.mask_token_id),
            "attention_mask": attention_mask,
            "logits_index": masked.flatten().nonzero().squeeze(-1),
            "target_ids": ids[masked],
            "alpha": alpha.float(),
            "weights": weights.float(),
            "canvas_lengths": lengths,
            "example_id": example_id,
        }


class MDLMCollatorForSeq2Seq(_MDLMTrainingCollator):
    """Training batches for prompt and target: `prompt [BOS] canvas` with a part of the canvas masked.

    Takes the arguments of `_MDLMTrainingCollator`: tokenizer, max_length, seed, canvas_length, masking, noise_schedule.
    The time (or the number of masks) is low-discrepancy over the epoch, the masks are functions of (seed, epoch,
    example_id), so neither depends on the rest of the batch.

    Called with a list of examples - dicts of `prompt_ids`, `target_ids`, `example_id`, `epoch`, `position` - it returns
    a dict of tensors, for B sequences of at most L tokens with M masks in all:
        input_ids (B, L): the sequences with their masks, padded on the right.
        attention_mask (B, L): True for the sequence, the `[PAD]` of its canvas included.
        logits_index (M,): the masks, as indices into the flattened (B x L) tokens.
        target_ids (M,): what they hide.
        alpha (B,): float32, alpha_t, which tells a time-conditioned network the time.
        weights (B,): float32, weight of the cross-entropy of each masked token of the row.
        canvas_lengths (B,): L of each row, the tokens that could have been masked.
        example_id (B,): as given.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a sequence that is too long."""
        return self._write(examples, [e["prompt_ids"] for e in examples], [e["target_ids"] for e in examples])


class MDLMCollatorForLanguageModeling(_MDLMTrainingCollator):
    """Training batches for plain text: `[BOS] canvas`; the text is `input_ids`, the rest as for seq2seq."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a sequence that is too long."""
        return self._write(examples, [[] for _ in examples], [e["input_ids"] for e in examples])


class MDLMCollatorForInfilling(_MDLMTrainingCollator):
    """Training batches for infilling: the blanks of `input_ids`, its mask ids, are what is masked and learnt.

    `target_ids` is the whole solution, as long as `input_ids`. The sequence stays as it is, without `[BOS]`, `[EOS]` or
    `canvas_length`; the rest is as for seq2seq, the blanks being the canvas.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError as the others do, and for a solution of another length than its blanks."""
        for example in examples:
            if len(example["input_ids"]) != len(example["target_ids"]):
                raise ValueError(
                    f"Example {example['example_id']} has {len(example['input_ids'])} input_ids and "
                    f"{len(example['target_ids'])} target_ids: give the whole solution, token for token."
                )
        given, _ = self._pad([e["input_ids"] for e in examples], "right")
        ids, real = self._pad([e["target_ids"] for e in examples], "right")
        return self._corrupt(examples, ids, real, real & (given == self.mask_token_id))


class MDLMCollatorForSeq2SeqPrediction(_MDLMCollator):
    """Prompts `prompt [BOS]` for `generate`, padded on the left: `input_ids`, `attention_mask`, `example_id`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a prompt that is too long."""
        return self._prompts(examples, [[*e["prompt_ids"], self.bos_token_id] for e in examples])


class MDLMCollatorForLanguageModelingPrediction(_MDLMCollator):
    """Empty prompts `[BOS]` for `generate`: `input_ids`, `attention_mask`, `example_id`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch of as many empty prompts as there are examples."""
        return self._prompts(examples, [[self.bos_token_id] for _ in examples])


class MDLMCollatorForInfillingPrediction(_MDLMCollator):
    """Sequences with blanks for `generate`, padded on the left: `input_ids`, `attention_mask`, `example_id`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a sequence that is too long."""
        return self._prompts(examples, [e["input_ids"] for e in examples])

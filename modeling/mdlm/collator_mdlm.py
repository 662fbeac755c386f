"""From examples to batches for the masked diffusion language model: the canvas, the time and the masks."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from xlm_hf.modules.messages import did_you_mean
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.objectives.collation import Collator, Documents, Rows, ragged, segment_numbers
from xlm_hf.objectives.corruption import bernoulli_masks, exact_masks, schedule_at, skewed_times

MASKINGS = ("exact", "bernoulli")
_EXTRAS = "its special ones and its canvas"


class _MDLMCollator(Collator):
    """What all collators of the family share: special ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int = 0, packing: bool = False):
        super().__init__(tokenizer, max_length, seed, packing)
        self.mask_token_id = tokenizer.mask_token_id


def _times(rows: Rows, alpha: np.ndarray) -> np.ndarray:
    """`alpha` (D,) of each row, or of each token (B, L) where a row holds several documents."""
    if not rows.several:
        return alpha
    of_tokens = np.ones(rows.shape, dtype=np.float32)
    of_tokens.reshape(-1)[rows.index(0, rows.lengths)] = np.repeat(alpha, rows.lengths)
    return of_tokens


class _MDLMTrainingCollator(_MDLMCollator):
    """Draws times and masks.

    Args:
        tokenizer: names the special tokens.
        max_length: positions of the model; a longer document is refused.
        seed: of the corruption.
        canvas_length: places of the canvas: the text, `[EOS]` and `[PAD]` up to here; a text that fills the canvas has
            no `[EOS]`. None means the text and one `[EOS]`.
        masking: "bernoulli" draws t ~ U(0, 1] and masks each of the L canvas tokens with probability 1 - alpha_t, for a
            weight of -alpha'_t / (1 - alpha_t). "exact" draws k ~ U{1..L}, masks exactly k and tells the network a time
            from the law of t given k, for a weight of L / k. Both are unbiased for the same bound, and only the second
            has a finite variance.
        noise_schedule: alpha_t of "bernoulli", as `make_schedule` takes it; "exact" does not depend on it.
        mask_beta: None trains on the bound. A number, for training alone, draws k / L (rounded up) or t from
            Beta(mask_beta, 1), and every masked token counts 1 in the loss, as in MaskGIT (arXiv 2202.04200).
        packing: whether a row may hold several examples, up to `max_length` tokens; no token sees another document.

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
        mask_beta: float | None = None,
        packing: bool = False,
    ):
        super().__init__(tokenizer, max_length, seed, packing)
        if mask_beta is not None and mask_beta <= 0:
            raise ValueError(f"mask_beta must be greater than 0 and is {mask_beta}.")
        if masking not in MASKINGS:
            raise ValueError(f"masking {masking!r} does not exist: {did_you_mean(masking, MASKINGS)}")
        writable = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
        self.never_written = np.isin(np.arange(len(tokenizer)), list(set(tokenizer.all_special_ids) - writable))
        self.canvas_length = canvas_length
        self.masking = masking
        self.mask_beta = mask_beta
        self.schedule = make_schedule(noise_schedule)

    def _training(self, examples, prompts, texts) -> dict[str, torch.Tensor]:
        documents = Documents(examples, prompts, texts)
        self.check_ids(documents.prompt_ids, documents.target_ids)
        return self._corrupt(*self.with_canvas(documents, self.canvas_length, _EXTRAS))

    def _corrupt(self, rows: Rows, starts, lengths, maskable=None) -> dict[str, torch.Tensor]:
        """The batch of the rows, with masks among `lengths` (D,) tokens of each document from its `starts`-th on.

        `maskable` says which of these may be masked; None means all.
        """
        index, bits = rows.index(starts, lengths), rows.documents.random_bits(self.seed, lengths, starts)
        if maskable is not None:
            index, bits = index[maskable], bits[maskable]
            lengths = np.bincount(segment_numbers(lengths)[maskable], minlength=len(lengths))
        content = rows.input_ids[index]
        special = content[self.never_written[content]]
        if len(special):
            raise ValueError(
                f"A text holds the special token {special[0]}, which this model never writes: tokenize the data "
                "without special tokens."
            )
        u, beta = rows.documents.low_discrepancy_draws(self.seed), self.mask_beta or 1.0
        if self.masking == "exact":
            masked, alpha, weights = exact_masks(bits, lengths, u, beta)
        else:
            t, weights = skewed_times(u, beta)
            alpha, mask_probability, hazard = schedule_at(self.schedule, t)
            masked, weights = bernoulli_masks(bits, lengths, mask_probability), hazard * weights
        masks = np.flatnonzero(masked)
        rows.input_ids[index[masks]] = self.mask_token_id
        even = {} if self.mask_beta is None else {"loss_weights": np.ones(len(lengths), np.float32)}
        return rows.batch(
            logits_index=index[masks],
            target_ids=content[masks],
            target_documents=segment_numbers(lengths)[masks],
            alpha=_times(rows, alpha.astype(np.float32)),
            weights=weights.astype(np.float32),
            canvas_lengths=lengths,
            **even,
        )


class MDLMCollatorForSeq2Seq(_MDLMTrainingCollator):
    """Training batches for prompt and target: `prompt [BOS] canvas` with a part of the canvas masked.

    Takes tokenizer, max_length, seed, canvas_length, masking, noise_schedule, mask_beta, packing (see its base class).
    The time (or the number of masks) is low-discrepancy over the epoch, the masks are functions of (seed, epoch,
    example_id), so neither depends on the rest of the batch.

    Called with a list of examples - dicts of `prompt_ids`, `target_ids`, `example_id`, `epoch`, `position` - it returns
    a dict of tensors, for D documents in B rows of at most L tokens, with M masks in all:
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
        example_id: of the examples, as given.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a document that is too long."""
        return self._training(examples, [e["prompt_ids"] for e in examples], [e["target_ids"] for e in examples])


class MDLMCollatorForLanguageModeling(_MDLMTrainingCollator):
    """Training batches for plain text: `[BOS] canvas`; the text is `input_ids`, the rest as for seq2seq.

    An example is several documents where its `segment_ids` say so.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a document that is too long."""
        return self._training(examples, [[] for _ in examples], [e["input_ids"] for e in examples])


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
        documents = Documents(examples, [[] for _ in examples], [e["target_ids"] for e in examples])
        given, lengths = ragged([e["input_ids"] for e in examples])[0], documents.target_lengths
        self.check_ids(given, documents.target_ids)
        self.check_lengths(lengths, "sequence", _EXTRAS)
        rows = Rows(lengths, documents, self.pad_token_id, self.packing)
        rows.write(0, lengths, documents.target_ids)
        return self._corrupt(rows, 0, lengths, given == self.mask_token_id)


class MDLMCollatorForSeq2SeqPrediction(_MDLMCollator):
    """Prompts `prompt [BOS]` for `generate`, padded on the left: `input_ids`, `attention_mask`, `example_id`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a prompt that is too long."""
        return self.left_padded(examples, [[*e["prompt_ids"], self.bos_token_id] for e in examples], _EXTRAS)


class MDLMCollatorForLanguageModelingPrediction(_MDLMCollator):
    """Empty prompts `[BOS]` for `generate`: `input_ids`, `attention_mask`, `example_id`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch of as many empty prompts as there are examples."""
        return self.left_padded(examples, [[self.bos_token_id] for _ in examples], _EXTRAS)


class MDLMCollatorForInfillingPrediction(_MDLMCollator):
    """Sequences with blanks for `generate`, padded on the left: `input_ids`, `attention_mask`, `example_id`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a document that is too long."""
        return self.left_padded(examples, [e["input_ids"] for e in examples], _EXTRAS)

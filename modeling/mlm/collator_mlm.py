"""From examples to batches for the masked language model: which tokens are masked."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from xlm_hf.objectives.collation import Collator, Documents, Rows, ragged
from xlm_hf.objectives.corruption import bernoulli_masks

_EXTRAS = "its special tokens and padding content"


class _MLMCollator(Collator):
    """What all collators of the family share: special ids, the checks on them, and masking."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int = 0,
        mask_beta: float = 1.0,
        packing: bool = False,
    ):
        super().__init__(tokenizer, max_length, seed, packing)
        if mask_beta <= 0:
            raise ValueError(f"mask_beta must be greater than 0 and is {mask_beta}.")
        self.mask_token_id = tokenizer.mask_token_id
        writable = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
        self.never_written = np.isin(np.arange(len(tokenizer)), list(set(tokenizer.all_special_ids) - writable))
        self.mask_beta = mask_beta

    def _check_special(self, prompt_ids: np.ndarray, target_ids: np.ndarray) -> None:
        """Raise ValueError for an id outside the vocabulary, or a special token where none belongs."""
        self.check_ids(prompt_ids, target_ids)
        special = [*prompt_ids[prompt_ids == self.mask_token_id], *target_ids[self.never_written[target_ids]]]
        if special:
            raise ValueError(
                f"A sequence holds the special token {special[0]}, which this model never writes: tokenize the "
                "data without special tokens."
            )

    def _mask(
        self, rows: Rows, starts: np.ndarray | int, lengths: np.ndarray, maskable: np.ndarray | bool = True
    ) -> dict[str, torch.Tensor]:
        """The batch of the rows with a part of `lengths` (D,) tokens of each document, from its `starts`-th on, masked.

        Each maskable token is masked with probability t ~ Beta(mask_beta, 1), evenly spread over the epoch.
        """
        t = rows.documents.low_discrepancy_draws(self.seed) ** (1 / self.mask_beta)
        bits = rows.documents.random_bits(self.seed, lengths, starts)
        masked = np.flatnonzero(maskable & bernoulli_masks(bits, lengths, t))
        logits_index = rows.index(starts, lengths)[masked]
        target_ids = rows.input_ids[logits_index]
        rows.input_ids[logits_index] = self.mask_token_id
        return rows.batch(logits_index=logits_index, target_ids=target_ids)


class _MLMCanvasCollator(_MLMCollator):
    """What prompt + target and plain text, its case of an empty prompt, share: a canvas after `[BOS]`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int = 0,
        mask_beta: float = 1.0,
        canvas_length: int | None = None,
        packing: bool = False,
    ):
        super().__init__(tokenizer, max_length, seed, mask_beta, packing)
        self.canvas_length = canvas_length

    def _training(
        self, examples: list[dict[str, Any]], prompts: list[list[int]], targets: list[list[int]]
    ) -> dict[str, torch.Tensor]:
        documents = Documents(examples, prompts, targets)
        self._check_special(documents.prompt_ids, documents.target_ids)
        return self._mask(*self.with_canvas(documents, self.canvas_length, _EXTRAS))

    def _prediction(
        self, examples: list[dict[str, Any]], prompts: list[list[int]], target_name: str
    ) -> dict[str, torch.Tensor]:
        batch = self.left_padded(examples, [[*prompt, self.bos_token_id] for prompt in prompts], _EXTRAS)
        self._check_special(batch["input_ids"].numpy().ravel(), np.zeros(0, dtype=np.int64))
        if self.canvas_length is None and all(target_name in example for example in examples):
            batch["canvas_lengths"] = torch.tensor([len(example[target_name]) + 1 for example in examples])
        return batch


class MLMCollatorForSeq2Seq(_MLMCanvasCollator):
    """Training batches for prompt and target: `prompt [BOS] target [EOS]` with a part of what follows `[BOS]` masked.

    For each sequence t ~ Beta(mask_beta, 1), and each token of its canvas - what follows `[BOS]` - is masked with
    probability t independently. With mask_beta = 1 that is t ~ U(0, 1) (arXiv 2505.05755); a larger one shows emptier
    canvases, in which fewer tokens can be copied from their neighbours. It changes how often each t is trained, not
    what is optimal at it. All draws are functions of (seed, epoch, example_id, position) and the document's number
    alone.

    Args:
        tokenizer: names the special tokens.
        max_length: positions of the model; a longer sequence is refused.
        seed: of the corruption.
        mask_beta: skews the masking rate, as above.
        canvas_length: how the length of a sequence is modelled. A number is the length of every canvas: padding up to
            it is content, seen, masked and predicted like any other token, and so the model learns to write
            `[EOS] [PAD] ...` after a sequence; a target that fills the canvas has no `[EOS]`. None takes the length as
            given: a canvas is the target and `[EOS]`, and what decodes it must name its length.
        packing: whether a row may hold several examples, up to `max_length` tokens; no token sees another document.

    Called with a list of examples - dicts of `prompt_ids`, `target_ids`, `example_id`, `epoch`, `position` - it returns
    a dict of tensors, for B rows of at most L tokens, of which S are masked in all:
        input_ids (B, L): the documents with their masks, padded on the right.
        attention_mask (B, L): True for tokens, padding content included.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        logits_index (S,): where the masked tokens are, as indices into the flattened (B x L) tokens.
        target_ids (S,): the masked tokens.
        example_id: of the examples, as given.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id that does not belong or a sequence that is too long."""
        return self._training(examples, [e["prompt_ids"] for e in examples], [e["target_ids"] for e in examples])


class MLMCollatorForLanguageModeling(_MLMCanvasCollator):
    """Training batches for plain text: `[BOS] text [EOS]` with a part of the text and `[EOS]` masked.

    The text of an example is `input_ids`, several documents where its `segment_ids` say so; everything else is as in
    `MLMCollatorForSeq2Seq`.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id that does not belong or a sequence that is too long."""
        return self._training(examples, [[] for _ in examples], [e["input_ids"] for e in examples])


class MLMCollatorForInfilling(_MLMCollator):
    """Training batches for filling in: of the tokens that the input leaves open, a part is masked.

    An example's `input_ids` hold mask tokens where `target_ids`, of the same length, are to be found. Only there is a
    token masked, with probability t as in `MLMCollatorForSeq2Seq`; everywhere else the row shows `target_ids`. Nothing
    is put before or after it.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id that does not belong, or lengths that differ or are too long."""
        for example in examples:
            if len(example["input_ids"]) != len(example["target_ids"]):
                raise ValueError(
                    f"Example {example['example_id']} has {len(example['input_ids'])} input_ids and "
                    f"{len(example['target_ids'])} target_ids: to be filled in, an input must be as long as its "
                    "solution."
                )
        documents = Documents(examples, [[] for _ in examples], [e["target_ids"] for e in examples])
        input_ids, _ = ragged([e["input_ids"] for e in examples])
        is_open, lengths = input_ids == self.mask_token_id, documents.target_lengths
        self._check_special(input_ids[~is_open], documents.target_ids)
        self.check_lengths(lengths, "sequence", _EXTRAS)
        rows = Rows(lengths, documents, self.pad_token_id, self.packing)
        rows.write(0, lengths, documents.target_ids)
        return self._mask(rows, 0, lengths, is_open)


class MLMCollatorForSeq2SeqPrediction(_MLMCanvasCollator):
    """Prompts `prompt [BOS]` for `generate`, padded on the left: `input_ids`, `attention_mask`, `example_id`.

    Where lengths are given (`canvas_length=None`) and the examples have a target, `canvas_lengths` (B,) are those of
    the targets with `[EOS]`; otherwise the options of `generate` decide.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id that does not belong or a prompt that is too long."""
        return self._prediction(examples, [e["prompt_ids"] for e in examples], "target_ids")


class MLMCollatorForLanguageModelingPrediction(_MLMCanvasCollator):
    """Empty prompts `[BOS]` for `generate`; lengths as in `MLMCollatorForSeq2SeqPrediction`, from `input_ids`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch of as many empty prompts as there are examples."""
        return self._prediction(examples, [[] for _ in examples], "input_ids")


class MLMCollatorForInfillingPrediction(_MLMCollator):
    """Inputs with their mask tokens for `generate`, padded on the left; with `canvas_lengths` of 0."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or an input that is too long."""
        batch = self.left_padded(examples, [e["input_ids"] for e in examples], _EXTRAS)
        return {**batch, "canvas_lengths": torch.zeros(len(examples), dtype=torch.int64)}

"""From examples to batches for the masked language model: which tokens are masked."""

from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from xlm_hf.modules.counter_random import low_discrepancy, uniform


def _ragged(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate lists of ids: the values (sum of lengths,) and the lengths (B,), both int64."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=lengths.sum())
    return torch.from_numpy(values), torch.from_numpy(lengths)


def _column(examples: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.from_numpy(np.fromiter((example[name] for example in examples), dtype=np.int64, count=len(examples)))


class _MLMCollator:
    """What all collators of the family share: special ids, the checks on what comes in, and masking."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int = 0, mask_beta: float = 1.0):
        if mask_beta <= 0:
            raise ValueError(f"mask_beta must be greater than 0 and is {mask_beta}.")
        self.pad_token_id = tokenizer.pad_token_id
        self.mask_token_id = tokenizer.mask_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = tokenizer.eos_token_id
        writable = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
        self.never_written = torch.tensor(sorted(set(tokenizer.all_special_ids) - writable))
        self.vocab_size = len(tokenizer)
        self.max_length = max_length
        self.seed = seed
        self.mask_beta = mask_beta

    def _check_ids(self, prompt_ids: torch.Tensor, target_ids: torch.Tensor) -> None:
        """Raise ValueError for an id outside the vocabulary, or a special token where none belongs."""
        ids = torch.cat((prompt_ids, target_ids))
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(outside):
            raise ValueError(
                f"Token id {int(outside[0])} is outside the vocabulary of {self.vocab_size}: tokenize the data with "
                "the tokenizer of this run."
            )
        special = torch.cat(
            (prompt_ids[prompt_ids == self.mask_token_id], target_ids[torch.isin(target_ids, self.never_written)])
        )
        if len(special):
            raise ValueError(
                f"A sequence holds the special token {int(special[0])}, which this model never writes: tokenize the "
                "data without special tokens."
            )

    def _check_length(self, longest: int) -> None:
        if longest > self.max_length:
            raise ValueError(
                f"A sequence has {longest} tokens with its special tokens and padding content, and the model has "
                f"{self.max_length} positions: shorten it or raise max_position_embeddings."
            )

    def _mask(
        self, examples: list[dict[str, Any]], ids: torch.Tensor, attention_mask: torch.Tensor, maskable: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Mask each maskable token of a row with probability t ~ Beta(mask_beta, 1), evenly spread over the epoch."""
        epoch, position, example_id = (_column(examples, name) for name in ("epoch", "position", "example_id"))
        t = low_discrepancy(self.seed, epoch, position) ** (1 / self.mask_beta)
        columns = torch.arange(ids.shape[1])
        draws = uniform(self.seed, epoch[:, None], example_id[:, None], columns)
        masked = maskable & (draws < t[:, None])
        return {
            "input_ids": ids.masked_fill(masked, self.mask_token_id),
            "attention_mask": attention_mask,
            "target_index": masked.flatten().nonzero().squeeze(-1),
            "target_ids": ids[masked],
            "example_id": example_id,
        }

    def _left_padded(self, rows: list[list[int]], examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, lengths = _ragged(rows)
        L = int(lengths.max())
        self._check_length(L)
        attention_mask = torch.arange(L) >= (L - lengths)[:, None]
        return {
            "input_ids": torch.full(attention_mask.shape, self.pad_token_id).masked_scatter_(attention_mask, ids),
            "attention_mask": attention_mask,
            "example_id": _column(examples, "example_id"),
        }


class _MLMCanvasCollator(_MLMCollator):
    """What prompt + target and plain text, its case of an empty prompt, share: a canvas after `[BOS]`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int = 0,
        mask_beta: float = 1.0,
        canvas_length: int | None = None,
    ):
        super().__init__(tokenizer, max_length, seed, mask_beta)
        self.canvas_length = canvas_length

    def _training(
        self, examples: list[dict[str, Any]], prompts: list[list[int]], targets: list[list[int]]
    ) -> dict[str, torch.Tensor]:
        prompt_ids, prompt_lengths = _ragged(prompts)
        target_ids, target_lengths = _ragged(targets)
        self._check_ids(prompt_ids, target_ids)
        canvas_lengths = target_lengths + 1
        if self.canvas_length is not None:
            if int(canvas_lengths.max()) > self.canvas_length:
                raise ValueError(
                    f"A target has {int(canvas_lengths.max())} tokens with [EOS] and canvas_length is "
                    f"{self.canvas_length}: raise it, or shorten the target."
                )
            canvas_lengths = torch.full_like(canvas_lengths, self.canvas_length)
        starts = prompt_lengths[:, None] + 1
        ends = starts + canvas_lengths[:, None]
        L = int(ends.max())
        self._check_length(L)
        columns = torch.arange(L)
        eos_at = starts + target_lengths[:, None]
        ids = torch.full((len(examples), L), self.pad_token_id)
        ids.masked_scatter_(columns < starts - 1, prompt_ids).masked_fill_(columns == starts - 1, self.bos_token_id)
        ids.masked_scatter_((columns >= starts) & (columns < eos_at), target_ids)
        ids.masked_fill_(columns == eos_at, self.eos_token_id)
        in_row = columns < ends
        return self._mask(examples, ids, in_row, in_row & (columns >= starts))

    def _prediction(
        self, examples: list[dict[str, Any]], prompts: list[list[int]], target_name: str
    ) -> dict[str, torch.Tensor]:
        prompt_ids, _ = _ragged(prompts)
        self._check_ids(prompt_ids, prompt_ids[:0])
        batch = self._left_padded([[*prompt, self.bos_token_id] for prompt in prompts], examples)
        if self.canvas_length is None and all(target_name in example for example in examples):
            batch["canvas_lengths"] = torch.tensor([len(example[target_name]) + 1 for example in examples])
        return batch


class MLMCollatorForSeq2Seq(_MLMCanvasCollator):
    """Training batches for prompt and target: `prompt [BOS] target [EOS]` with a part of what follows `[BOS]` masked.

    For each sequence t ~ Beta(mask_beta, 1), and each token of its canvas - what follows `[BOS]` - is masked with
    probability t independently. With mask_beta = 1 that is t ~ U(0, 1) (arXiv 2505.05755); a larger one shows emptier
    canvases, in which fewer tokens can be copied from their neighbours. It changes how often each t is trained, not
    what is optimal at it. All draws are functions of (seed, epoch, example_id, position) alone.

    Args:
        tokenizer: names the special tokens.
        max_length: positions of the model; a longer sequence is refused.
        seed: of the corruption.
        mask_beta: skews the masking rate, as above.
        canvas_length: how the length of a sequence is modelled. A number is the length of every canvas: padding up to
            it is content, seen, masked and predicted like any other token, and so the model learns to write
            `[EOS] [PAD] ...` after a sequence. None takes the length as given: a canvas is the target and `[EOS]`, and
            what decodes it must name its length.

    Called with a list of examples - dicts of `prompt_ids`, `target_ids`, `example_id`, `epoch`, `position` - it returns
    a dict of tensors, for B sequences of at most L tokens, of which S are masked in all:
        input_ids (B, L): the sequences with their masks, padded on the right.
        attention_mask (B, L): True for tokens, padding content included.
        target_index (S,): where the masked tokens are, as indices into the flattened (B x L) tokens.
        target_ids (S,): the masked tokens.
        example_id (B,): as given.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id that does not belong or a sequence that is too long."""
        return self._training(examples, [e["prompt_ids"] for e in examples], [e["target_ids"] for e in examples])


class MLMCollatorForLanguageModeling(_MLMCanvasCollator):
    """Training batches for plain text: `[BOS] text [EOS]` with a part of the text and `[EOS]` masked.

    The text of an example is `input_ids`; everything else is as in `MLMCollatorForSeq2Seq`.
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
        input_ids, lengths = _ragged([e["input_ids"] for e in examples])
        target_ids, target_lengths = _ragged([e["target_ids"] for e in examples])
        if (lengths != target_lengths).any():
            row = int((lengths != target_lengths).nonzero()[0])
            raise ValueError(
                f"Example {examples[row]['example_id']} has {int(lengths[row])} input_ids and "
                f"{int(target_lengths[row])} target_ids: to be filled in, an input must be as long as its solution."
            )
        is_open = input_ids == self.mask_token_id
        self._check_ids(input_ids[~is_open], target_ids)
        L = int(lengths.max())
        self._check_length(L)
        in_row = torch.arange(L) < lengths[:, None]
        ids = torch.full(in_row.shape, self.pad_token_id).masked_scatter_(in_row, target_ids)
        return self._mask(examples, ids, in_row, torch.zeros_like(in_row).masked_scatter_(in_row, is_open))


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
        rows = [e["input_ids"] for e in examples]
        ids, _ = _ragged(rows)
        self._check_ids(ids[ids != self.mask_token_id], ids[:0])
        return {**self._left_padded(rows, examples), "canvas_lengths": torch.zeros(len(rows), dtype=torch.int64)}

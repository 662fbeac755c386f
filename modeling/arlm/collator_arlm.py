"""From examples to batches for the left-to-right language model. Nothing is corrupted."""

from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def _ragged(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate lists of ids: the values (sum of lengths,) and the lengths (B,), both int64."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=lengths.sum())
    return torch.from_numpy(values), torch.from_numpy(lengths)


class _ARLMCollator:
    """What all collators of the family share: special ids and the checks on what comes in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int = 0):
        self.pad_token_id = tokenizer.pad_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = tokenizer.eos_token_id
        self.vocab_size = len(tokenizer)
        self.max_length = max_length
        self.seed = seed

    def _check(self, ids: torch.Tensor, lengths: torch.Tensor, what: str, specials: str) -> None:
        """Raise ValueError if an id is outside the vocabulary, or `lengths` is more than the model has positions."""
        if len(ids) and (int(ids.max()) >= self.vocab_size or int(ids.min()) < 0):
            outside = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
            raise ValueError(
                f"Token id {outside} is outside the vocabulary of {self.vocab_size}: tokenize the data with the "
                "tokenizer of this run."
            )
        longest = int(lengths.max())
        if longest > self.max_length:
            raise ValueError(
                f"A {what} has {longest} tokens with {specials}, and the model has {self.max_length} positions: "
                "shorten it or raise max_position_embeddings."
            )

    def _training(self, examples: list[dict[str, Any]], prompts: list[list[int]], targets: list[list[int]]):
        """Batches of rows `prompt [BOS] target`, padded on the right, that predict `target [EOS]`."""
        bos, eos = [self.bos_token_id], [self.eos_token_id]
        ids, lengths = _ragged([prompt + bos + target for prompt, target in zip(prompts, targets, strict=True)])
        target_ids, target_lengths = _ragged([target + eos for target in targets])
        self._check(torch.cat((ids, target_ids)), lengths + 1, "sequence", "[BOS] and [EOS]")
        columns, ends = torch.arange(int(lengths.max())), lengths[:, None]
        attention_mask = columns < ends
        # A row's last tokens, from [BOS] on, each predict the one after it.
        predicts = attention_mask & (columns >= ends - target_lengths[:, None])
        return {
            "input_ids": torch.full(attention_mask.shape, self.pad_token_id).masked_scatter_(attention_mask, ids),
            "attention_mask": attention_mask,
            "logits_index": predicts.flatten().nonzero().squeeze(-1),
            "target_ids": target_ids,
            "example_id": torch.tensor([example["example_id"] for example in examples]),
        }

    def _prompts_only(self, examples: list[dict[str, Any]], prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """Prompts `prompt [BOS]`, padded on the left."""
        ids, lengths = _ragged([[*prompt, self.bos_token_id] for prompt in prompts])
        self._check(ids, lengths, "prompt", "[BOS]")
        width = int(lengths.max())
        attention_mask = torch.arange(width) >= width - lengths[:, None]
        return {
            "input_ids": torch.full(attention_mask.shape, self.pad_token_id).masked_scatter_(attention_mask, ids),
            "attention_mask": attention_mask,
            "example_id": torch.tensor([example["example_id"] for example in examples]),
        }


class ARLMCollatorForSeq2Seq(_ARLMCollator):
    """Training batches for prompt and target: rows `prompt [BOS] target`, which learn `target [EOS]`.

    Args:
        tokenizer: names the special tokens.
        max_length: positions of the model; a longer sequence is refused.
        seed: unused, since nothing is drawn; all families' collators take it.

    Called with a list of examples - dicts of `prompt_ids`, `target_ids` and `example_id` - it returns a dict of
    tensors, for B sequences of at most L tokens without `[EOS]` (never an input) and S predicted tokens in all:
        input_ids (B, L): the sequences, padded on the right.
        attention_mask (B, L): True for tokens.
        logits_index (S,): `[BOS]` and the tokens of the targets, as indices into the flattened (B x L) tokens.
        target_ids (S,): the token that follows each of them.
        example_id (B,): as given.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a sequence that is too long."""
        return self._training(examples, [e["prompt_ids"] for e in examples], [e["target_ids"] for e in examples])


class ARLMCollatorForLanguageModeling(_ARLMCollator):
    """Training batches for plain text: rows `[BOS] text`, which learn `text [EOS]`.

    The text of an example is `input_ids`; everything else is as in `ARLMCollatorForSeq2Seq`.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a sequence that is too long."""
        return self._training(examples, [[] for _ in examples], [e["input_ids"] for e in examples])


class ARLMCollatorForSeq2SeqPrediction(_ARLMCollator):
    """Prompts `prompt [BOS]` for `generate`, padded on the left: `input_ids`, `attention_mask`, `example_id`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a prompt that is too long."""
        return self._prompts_only(examples, [e["prompt_ids"] for e in examples])


class ARLMCollatorForLanguageModelingPrediction(_ARLMCollator):
    """Empty prompts `[BOS]` for `generate`: `input_ids`, `attention_mask`, `example_id`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch of as many empty prompts as there are examples."""
        return self._prompts_only(examples, [[] for _ in examples])

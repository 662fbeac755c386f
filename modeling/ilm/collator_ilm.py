"""From examples to batches for the insertion language model: which tokens are dropped, and where they belong."""

from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from xlm_hf.modules.counter_random import low_discrepancy, random_bits


def _ragged(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate lists of ids: the values (sum of lengths,) and the lengths (B,), both int64."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=lengths.sum())
    return torch.from_numpy(values), torch.from_numpy(lengths)


def _column(examples: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.from_numpy(np.fromiter((example[name] for example in examples), dtype=np.int64, count=len(examples)))


class _ILMCollator:
    """What all collators of the family share: special ids and the checks on what comes in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int = 0, drop_beta: float = 1.0):
        if drop_beta <= 0:
            raise ValueError(f"drop_beta must be greater than 0 and is {drop_beta}.")
        self.pad_token_id = tokenizer.pad_token_id
        self.cls_token_id = tokenizer.cls_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.vocab_size = len(tokenizer)
        self.max_length = max_length
        self.seed = seed
        self.drop_beta = drop_beta

    def _check(self, ids: torch.Tensor, lengths: torch.Tensor, what: str) -> None:
        """Raise ValueError if an id is outside the vocabulary, or `lengths` and two special tokens do not fit."""
        if len(ids) and (int(ids.max()) >= self.vocab_size or int(ids.min()) < 0):
            outside = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
            raise ValueError(
                f"Token id {outside} is outside the vocabulary of {self.vocab_size}: tokenize the data with the "
                "tokenizer of this run."
            )
        longest = int(lengths.max()) + 2
        if longest > self.max_length:
            raise ValueError(
                f"A {what} has {longest} tokens with [CLS] and [BOS], and the model has {self.max_length} positions: "
                "shorten it or raise max_position_embeddings."
            )

    def _drop(self, examples: list[dict[str, Any]], prompts: list[list[int]], targets: list[list[int]]):
        prompt_ids, prompt_lengths = _ragged(prompts)
        target_ids, target_lengths = _ragged(targets)
        self._check(torch.cat((prompt_ids, target_ids)), prompt_lengths + target_lengths, "sequence")
        B, longest = len(examples), int(target_lengths.max())
        epoch, position, example_id = (_column(examples, name) for name in ("epoch", "position", "example_id"))
        columns = torch.arange(longest)
        exists = columns < target_lengths[:, None]
        tokens = torch.full((B, longest), self.pad_token_id).masked_scatter_(exists, target_ids)

        # The number n, evenly spread over the epoch; then the n tokens with the smallest random keys go.
        share = low_discrepancy(self.seed, epoch, position) ** (1 / self.drop_beta)
        num_dropped = (share * (target_lengths + 1)).long()
        keys = random_bits(self.seed, epoch[:, None], example_id[:, None], columns)
        keys = keys.masked_fill(~exists, torch.iinfo(torch.int64).max)
        ranks = keys.argsort(dim=-1).argsort(dim=-1)
        dropped = ranks < num_dropped[:, None]
        kept = exists & ~dropped

        prefix_lengths = prompt_lengths + 2
        kept_before = kept.cumsum(dim=-1)
        num_kept = target_lengths - num_dropped
        L = int((prefix_lengths + num_kept).max())
        input_ids = self._prefix(prompt_ids, prompt_lengths, L)
        row, column = kept.nonzero(as_tuple=True)
        place = row * L + prefix_lengths[row] + kept_before[row, column] - 1
        input_ids.view(-1)[place] = tokens[row, column]

        # Slots of rows that lack something, one after the other: [BOS], then every kept token.
        num_slots = torch.where(num_dropped > 0, num_kept + 1, 0)
        slot_rows = torch.repeat_interleave(num_slots)
        first_slot = num_slots.cumsum(0) - num_slots
        slot_number = torch.arange(len(slot_rows)) - first_slot[slot_rows]
        row, column = dropped.nonzero(as_tuple=True)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.arange(L) < (prefix_lengths + num_kept)[:, None],
            "slot_index": slot_rows * L + prefix_lengths[slot_rows] - 1 + slot_number,
            "num_dropped": num_dropped,
            "target_slots": first_slot[row] + kept_before[row, column],
            "target_ids": tokens[row, column],
            "example_id": example_id,
        }

    def _prefix(self, prompt_ids: torch.Tensor, prompt_lengths: torch.Tensor, L: int) -> torch.Tensor:
        """Rows `[CLS] prompt [BOS]` of width L, padded on the right."""
        B = len(prompt_lengths)
        input_ids = torch.full((B, L), self.pad_token_id)
        input_ids[:, 0] = self.cls_token_id
        columns = torch.arange(L)
        input_ids.masked_scatter_((columns >= 1) & (columns <= prompt_lengths[:, None]), prompt_ids)
        return input_ids.masked_fill_(columns == prompt_lengths[:, None] + 1, self.bos_token_id)

    def _prompts_only(self, examples: list[dict[str, Any]], prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """Prompts `[CLS] prompt [BOS]`, padded on the left."""
        prompt_ids, lengths = _ragged(prompts)
        self._check(prompt_ids, lengths, "prompt")
        L = int(lengths.max()) + 2
        columns, first = torch.arange(L), (L - 2 - lengths)[:, None]
        input_ids = torch.full((len(prompts), L), self.pad_token_id)
        input_ids.masked_fill_(columns == first, self.cls_token_id)
        input_ids.masked_scatter_((columns > first) & (columns < L - 1), prompt_ids)
        input_ids[:, -1] = self.bos_token_id
        return {
            "input_ids": input_ids,
            "attention_mask": columns >= first,
            "example_id": _column(examples, "example_id"),
        }


class ILMCollatorForSeq2Seq(_ILMCollator):
    """Training batches for prompt and target: `[CLS] prompt [BOS] target` with a part of the target dropped.

    For a target of L tokens, n = floor(r (L + 1)) of them are dropped, r ~ Beta(drop_beta, 1), every n-subset alike.
    With drop_beta = 1 that is n ~ U{0..L} (arXiv 2505.05755, section 3.2); a larger one shows emptier sequences, in
    which fewer tokens can be copied from their neighbours. It changes how often each n is trained, not what is optimal
    at it. All draws are functions of (seed, epoch, example_id, position) alone.

    Args:
        tokenizer: names the special tokens.
        max_length: positions of the model; a longer sequence is refused.
        seed: of the corruption.
        drop_beta: skews the share of dropped tokens, as above.

    Called with a list of examples - dicts of `prompt_ids`, `target_ids`, `example_id`, `epoch`, `position` - it returns
    a dict of tensors, for B sequences of at most L tokens with S slots and T dropped tokens in all:
        input_ids (B, L): what is left of the sequences, padded on the right.
        attention_mask (B, L): True for tokens.
        num_dropped (B,): n of each sequence.
        slot_index (S,): the slots of the sequences with n > 0, as indices into the flattened (B x L) tokens.
        target_slots (T,): for each dropped token, where its slot stands in `slot_index`.
        target_ids (T,): the dropped tokens.
        example_id (B,): as given.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a sequence that is too long."""
        return self._drop(examples, [e["prompt_ids"] for e in examples], [e["target_ids"] for e in examples])


class ILMCollatorForLanguageModeling(_ILMCollator):
    """Training batches for plain text: `[CLS] [BOS] text` with a part of the text dropped.

    The text of an example is `input_ids`; everything else is as in `ILMCollatorForSeq2Seq`.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a sequence that is too long."""
        return self._drop(examples, [[] for _ in examples], [e["input_ids"] for e in examples])


class ILMCollatorForSeq2SeqPrediction(_ILMCollator):
    """Prompts `[CLS] prompt [BOS]` for `generate`, padded on the left: `input_ids`, `attention_mask`, `example_id`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a prompt that is too long."""
        return self._prompts_only(examples, [e["prompt_ids"] for e in examples])


class ILMCollatorForLanguageModelingPrediction(_ILMCollator):
    """Empty prompts `[CLS] [BOS]` for `generate`: `input_ids`, `attention_mask`, `example_id`."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch of as many empty prompts as there are examples."""
        return self._prompts_only(examples, [[] for _ in examples])

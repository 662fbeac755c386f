"""From examples to batches for the insertion language model: which tokens are dropped, and where they belong."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from xlm_hf.objectives.collation import Collator, Documents, Rows, random_subset, segment_numbers, segment_starts


class _ILMCollator(Collator):
    """What all collators of the family share: special ids."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int = 0,
        drop_beta: float = 1.0,
        packing: bool = False,
    ):
        super().__init__(tokenizer, max_length, seed, packing)
        if drop_beta <= 0:
            raise ValueError(f"drop_beta must be greater than 0 and is {drop_beta}.")
        self.cls_token_id = tokenizer.cls_token_id
        self.drop_beta = drop_beta

    def _drop(self, examples: list[dict[str, Any]], prompts: list[list[int]], targets: list[list[int]]):
        documents = Documents(examples, prompts, targets)
        prompt_lengths, target_lengths = documents.prompt_lengths, documents.target_lengths
        self.check_ids(documents.prompt_ids, documents.target_ids)
        prefix_lengths = prompt_lengths + 2
        self.check_lengths(prefix_lengths + target_lengths, "sequence", "[CLS] and [BOS]")

        # The number n, evenly spread over the epoch; then the n tokens with the smallest random keys go.
        share = documents.low_discrepancy_draws(self.seed) ** (1 / self.drop_beta)
        num_dropped = (share * (target_lengths + 1)).astype(np.int64)
        # With the first bit turned, in the order of the signed integers that tensors hold.
        keys = documents.random_bits(self.seed, target_lengths) ^ np.uint64(1 << 63)
        is_dropped, _ = random_subset(keys, target_lengths, num_dropped)
        dropped, kept = np.flatnonzero(is_dropped), np.flatnonzero(~is_dropped)
        num_kept = target_lengths - num_dropped

        rows = Rows(prefix_lengths + num_kept, documents, self.pad_token_id, self.packing)
        rows.input_ids[rows.first] = self.cls_token_id
        rows.write(1, prompt_lengths, documents.prompt_ids)
        rows.input_ids[rows.first + prompt_lengths + 1] = self.bos_token_id
        rows.write(prefix_lengths, num_kept, documents.target_ids[kept])

        # Slots of documents that lack something, one after the other: [BOS], then every kept token.
        num_slots = np.where(num_dropped > 0, num_kept + 1, 0)
        kept_before = dropped - np.arange(len(dropped))
        return rows.batch(
            cls_index=rows.first,
            num_dropped=num_dropped,
            slot_index=rows.index(prefix_lengths - 1, num_slots),
            slot_documents=segment_numbers(num_slots),
            target_slots=kept_before + np.repeat(segment_starts(num_slots) - segment_starts(num_kept), num_dropped),
            target_ids=documents.target_ids[dropped],
        )

    def _prompts_only(self, examples: list[dict[str, Any]], prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """Prompts `[CLS] prompt [BOS]`, padded on the left."""
        prompts = [[self.cls_token_id, *prompt, self.bos_token_id] for prompt in prompts]
        return self.left_padded(examples, prompts, "[CLS] and [BOS]")


class ILMCollatorForSeq2Seq(_ILMCollator):
    """Training batches for prompt and target: `[CLS] prompt [BOS] target` with a part of the target dropped.

    For a target of L tokens, n = floor(r (L + 1)) of them are dropped, r ~ Beta(drop_beta, 1), every n-subset alike.
    With drop_beta = 1 that is n ~ U{0..L} (arXiv 2505.05755, section 3.2); a larger one shows emptier sequences, in
    which fewer tokens can be copied from their neighbours. It changes how often each n is trained, not what is optimal
    at it. All draws are functions of (seed, epoch, example_id, position) and the document's number alone.

    Args:
        tokenizer: names the special tokens.
        max_length: positions of the model; a longer document is refused.
        seed: of the corruption.
        drop_beta: skews the share of dropped tokens, as above.
        packing: whether a row may hold several examples, up to `max_length` tokens after the dropping; no token sees
            another document.

    Called with a list of examples - dicts of `prompt_ids`, `target_ids`, `example_id`, `epoch`, `position` - it returns
    a dict of tensors, for D documents in B rows of at most L tokens, with S slots and T dropped tokens in all:
        input_ids (B, L): what is left of the documents, padded on the right.
        attention_mask (B, L): True for tokens.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        cls_index (D,): `[CLS]` of each document, as an index into the flattened (B x L) tokens.
        num_dropped (D,): n of each document.
        slot_index (S,): the slots of the documents with n > 0, as indices into the flattened (B x L) tokens.
        slot_documents (S,): their documents, in ascending order.
        target_slots (T,): for each dropped token, where its slot stands in `slot_index`; in ascending order.
        target_ids (T,): the dropped tokens.
        example_id: of the examples, as given.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a document that is too long."""
        return self._drop(examples, [e["prompt_ids"] for e in examples], [e["target_ids"] for e in examples])


class ILMCollatorForLanguageModeling(_ILMCollator):
    """Training batches for plain text: `[CLS] [BOS] text` with a part of the text dropped.

    The text of an example is `input_ids`, several documents where its `segment_ids` say so; everything else is as in
    `ILMCollatorForSeq2Seq`.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a document that is too long."""
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

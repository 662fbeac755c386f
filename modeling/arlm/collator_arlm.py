"""From examples to batches for the left-to-right language model. Nothing is corrupted."""

from typing import Any

import numpy as np
import torch

from xlm_hf.objectives.collation import Collator, Documents, Rows, segment_numbers, segment_ranges, segment_starts


class _ARLMCollator(Collator):
    """What all collators of the family share."""

    def _training(self, examples: list[dict[str, Any]], prompts: list[list[int]], targets: list[list[int]]):
        """Rows of documents `prompt [BOS] target`, padded on the right, that predict `target [EOS]`."""
        documents = Documents(examples, prompts, targets)
        prompt_lengths, target_lengths = documents.prompt_lengths, documents.target_lengths
        self.check_ids(documents.prompt_ids, documents.target_ids)
        lengths = prompt_lengths + 1 + target_lengths
        self.check_lengths(lengths + 1, "sequence", "[BOS] and [EOS]")
        rows = Rows(lengths, documents, self.pad_token_id, self.packing)
        rows.write(0, prompt_lengths, documents.prompt_ids)
        rows.input_ids[rows.first + prompt_lengths] = self.bos_token_id
        rows.write(prompt_lengths + 1, target_lengths, documents.target_ids)
        # A document's last tokens, from [BOS] on, each predict the one after it.
        predicted = target_lengths + documents.ends
        target_ids = np.full(predicted.sum(), self.eos_token_id)
        target_ids[segment_ranges(segment_starts(predicted), target_lengths)] = documents.target_ids
        return rows.batch(
            logits_index=rows.index(prompt_lengths, predicted),
            target_ids=target_ids,
            target_documents=segment_numbers(predicted),
            target_lengths=predicted,
        )

    def _prompts_only(self, examples: list[dict[str, Any]], prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """Prompts `prompt [BOS]`, padded on the left."""
        return self.left_padded(examples, [[*prompt, self.bos_token_id] for prompt in prompts], "[BOS]")


class ARLMCollatorForSeq2Seq(_ARLMCollator):
    """Training batches for prompt and target: documents `prompt [BOS] target`, which learn `target [EOS]`.

    Args:
        tokenizer: names the special tokens.
        max_length: positions of the model; a longer document is refused.
        seed: unused, since nothing is drawn; all families' collators take it.
        packing: whether a row may hold several examples, up to `max_length` tokens; no token sees another document.

    Called with a list of examples - dicts of `prompt_ids`, `target_ids` and `example_id` - it returns a dict of
    tensors, for D documents in B rows of at most L tokens without `[EOS]` (never an input) and S predicted
    tokens in all:
        input_ids (B, L): the documents, padded on the right.
        attention_mask (B, L): True for tokens.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        logits_index (S,): `[BOS]` and the tokens of the targets, as indices into the flattened (B x L) tokens.
        target_ids (S,): the token that follows each of them.
        target_documents (S,): the documents they belong to.
        target_lengths (D,): predicted tokens of each document.
        example_id: of the examples, as given.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a document that is too long."""
        return self._training(examples, [e["prompt_ids"] for e in examples], [e["target_ids"] for e in examples])


class ARLMCollatorForLanguageModeling(_ARLMCollator):
    """Training batches for plain text: documents `[BOS] text`, which learn `text [EOS]`.

    The text of an example is `input_ids`, several documents where its `segment_ids` say so; everything else is as in
    `ARLMCollatorForSeq2Seq`.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch; raises ValueError for an id outside the vocabulary or a document that is too long."""
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

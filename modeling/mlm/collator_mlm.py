"""From examples to batches for the masked language model: which tokens are masked."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from xlm_hf.objectives.collation import Documents, Examples
from xlm_hf.objectives.collators import CanvasCollator, Entry
from xlm_hf.objectives.corruption import bernoulli_masks
from xlm_hf.objectives.head_operator import IGNORED_ID


class MLMCollator(CanvasCollator):
    """Documents `prompt [BOS] target [EOS]` with a part of what follows `[BOS]` masked, and prompts `prompt [BOS]`.

    For each sequence t ~ Beta(mask_beta, 1), and each token of its canvas - what follows `[BOS]` - is masked with
    probability t independently. With mask_beta = 1 that is t ~ U(0, 1) (arXiv 2505.05755); a larger one shows emptier
    canvases, in which fewer tokens can be copied from their neighbours. It changes how often each t is trained, not
    what is optimal at it. All draws are functions of (seed, epoch, example_id, position) and the document's number
    alone. In infilling only what the input leaves open is masked; the row shows `target_ids` everywhere else.

    Further arguments are those of `CanvasCollator`. With a number as `canvas_length` the model learns to write `[EOS]
    [PAD] ...` after a sequence. With None, `generate` must be given the length.

    Args:
        mask_beta: skews the masking rate, as above.

    A training batch holds, for B rows of at most L tokens, of which S are masked in all:
        input_ids (B, L): the documents with their masks, padded on the right.
        attention_mask (B, L): True for tokens, padding content included.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        logits_index (S,): where the masked tokens are, as indices into the flattened (B x L) tokens.
        target_ids (S,): the masked tokens.
        example_id: of the examples, as given.
    Where lengths are given (`canvas_length=None`), prompts of examples with a target come with `canvas_lengths` (B,),
    those of the targets with `[EOS]`; inputs to fill in with 0. Otherwise the options of `generate` decide.
    """

    entries = {
        **CanvasCollator.entries,
        "logits_index": Entry("target", index_of="position"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "canvas_lengths": Entry("example"),
    }

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        kind: str,
        prediction: bool = False,
        seed: int = 0,
        packing: bool = False,
        canvas_length: int | None = None,
        mask_beta: float = 1.0,
    ):
        super().__init__(tokenizer, max_length, kind, prediction, seed, packing, canvas_length)
        if mask_beta <= 0:
            raise ValueError(f"mask_beta must be greater than 0 and is {mask_beta}.")
        self.mask_beta = mask_beta

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """The documents with a part of their canvases masked, at rates evenly spread over the epoch."""
        self._check_prompts(documents.prompt_ids)
        self.check_content(documents.target_ids)
        rows, starts, lengths = self.canvas(documents)
        t = documents.low_discrepancy_draws(self.seed) ** (1 / self.mask_beta)
        masked = bernoulli_masks(documents.random_bits(self.seed, lengths, starts), lengths, t)
        logits_index = rows.index(starts, lengths)[masked if documents.blank is None else masked & documents.blank]
        target_ids = rows.input_ids[logits_index]
        rows.input_ids[logits_index] = self.mask_token_id
        return rows.batch(logits_index=logits_index, target_ids=target_ids)

    def prediction_batch(self, examples: Examples) -> dict[str, torch.Tensor]:
        """The prompts for `generate`, with the lengths of their canvases where these are given."""
        batch = super().prediction_batch(examples)
        if self.kind == "infill":
            return {**batch, "canvas_lengths": torch.zeros(len(examples), dtype=torch.int64)}
        self._check_prompts(batch["input_ids"].numpy())
        if self.canvas_length is None and all(self.target_column in example for example in examples):
            batch["canvas_lengths"] = torch.tensor([len(example[self.target_column]) + 1 for example in examples])
        return batch

    def _check_prompts(self, ids: np.ndarray) -> None:
        if (ids == self.mask_token_id).any():
            raise ValueError(
                f"A prompt holds the mask token (id {self.mask_token_id}), which marks positions to be written: "
                "tokenize the data without special tokens."
            )

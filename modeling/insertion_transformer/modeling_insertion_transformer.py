"""The Insertion Transformer (arXiv 1902.03249): for each slot, which token to insert, or that it is finished."""

from typing import Any

import torch
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_insertion_transformer import InsertionTransformerConfig
from .generation_insertion_transformer import InsertionTransformerGenerationConfig, InsertionTransformerGenerationMixin


class InsertionTransformerPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: InsertionTransformerConfig


class InsertionTransformerForInsertionLM(InsertionTransformerPreTrainedModel, InsertionTransformerGenerationMixin):
    """Insertion Transformer: p(token | slot, sequence), a softmax of its own for each slot, in which `[EOS]` is "none".

    The slot right of a token is read at that token.
    """

    generation_config_class = InsertionTransformerGenerationConfig

    def __init__(self, config: InsertionTransformerConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        logits_index: torch.Tensor | None = None,
        head_function: HeadFunction | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """Score every insertion.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            logits_index: (S,) indices into the flattened (B x L) tokens whose logits are wanted; None means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `segment_ids` of packed rows, what else the backbone takes, `output_hidden_states`,
                `output_attentions`.

        Returns:
            `LanguageModelOutput`. Entry (i, v) of `logits` (B, L, V), or (S, V) with `logits_index`, scores the
            insertion of token v right of token i, and that of `[EOS]` scores that nothing is missing there. Those of
            `config.suppressed_ids` are -inf.
        """
        return self.score(
            input_ids,
            logits_index,
            head_function,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

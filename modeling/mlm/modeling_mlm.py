"""The masked language model (MLM): a distribution over tokens at every masked position."""

from typing import Any

import torch
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_mlm import MLMConfig
from .generation_mlm import MLMGenerationConfig, MLMGenerationMixin


class MLMPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: MLMConfig


class MLMForMaskedLM(MLMPreTrainedModel, MLMGenerationMixin):
    """Masked language model: p(token | all that is not masked) at each position, from a bidirectional backbone."""

    generation_config_class = MLMGenerationConfig

    def __init__(self, config: MLMConfig):
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
        """Score every token at every position.

        Args:
            input_ids: (B, L) token ids, `mask_token_id` where a token is to be predicted.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            logits_index: (S,) indices into the flattened (B x L) positions whose logits are wanted; None means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `segment_ids` of packed rows, what else the backbone takes, `output_hidden_states`,
                `output_attentions`.

        Returns:
            `LanguageModelOutput` with `logits` (B, L, V), or (S, V) with `logits_index`, those of
            `config.suppressed_ids` -inf; `hidden_states` and `attentions` where asked for.
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

"""The masked language model (MLM): a distribution over tokens at every masked position."""

from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.rotary_transformer import RotaryTransformerPreTrainedModel
from xlm_hf.modules.transformer_backbone import build_backbone
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_mlm import MLMConfig
from .generation_mlm import MLMGenerationConfig, MLMGenerationMixin


class MLMPreTrainedModel(RotaryTransformerPreTrainedModel):
    """Ties the family to its configuration."""

    config: MLMConfig


class MLMForMaskedLM(MLMPreTrainedModel, MLMGenerationMixin):
    """Masked language model: p(token | all that is not masked) at each position, from a bidirectional backbone."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    generation_config_class = MLMGenerationConfig

    def __init__(self, config: MLMConfig):
        super().__init__(config)
        self.model = build_backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
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
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_index=logits_index,
            **kwargs,
        )
        return LanguageModelOutput(
            **self.apply_head(outputs.last_hidden_state, head_function),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

"""Score entropy discrete diffusion (SEDD, arXiv 2310.16834): scores of all tokens at each noisy position."""

from typing import Any

import torch
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.noise_schedules import noise_of_tokens
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_sedd import SEDDConfig
from .generation_sedd import SEDDGenerationConfig, SEDDGenerationMixin


class SEDDPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: SEDDConfig


class SEDDForScoreEntropy(SEDDPreTrainedModel, SEDDGenerationMixin):
    """Score entropy diffusion: a score for every token at every position, a bidirectional backbone and a head.

    `logits` are log-scores up to the factor of the noise that `config.scaled_scores` describes.
    """

    generation_config_class = SEDDGenerationConfig
    padding_is_content = True

    def __init__(self, config: SEDDConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,
        is_given: torch.Tensor | None = None,
        logits_index: torch.Tensor | None = None,
        head_function: HeadFunction | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """Score every token at every position.

        Args:
            input_ids: (B, L) token ids, those of the canvas masked or noisy.
            attention_mask: (B, L), 1 for tokens, those of the canvas included, and 0 for padding on either side.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            alpha: (B,), or (B, L) where tokens of a row differ: the share alpha_t of the canvas that is without noise
                at the time of each row or token.
            is_given: (B, L) tokens that have no noise at any time: alpha is 1 for them.
            logits_index: (S,) indices into the flattened (B x L) tokens whose logits are wanted; None means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `segment_ids` of packed rows, what else the backbone takes, `output_hidden_states`,
                `output_attentions`.

        Returns:
            `LanguageModelOutput` with `logits` (B, L, V), or (S, V) with `logits_index`; those of the ids that are
            never written are -inf.

        Raises:
            ValueError: if the model is not told `alpha`.
        """
        kwargs["timesteps"] = noise_of_tokens(alpha, self.config.noise_eps, is_given)
        return self.score(
            input_ids,
            logits_index,
            head_function,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

"""The uniform diffusion language model (UDLM, arXiv 2412.10193): a distribution over tokens at each noisy position."""

from typing import Any

import torch
from torch.nn.functional import embedding_bag
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.noise_schedules import noise_of_tokens
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_udlm import UDLMConfig
from .generation_udlm import UDLMGenerationConfig, UDLMGenerationMixin


class UDLMPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: UDLMConfig


class UDLMForUniformDiffusion(UDLMPreTrainedModel, UDLMGenerationMixin):
    """Uniform diffusion: p(x_l | noisy sequence, alpha) for every position l, a bidirectional backbone and a head.

    What the probabilities are of says `config.prediction_type`: the token by the other positions, or by all.
    """

    generation_config_class = UDLMGenerationConfig
    padding_is_content = True

    def __init__(self, config: UDLMConfig):
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
        soft_tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """Score every token at every position.

        Args:
            input_ids: (B, L) token ids, those of the canvas noisy.
            attention_mask: (B, L), 1 for tokens, those of the canvas included, and 0 for padding on either side.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            alpha: (B,), or (B, L) where tokens of a row differ: the share alpha_t of the canvas that is without noise
                at the time of each row or token. Needed with `config.time_conditioning`, ignored without.
            is_given: (B, L) tokens that have no noise at any time: alpha is 1 for them.
            logits_index: (S,) indices into the flattened (B x L) tokens whose logits are wanted; None means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            soft_tokens: mixtures in place of some tokens: where they stand (S,) among the flattened (B x L), ids (S, K)
                and their weights (S, K).
            **kwargs: `segment_ids` of packed rows, what else the backbone takes, `output_hidden_states`,
                `output_attentions`.

        Returns:
            `LanguageModelOutput` with `logits` (B, L, V), or (S, V) with `logits_index`; those of the ids that are
            never written are -inf.

        Raises:
            ValueError: if a model with `config.time_conditioning` is not told `alpha`.
        """
        if self.config.time_conditioning:
            kwargs["timesteps"] = noise_of_tokens(alpha, self.config.noise_eps, is_given)
        elif self.config.conditioning != "none":
            tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
            kwargs["timesteps"] = torch.zeros(len(tokens), device=self.device)
        if soft_tokens is not None:
            index, ids, weights = soft_tokens
            embeddings = self.model.embed_tokens(input_ids)
            mixed = embedding_bag(ids, self.model.embed_tokens.weight, per_sample_weights=weights, mode="sum")
            inputs_embeds = (
                embeddings.flatten(0, 1).index_copy(0, index, mixed.to(embeddings.dtype)).view_as(embeddings)
            )
        return self.score(
            input_ids,
            logits_index,
            head_function,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

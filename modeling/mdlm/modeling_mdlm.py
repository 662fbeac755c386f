"""The masked diffusion language model (MDLM, arXiv 2406.07524): a distribution over tokens at each mask."""

from typing import Any

import torch
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_mdlm import MDLMConfig
from .generation_mdlm import MDLMGenerationConfig, MDLMGenerationMixin


class MDLMPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: MDLMConfig


class MDLMForMaskedDiffusion(MDLMPreTrainedModel, MDLMGenerationMixin):
    """Masked diffusion: p(x_l | x_t) for every masked l, a bidirectional backbone and a vocabulary head.

    This is the SUBS parameterisation of arXiv 2406.07524, section 3.2.3. A mask has probability 0. A token that is not
    masked stays; neither the loss nor the samplers use its logits.
    """

    generation_config_class = MDLMGenerationConfig
    padding_is_content = True

    def __init__(self, config: MDLMConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,
        sigma: torch.Tensor | None = None,
        logits_index: torch.Tensor | None = None,
        head_function: HeadFunction | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """Score every token at every position.

        Args:
            input_ids: (B, L) token ids, `mask_token_id` where a token is to be written.
            attention_mask: (B, L), 1 for tokens, those of the canvas included, and 0 for padding on either side.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            alpha: (B,), or (B, L) for packed rows: the share alpha_t of the canvas that is clean at the time of each
                row or token; 1 is all of it. Needed with `config.time_conditioning`, ignored without.
            sigma: of the same shape, instead of alpha: the total noise that the backbone is told.
            logits_index: (S,) indices into the flattened (B x L) tokens whose logits are wanted; None means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `segment_ids` of packed rows, what else the backbone takes, `output_hidden_states`,
                `output_attentions`.

        Returns:
            `LanguageModelOutput` with `logits` (B, L, V), or (S, V) with `logits_index`; those of the ids that are
            never written are -inf.

        Raises:
            ValueError: if a model with `config.time_conditioning` is not told `alpha`.
        """
        if self.config.time_conditioning:
            if sigma is None and alpha is not None:
                sigma = total_noise(alpha.float(), self.config.noise_eps)
            if sigma is None:
                raise ValueError("The model is conditioned on the time: pass alpha, one number for each row or token.")
            kwargs["timesteps"] = sigma
        elif self.config.conditioning != "none":
            tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
            kwargs["timesteps"] = torch.zeros(len(tokens), device=self.device)
        return self.score(
            input_ids,
            logits_index,
            head_function,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


def total_noise(alpha: torch.Tensor, eps: float) -> torch.Tensor:
    """What a time-conditioned network is told: sigma = -log(eps + (1 - eps) alpha), in [0, -log eps].

    With alpha_t = 1 - t this is the sigma_t = -log(1 - (1 - eps) t) of the published code of arXiv 2406.07524. Any
    function of the time is as good for the bound; eps only keeps this one finite where nothing is clean.
    """
    return -torch.log(eps + (1 - eps) * alpha)

"""Generalized interpolating discrete diffusion (GIDD, arXiv 2503.04482): a law of the token at each position."""

from typing import Any

import torch
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_gidd import GIDDConfig
from .generation_gidd import GIDDGenerationConfig, GIDDGenerationMixin


class GIDDPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: GIDDConfig


class GIDDForInterpolatingDiffusion(GIDDPreTrainedModel, GIDDGenerationMixin):
    """Diffusion between masks and uniform noise: p(x_l | noisy sequence, t) for every position l of the canvas.

    It predicts the clean token of a position, masked or not, by all other positions: what the position itself shows
    comes in with the noise, in the loss and in the samplers.
    """

    generation_config_class = GIDDGenerationConfig
    padding_is_content = True

    def __init__(self, config: GIDDConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        is_given: torch.Tensor | None = None,
        logits_index: torch.Tensor | None = None,
        head_function: HeadFunction | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """Score every token at every position.

        Args:
            input_ids: (B, L) token ids, those of the canvas noisy.
            attention_mask: (B, L), 1 for tokens, those of the canvas included, and 0 for padding on either side.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            timesteps: (B,), or (B, L) where tokens of a row differ: the time t of each row or token, 0 for a text and 1
                for noise. Needed unless `config.conditioning` is "none", and then ignored.
            is_given: (B, L) tokens that have no noise at any time: t is 0 for them.
            logits_index: (S,) indices into the flattened (B x L) tokens whose logits are wanted; None means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `segment_ids` of packed rows, what else the backbone takes, `output_hidden_states`,
                `output_attentions`.

        Returns:
            `LanguageModelOutput` with `logits` (B, L, V), or (S, V) with `logits_index`; those of the ids that are
            never written are -inf.

        Raises:
            ValueError: if a model that is conditioned on the time is not told it.
        """
        if self.config.conditioning != "none":
            if timesteps is None:
                raise ValueError("The model is conditioned on the time: pass timesteps, one for each row or token.")
            if is_given is not None:
                timesteps = (timesteps if timesteps.dim() == 2 else timesteps[:, None]).masked_fill(is_given, 0.0)
            kwargs["timesteps"] = timesteps.float()
        return self.score(
            input_ids,
            logits_index,
            head_function,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

"""The block diffusion language model (BD3-LM, arXiv 2503.09573): what stands behind each mask of a block."""

from typing import Any

import torch
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_bd3lm import BD3LMConfig
from .generation_bd3lm import BD3LMGenerationConfig, BD3LMGenerationMixin


class BD3LMPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: BD3LMConfig


class BD3LMForBlockDiffusion(BD3LMPreTrainedModel, BD3LMGenerationMixin):
    """Block diffusion: p(x_l | noisy block, clean blocks before it) for every masked l.

    A mask has probability 0, and a token that is not masked stays (neither the loss nor the samplers ever ask for its
    logits), as in masked diffusion (SUBS, arXiv 2406.07524, section 3.2.3).
    """

    generation_config_class = BD3LMGenerationConfig
    padding_is_content = True

    def __init__(self, config: BD3LMConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        block_ids: torch.Tensor | None = None,
        is_noisy: torch.Tensor | None = None,
        logits_index: torch.Tensor | None = None,
        head_function: HeadFunction | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """Score every token at every position.

        Args:
            input_ids: (B, L) token ids, `mask_token_id` where a token is to be written.
            attention_mask: (B, L), 1 for tokens, those of the canvas included, and 0 for padding on either side.
            position_ids: (B, L) rotary positions, the same for both copies of a token; by default each row counts its
                own tokens.
            block_ids: (B, L) block of each token, 0 for the prompt and `[BOS]`; no token sees a later block. None makes
                all of a row one block.
            is_noisy: (B, L) whether a token belongs to the noisy copy of its document, where a row holds a noisy and a
                clean one (training); None means one copy.
            logits_index: (S,) indices into the flattened (B x L) tokens whose logits are wanted; None means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `segment_ids` of packed rows, `cache` of the blocks before, what else the backbone takes.

        Returns:
            `LanguageModelOutput` with `logits` (B, L, V), or (S, V) with `logits_index`; those of the ids that are
            never written are -inf.
        """
        if self.config.conditioning != "none":
            tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
            kwargs["timesteps"] = torch.zeros(len(tokens), device=self.device)
        return self.score(
            input_ids,
            logits_index,
            head_function,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            block_ids=block_ids,
            is_noisy=is_noisy,
            **kwargs,
        )

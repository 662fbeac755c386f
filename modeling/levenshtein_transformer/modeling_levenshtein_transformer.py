"""The Levenshtein Transformer (arXiv 1905.11006): which tokens go, how many are missing where, and which they are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_levenshtein_transformer import LevenshteinTransformerConfig
from .generation_levenshtein_transformer import (
    LevenshteinTransformerGenerationConfig,
    LevenshteinTransformerGenerationMixin,
)


@dataclass
class LevenshteinTransformerOutput(LanguageModelOutput):
    """What `LevenshteinTransformerForEditLM.forward` returns: `LanguageModelOutput` and the scores of two more heads.

    Attributes:
        deletion_logits: (B, L) or (T,), float32: the log-odds that a token is deleted.
        placeholder_logits: (B, L, K + 1) or (G, K + 1), float32: scores of 0 to K placeholders right of a token.
    """

    deletion_logits: torch.Tensor | None = None
    placeholder_logits: torch.Tensor | None = None


class LevenshteinTransformerForEditLM(PreTrainedLanguageModel, LevenshteinTransformerGenerationMixin):
    """Levenshtein Transformer: three policies over one backbone.

    They are p(delete | token, sequence), p(number of placeholders | gap, sequence) and p(token | placeholder,
    sequence). The gap right of a token is read at that token.
    """

    config: LevenshteinTransformerConfig
    generation_config_class = LevenshteinTransformerGenerationConfig

    def __init__(self, config: LevenshteinTransformerConfig):
        super().__init__(config)
        self.placeholder_head = nn.Linear(config.hidden_size, config.max_placeholders + 1)
        self.deletion_head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_index: torch.Tensor | None = None,
        gap_index: torch.Tensor | None = None,
        logits_index: torch.Tensor | None = None,
        head_function: HeadFunction | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LevenshteinTransformerOutput:
        """Score edits: of all heads at every position or, if any index is given, where the indices say alone.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side.
            token_index: (T,) indices into the flattened (B x L) tokens that may be deleted.
            gap_index: (G,) indices of the tokens left of the gaps that may get placeholders.
            logits_index: (S,) indices of the placeholders that are to be filled.
            head_function: what is made of the hidden states of these instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `position_ids`, `segment_ids` of packed rows and what else the backbone takes,
                `output_hidden_states`, `output_attentions`.

        Returns:
            `LevenshteinTransformerOutput`. Fields of a head without an index are None where another has one. The logits
            of `config.suppressed_ids` are -inf.
        """
        wanted = [token_index, gap_index, logits_index]
        given = [index for index in wanted if index is not None]
        index = torch.cat(given) if given else None
        outputs = self.model(
            input_ids, attention_mask=attention_mask, output_index=index, inputs_embeds=inputs_embeds, **kwargs
        )
        states = [outputs.last_hidden_state] * 3
        if given:
            parts = iter(outputs.last_hidden_state.split([len(index) for index in given]))
            states = [None if index is None else next(parts) for index in wanted]
        of_tokens, of_gaps, of_placeholders = states
        fields: dict[str, Any] = {}
        if of_tokens is not None:
            fields["deletion_logits"] = _float32(self.deletion_head(of_tokens).squeeze(-1))
        if of_gaps is not None:
            fields["placeholder_logits"] = _float32(self.placeholder_head(of_gaps))
        if of_placeholders is not None:
            fields.update(self.apply_head(of_placeholders, head_function))
        return LevenshteinTransformerOutput(
            **fields, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _float32(x: torch.Tensor) -> torch.Tensor:
    """`x`, at least in single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

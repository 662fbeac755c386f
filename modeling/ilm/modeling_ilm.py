"""The insertion language model (ILM, arXiv 2505.05755): where to insert, what to insert, and when to stop."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.rotary_transformer import take
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_ilm import ILMConfig
from .generation_ilm import ILMGenerationConfig, ILMGenerationMixin


@dataclass
class ILMOutput(LanguageModelOutput):
    """What `ILMForInsertionLM.forward` returns: `LanguageModelOutput` and the logits of the stopping head.

    Entry (i, v) of `logits` (B, L, V), or (S, V) with `slot_index`, scores the insertion of token v right of token i.

    Attributes:
        stop_logits: (B, 2), or (D, 2) with `cls_index`; class 0 says that the sequence is complete, class 1 that
            something is missing. With `num_missing_classes` other than 2 there are so many, or None of them.
    """

    stop_logits: torch.Tensor | None = None


class ILMStoppingHead(nn.Module):
    """Classifier on the hidden state x of `[CLS]`: W (x + W2 tanh(W1 LN(x) + b1) + b2)."""

    def __init__(self, config: ILMConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.down_proj = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_missing_classes, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, hidden_size) to logits (B, num_missing_classes) of the number of missing tokens."""
        residual = self.down_proj(torch.tanh(self.up_proj(self.norm(hidden_states))))
        return self.classifier(hidden_states + residual)


class ILMPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: ILMConfig


class ILMForInsertionLM(ILMPreTrainedModel, ILMGenerationMixin):
    """Insertion language model: p(slot, token | sequence) over all slots and tokens jointly, and a stopping head."""

    generation_config_class = ILMGenerationConfig

    def __init__(self, config: ILMConfig):
        super().__init__(config)
        self.stop_head = ILMStoppingHead(config) if config.num_missing_classes else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        slot_index: torch.Tensor | None = None,
        cls_index: torch.Tensor | None = None,
        head_function: HeadFunction | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ILMOutput:
        """Score every insertion.

        Args:
            input_ids: (B, L) token ids, each row starting with `[CLS]` after any padding on the left.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            slot_index: (S,) indices into the flattened (B x L) tokens whose logits are wanted; None means all. The
                vocabulary head is the largest product of a small model, and few of its rows matter.
            cls_index: (D,) likewise `[CLS]` of each document of packed rows; by default each row's first token.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `segment_ids` of packed rows, what else the backbone takes, `output_hidden_states`,
                `output_attentions`.

        Returns:
            `ILMOutput`; the logits of `config.suppressed_ids` are -inf.
        """
        if cls_index is None:
            tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
            # Not len(), which makes an exported program one of this batch size.
            cls_index = torch.arange(tokens.shape[0], device=tokens.device) * tokens.shape[1]
            if attention_mask is not None and attention_mask.dim() == 2:
                cls_index = cls_index + attention_mask.long().argmax(dim=-1)
        index = None if slot_index is None else torch.cat((slot_index, cls_index))
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_index=index,
            **kwargs,
        )
        if slot_index is None:
            of_slots, of_cls = outputs.last_hidden_state, take(outputs.last_hidden_state, cls_index)
        else:
            of_slots, of_cls = outputs.last_hidden_state.split((len(slot_index), len(cls_index)))
        return ILMOutput(
            **self.apply_head(of_slots, head_function),
            stop_logits=None if self.stop_head is None else self.stop_head(of_cls),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

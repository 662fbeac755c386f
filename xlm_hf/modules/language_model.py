"""What the models of the families share: a backbone, a vocabulary head, and the way from ids to logits."""

from typing import Any, ClassVar

import torch
from torch import nn

from .backbone_config import RotaryTransformerConfig
from .rotary_transformer import RotaryTransformerPreTrainedModel
from .transformer_backbone import build_backbone
from .vocabulary_head import HeadFunction, LanguageModelOutput


class PreTrainedLanguageModel(RotaryTransformerPreTrainedModel):
    """A bidirectional backbone and a vocabulary head.

    The base of a family's `...PreTrainedModel`. The model itself adds what else it has, and ends its `__init__` with
    `post_init()`.

    Attributes:
        padding_is_content: whether `[PAD]` also fills a canvas behind a text, so that its embedding must learn.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    padding_is_content: ClassVar[bool] = False

    def __init__(self, config: RotaryTransformerConfig):
        super().__init__(config)
        self.model = build_backbone(config)
        if self.padding_is_content:
            self.model.embed_tokens.padding_idx = None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

    def score(
        self,
        input_ids: torch.Tensor | None,
        logits_index: torch.Tensor | None,
        head_function: HeadFunction | None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """The logits of every token at every position, or what a function makes of them.

        Args:
            input_ids: (B, L) token ids; None where `inputs_embeds` are given.
            logits_index: (S,) indices into the flattened (B x L) tokens whose logits are wanted; None means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            **kwargs: whatever else the backbone takes.
        """
        outputs = self.model(input_ids, output_index=logits_index, **kwargs)
        return LanguageModelOutput(
            **self.apply_head(outputs.last_hidden_state, head_function),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

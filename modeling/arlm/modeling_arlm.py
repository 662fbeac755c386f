"""The left-to-right language model (ARLM): p(next token | all tokens before it)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.rotary_transformer import RotaryTransformerPreTrainedModel
from xlm_hf.modules.transformer_backbone import build_backbone
from xlm_hf.modules.vocabulary_head import HeadFunction

from .configuration_arlm import ARLMConfig
from .generation_arlm import ARLMGenerationConfig, ARLMGenerationMixin


@dataclass
class ARLMOutput(CausalLMOutputWithPast):
    """What `ARLMForCausalLM.forward` returns: transformers' `CausalLMOutputWithPast`, and one field.

    Attributes:
        head_output: what the head function of the call returned, in place of `logits`; None without one.
    """

    head_output: Any = None


class ARLMPreTrainedModel(RotaryTransformerPreTrainedModel):
    """Ties the family to its configuration."""

    config: ARLMConfig


class ARLMForCausalLM(ARLMPreTrainedModel, ARLMGenerationMixin):  # type: ignore[misc]
    """Left-to-right language model: the causal backbone and a vocabulary head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    generation_config_class = ARLMGenerationConfig
    model_tags = ["autoregressive"]

    def __init__(self, config: ARLMConfig):
        super().__init__(config)
        self.model = build_backbone(config, is_causal=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_index: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        head_function: HeadFunction | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> ARLMOutput:
        """Score the next token after every token.

        Args:
            input_ids: (B, L) token ids; with a cache, those after the cached ones.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side; with a cache, (B, cached + L).
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            cache: keys and values of the tokens before these; those of these are added to it.
            use_cache: whether to begin a cache where none is given.
            logits_index: (S,) indices into the flattened (B x L) tokens whose logits are wanted; None means all.
            logits_to_keep: last tokens of each row whose logits are wanted, or their indices; 0 means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            labels: (B, L) the tokens themselves, -100 where none is to be predicted, for `loss` (see `_label_loss`).
            num_items_in_batch: what the sum of the cross-entropies is divided by instead of the number of labels.
            shift_labels: (B, L) labels that stand at the tokens before them already, and count instead.

        Returns:
            `ARLMOutput` with `logits` (B, L, V), or (S, V) with `logits_index`; those at a token score the token after
            it, and those of `config.suppressed_ids` are -inf.
        """
        if use_cache and cache is None:
            cache = self.new_cache()
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            output_index=logits_index,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_index is None and logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        fields = self.apply_head(hidden_states, head_function)
        return ARLMOutput(
            loss=None if labels is None else self._label_loss(fields, labels, num_items_in_batch, shift_labels),
            **fields,
            cache=cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _label_loss(self, fields, labels, num_items_in_batch, shift_labels) -> torch.Tensor:
        """The mean cross-entropy of each label at the token before it, as in transformers' causal language models.

        That of a token that no sequence gets, such as `[BOS]`, is infinite.
        """
        options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
        return self.loss_function(logits=fields["logits"], labels=labels, vocab_size=self.config.vocab_size, **options)

"""The masked language model (MLM): a distribution over tokens at every masked position."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_mlm import MLMConfig
from .generation_mlm import MLMGenerationConfig, MLMGenerationMixin


@dataclass
class MLMOutput(LanguageModelOutput):
    """What `MLMForMaskedLM.forward` returns: `LanguageModelOutput`, and the lengths.

    Attributes:
        length_logits: (D, max_canvas_length + 1), float32: logits of the length of the canvas after each `[BOS]` of
            `length_index`; None without a length head or without that index.
    """

    length_logits: torch.Tensor | None = None


class MLMPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: MLMConfig


class MLMForMaskedLM(MLMPreTrainedModel, MLMGenerationMixin):
    """Masked language model: p(token | all that is not masked) at each position, from a bidirectional backbone."""

    generation_config_class = MLMGenerationConfig

    def __init__(self, config: MLMConfig):
        super().__init__(config)
        num_lengths = (config.max_canvas_length or 0) + 1
        self.length_head = None if config.max_canvas_length is None else nn.Linear(config.hidden_size, num_lengths)
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
        length_index: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> MLMOutput:
        """Score every token at every position.

        Args:
            input_ids: (B, L) token ids, `mask_token_id` where a token is to be predicted.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            logits_index: (S,) indices into the flattened (B x L) positions whose logits are wanted; None means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`. A model with a length
                head then needs `block_ids` (B, L), 0 for the prompt and `[BOS]` and 1 for the canvas.
            length_index: (D,) indices of the `[BOS]` whose canvas lengths are wanted, together with `logits_index`.
            labels: (B, L) tokens to predict at the same positions, -100 where none is: `loss` is their mean
                cross-entropy, as in transformers' masked language models. That of `[MASK]` and the like is infinite.
            num_items_in_batch: what the sum is divided by instead of the number of labels.
            **kwargs: `segment_ids`, `output_hidden_states`, `output_attentions` and what else the backbone takes.

        Returns:
            `MLMOutput` with `logits` (B, L, V), or (S, V) with `logits_index`, those of `config.suppressed_ids` -inf;
            `length_logits`, `hidden_states` and `attentions` where asked for.

        Raises:
            ValueError: for `length_index` without `logits_index`, or without a length head.
        """
        if self.length_head is not None and kwargs.get("block_ids") is None:
            kwargs["block_ids"] = self._block_ids(input_ids)
        outputs = self.model(
            input_ids,
            output_index=logits_index if length_index is None else self._both(logits_index, length_index),
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        of_tokens, length_logits = outputs.last_hidden_state, None
        if self.length_head is not None and length_index is not None:
            of_tokens, of_bos = of_tokens.tensor_split((len(of_tokens) - len(length_index),))
            length_logits = self.length_head(of_bos).float()
        fields = self.apply_head(of_tokens, head_function)
        return MLMOutput(
            loss=None if labels is None else self._label_loss(fields["logits"], labels, num_items_in_batch),
            **fields,
            length_logits=length_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _block_ids(self, input_ids: Any) -> torch.Tensor:
        """The block (B, L) of each token: 0 for a prompt and its `[BOS]`, 1 for the canvas, which these do not see."""
        if input_ids is None:
            raise ValueError("With a length head no token of the prompt sees the canvas: pass block_ids, see there.")
        is_bos = (input_ids == self.config.bos_token_id).long()
        return is_bos.cumsum(dim=-1) - is_bos

    def _both(self, logits_index, length_index) -> torch.Tensor:
        """The two indices as one."""
        if logits_index is None or self.length_head is None:
            raise ValueError("length_index needs logits_index, and a model with max_canvas_length.")
        return torch.cat((logits_index, length_index))

    def _label_loss(self, logits, labels, num_items_in_batch) -> torch.Tensor:
        options = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
        return self.loss_function(logits=logits, labels=labels, **options)

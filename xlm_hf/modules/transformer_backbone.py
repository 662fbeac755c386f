"""Any language model of transformers as a backbone, decoders made bidirectional.

The model keeps its layers and what stands between them and its vocabulary head; its embedding and its head become those
of the family. It is rebuilt from a configuration alone, so that a saved model needs nothing of where it came from.
"""

import importlib
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    packed_sequence_mask_function,
)
from transformers.modeling_outputs import BaseModelOutput

from .rotary_transformer import RotaryTransformerConfig, take


def language_model_class(config: Any) -> Any:
    """The Auto class that gives the language model of a configuration, its masked one if it has both."""
    for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM):
        if type(config) in auto_class._model_mapping:
            return auto_class
    raise ValueError(f"{config.model_type!r} is no language model of transformers with a vocabulary head.")


def take_embedding_and_head(language_model: Any) -> tuple[nn.Embedding, nn.Linear]:
    """Cut the token embedding and the vocabulary head out of a language model, which then maps embeddings to states."""
    taken = []
    for module in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        name = next(name for name, candidate in language_model.named_modules() if candidate is module)
        parent, _, child = name.rpartition(".")
        owner: Any = language_model.get_submodule(parent)
        setattr(owner, child, nn.Identity())
        if isinstance(module, nn.Linear) and getattr(owner, "bias", None) is module.bias:
            owner.bias = None
        taken.append(module)
    return taken[0], taken[1]


class TransformerBackbone(nn.Module):
    """The layers of a language model of transformers, seeing in both directions.

    Args:
        config: of the family; its `backbone_config` says which model.
    """

    def __init__(self, config: RotaryTransformerConfig):
        super().__init__()
        inner = AutoConfig.for_model(**config.backbone_config)  # type: ignore[arg-type]
        for name, value in {"vocab_size": config.vocab_size, "is_causal": False, "use_cache": False}.items():
            setattr(inner, name, value)
        # Tying is between the family's embedding and head, and the data type is that of the family's model.
        inner.tie_word_embeddings, inner.dtype = False, None
        self.shift_logits = config.shift_logits
        self.language_model = language_model_class(inner).from_config(
            inner, attn_implementation=config._attn_implementation
        )
        self.embed_tokens, _ = take_embedding_and_head(self.language_model)
        for module in self.language_model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
        # RoBERTa and its like count positions from behind the id of padding.
        tables = [m for name, m in self.language_model.named_modules() if name.endswith("position_embeddings")]
        self.first_position = next(
            (m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), 0
        )
        if config.lora:
            add_adapters(self.language_model, config.lora)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of the tokens."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        output_index: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Encode a batch.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side; None means no padding.
            position_ids: (B, L); by default each row counts its own tokens.
            segment_ids: (B, L) document of each token in a packed row; no token sees another document.
            output_index: (S,) indices into the flattened (B x L) tokens whose states are wanted; None means all.
            output_hidden_states: return those of all layers too.
            output_attentions: return the attention weights too.

        Returns:
            `last_hidden_state` (B, L, hidden_size), or (S, hidden_size) with `output_index`, ready for the head. With
            `shift_logits` that of token l stands at l + 1, since a left-to-right model tells there what comes next.
        """
        embeddings = self.embed_tokens(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        outputs = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=self._masks(embeddings, attention_mask, segment_ids),
            position_ids=position_ids + self.first_position,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        states = outputs.logits
        if self.shift_logits:
            states = torch.cat((states[:, :1], states[:, :-1]), dim=1)
        return BaseModelOutput(
            last_hidden_state=take(states, output_index),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _masks(self, embeddings, attention_mask, segment_ids) -> Any:
        """The mask, ready for the layers; where some see only what is near, one for each kind of layer.

        It is always made: without one, attention would fall back on what an architecture does by itself.
        """
        config = self.language_model.config
        options = {
            "config": config,
            "inputs_embeds": embeddings,
            "attention_mask": attention_mask,
            "and_mask_function": None if segment_ids is None else packed_sequence_mask_function(segment_ids),
            "allow_is_bidirectional_skip": False,
        }
        everywhere = create_bidirectional_mask(**options)
        if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
            return everywhere
        near = create_bidirectional_sliding_window_mask(**options)
        return {"full_attention": everywhere, "sliding_attention": near}


def add_adapters(language_model: nn.Module, options: dict[str, Any]) -> None:
    """Freeze a model and put trainable low-rank adapters into it (LoRA, Hu et al., arXiv 2106.09685).

    Args:
        language_model: changed in place.
        options: of `peft.LoraConfig`.

    Raises:
        ValueError: if peft is not installed, or an option does not fit.
    """
    try:
        # By name, so that a model without adapters needs no peft where it is loaded.
        peft = importlib.import_module("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(**options), language_model)
    except ImportError as error:
        raise ValueError("model.lora needs peft: install xlm-hf[lora].") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.lora does not fit: {error}") from error

"""Any language model of transformers as a backbone, left-to-right or in both directions.

The model keeps its layers and what stands between them and its vocabulary head; its embedding and its head become those
of the family. It is rebuilt from a configuration alone, so that a saved model needs nothing of where it came from.
"""

import importlib
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutput

from .attention_patterns import attention_pattern
from .backbone_config import RotaryTransformerConfig
from .rotary_transformer import RotaryTransformer, default_position_ids, take
from .time_conditioning import TimeToken


def build_backbone(config: RotaryTransformerConfig, is_causal: bool = False) -> Any:
    """The backbone that a family's configuration describes.

    Args:
        config: of the family.
        is_causal: whether a token sees only itself and what stands before it.
    """
    if config.backbone == "transformers":
        return TransformerBackbone(config, is_causal)
    return RotaryTransformer(config, is_causal)


def language_model_class(config: Any) -> Any:
    """The Auto class that gives the language model of a configuration, its masked one if it has both."""
    for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM):
        if type(config) in auto_class._model_mapping:
            return auto_class
    raise ValueError(f"{config.model_type!r} is not a language model with a vocabulary head: choose another.")


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
    """The layers of a language model of transformers.

    Args:
        config: of the family; its `backbone_config` says which model.
        is_causal: whether a token sees only itself and what stands before it; otherwise decoders see both ways.

    Raises:
        ValueError: if a left-to-right model is to stand on an encoder.
    """

    def __init__(self, config: RotaryTransformerConfig, is_causal: bool = False):
        super().__init__()
        self.is_causal = is_causal
        inner = AutoConfig.for_model(**config.backbone_config)  # type: ignore[arg-type]
        self.is_encoder = language_model_class(inner) is AutoModelForMaskedLM
        if is_causal and self.is_encoder:
            raise ValueError(
                f"This model needs a decoder and {inner.model_type!r} is an encoder: choose gpt2 or the like."
            )
        for name, value in {"vocab_size": config.vocab_size, "is_causal": is_causal, "use_cache": False}.items():
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
                module.is_causal = is_causal
        # RoBERTa and its like count positions from behind the id of padding.
        tables = [m for name, m in self.language_model.named_modules() if name.endswith("position_embeddings")]
        self.first_position = next(
            (m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), 0
        )
        self.time_token = TimeToken(config) if config.conditioning == "token" else None
        if config.lora:
            add_adapters(self.language_model, config.lora)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of the tokens."""
        return self.embed_tokens

    def new_cache(self) -> Cache:
        """An empty cache of keys and values, which can be cropped.

        Raises:
            ValueError: for an encoder, whose layers take none.
        """
        if self.is_encoder:
            kind = self.language_model.config.model_type
            raise ValueError(f"The layers of a {kind!r} take no cache: choose a decoder, or do without the cache.")
        # All keys of all layers: those behind a window are masked, and cropping could not bring back what left it.
        return DynamicCache()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        output_index: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        block_ids: torch.Tensor | None = None,
        is_noisy: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Encode a batch; further arguments are those of `RotaryTransformer`.

        Args:
            output_hidden_states: return those of all layers too.
            output_attentions: return the attention weights too.

        Returns:
            `last_hidden_state` (B, L, hidden_size), or (S, hidden_size) with `output_index`, ready for the head. With
            `shift_logits` that of token l stands at l + 1, since a left-to-right model tells there what comes next; the
            first token of a document has its own.
        """
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = default_position_ids(embeddings, attention_mask, past)
        if self.time_token is not None:
            embeddings = self.time_token(embeddings, input_ids, timesteps)
        pattern = attention_pattern(segment_ids, block_ids, is_noisy)
        outputs = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=self._masks(embeddings, attention_mask, pattern, cache),
            position_ids=position_ids + self.first_position,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **({} if cache is None else {"cache": cache, "use_cache": True}),
        )
        states = outputs.logits
        if self.shift_logits:
            # The first token of a document has none before it: neither padding nor another document takes its part.
            states = torch.where(position_ids[..., None] == 0, states, states.roll(1, dims=1))
        return BaseModelOutput(
            last_hidden_state=take(states, output_index),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _masks(self, embeddings, attention_mask, pattern, cache) -> Any:
        """The mask, ready for the layers; where some see only what is near, one for each kind of layer.

        It is always made: without one, attention would fall back on what an architecture does by itself.
        """
        config = self.language_model.config
        if attention_mask is None:
            past = 0 if cache is None else cache.get_seq_length()
            attention_mask = torch.ones(len(embeddings), past + embeddings.shape[1], device=embeddings.device).long()
        skip = "allow_is_causal_skip" if self.is_causal else "allow_is_bidirectional_skip"
        options: Any = {
            "config": config,
            "inputs_embeds": embeddings,
            "attention_mask": attention_mask,
            "and_mask_function": pattern,
            "cache": cache,
            skip: False,
        }
        everywhere = (create_causal_mask if self.is_causal else create_bidirectional_mask)(**options)
        if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
            return everywhere
        make_mask = create_sliding_window_causal_mask if self.is_causal else create_bidirectional_sliding_window_mask
        return {"full_attention": everywhere, "sliding_attention": make_mask(**options)}


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

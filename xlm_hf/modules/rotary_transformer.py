"""The backbone that all families share: a pre-norm transformer with rotary positions, bidirectional or causal.

A comparison between families then compares methods, not architectures. Layer layout: Vaswani et al. (2017) with
normalisation before each block; rotary positions: Su et al. (arXiv 2104.09864), in the rotate-half layout.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import AutoConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig, strict
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .devices import is_synchronous


@strict
class RotaryTransformerConfig(PreTrainedConfig):
    """Architecture of the backbone, inherited by the configuration of every family.

    Attributes:
        vocab_size: number of token embeddings.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of layers.
        num_attention_heads: heads per layer; must divide `hidden_size`.
        intermediate_size: width inside the feed-forward block; None means 4 x `hidden_size`.
        hidden_act: activation of the feed-forward block, a name from `transformers.activations.ACT2FN`.
        max_position_embeddings: longest sequence that the model accepts, in tokens.
        rope_theta: base of the rotary frequencies.
        partial_rotary_factor: share of each head's dimensions that are rotated; 0 needs `learned_positions`.
        learned_positions: whether a learnt embedding of the absolute position is added to the token's, beside the
            rotation of queries and keys.
        conv_kernel_size: taps of the short convolution at the start of every layer (see `ShortConvolution`); 0 means
            none. A bidirectional model takes an odd number.
        attention_dropout: dropout probability of the attention weights.
        hidden_dropout_prob: dropout probability after the attention and feed-forward blocks.
        layer_norm_eps: added to the variance in every layer norm.
        final_layer_norm: whether a layer norm stands between the last layer and the heads.
        initialization: "normal" draws linear maps and embeddings from N(0, initializer_range^2); "fan_in" draws linear
            maps from N(0, 1 / inputs), so that the scale of what they return does not depend on the width, embeddings
            from N(0, 1), and divides the maps that write into the residual stream by sqrt(2 x num_hidden_layers), so
            that neither does it grow with the depth (Radford et al., "GPT-2", 2019, section 2.3).
        initializer_range: standard deviation of the "normal" initialisation.
        tie_word_embeddings: whether the vocabulary head shares the embedding matrix.
        suppress_tokens: ids that are never written; their logits are -inf in training and in generation.
        lm_head_bias: whether the vocabulary head has a bias, as in some published models.
        backbone: "rotary", the transformer described here; "transformers", the one that `backbone_config` describes.
            On the command line, `model.backbone` may be the folder or Hub id of the latter.
        backbone_config: configuration of a language model of transformers, as a dictionary with its `model_type`; the
            sizes above are then that model's, and what else is said above of the layers has no effect.
        shift_logits: whether such a backbone tells at a token what stands at the next place, as a left-to-right model
            does, instead of at the token's own.
        lora: options of `peft.LoraConfig`, with which such a backbone is adapted; None trains all of it.
        unrestricted_softmax: whether those logits stay what they are instead, as in published checkpoints; then it is
            for the generation alone to leave those ids out.

    Raises:
        ValueError: for an unknown backbone, or if `num_attention_heads` does not divide `hidden_size`, the rotated part
            of a head is odd, or nothing tells the positions.
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    max_position_embeddings: int = 1024
    rope_theta: float | int = 10000.0
    partial_rotary_factor: float | int = 1.0
    learned_positions: bool = False
    conv_kernel_size: int = 0
    attention_dropout: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-5
    final_layer_norm: bool = True
    initialization: Literal["normal", "fan_in"] = "normal"
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False
    suppress_tokens: list[int] | None = None
    lm_head_bias: bool = False
    backbone: str = "rotary"
    backbone_config: dict[str, Any] | None = None
    shift_logits: bool = False
    lora: dict[str, Any] | None = None
    unrestricted_softmax: bool = False

    own_backbones: ClassVar[tuple[str, ...]] = ("rotary",)

    def __post_init__(self, **kwargs):
        if self.backbone_config is not None:
            self.backbone = "transformers"
            inner = AutoConfig.for_model(**self.backbone_config)
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
                setattr(self, name, getattr(inner, name, getattr(self, name)))
            return super().__post_init__(**kwargs)
        if self.backbone not in self.own_backbones:
            raise ValueError(
                f"backbone must be one of {', '.join(self.own_backbones)} and is {self.backbone!r}; other transformers "
                "are given by backbone_config."
            )
        if self.shift_logits or self.lora:
            raise ValueError("shift_logits and lora are for a backbone of transformers: unset them or give one.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}): change one of them."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(sorted(ACT2FN))}.")
        if self.rotary_dim % 2 or (self.rotary_dim == 0 and not self.learned_positions):
            raise ValueError(
                f"The rotated part of a head has {self.rotary_dim} dimensions (hidden_size / num_attention_heads x "
                "partial_rotary_factor); rotation works on pairs: choose an even number, or learned_positions and 0."
            )
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    @property
    def never_written(self) -> list[int] | None:
        """The ids that no sequence gets in generation."""
        return self.suppress_tokens

    @property
    def outside_softmax(self) -> list[int] | None:
        """The ids whose logits are -inf."""
        return None if self.unrestricted_softmax else self.never_written

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of each head that are rotated."""
        return round(self.hidden_size // self.num_attention_heads * self.partial_rotary_factor)


def rotary_cos_sin(
    position_ids: torch.Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the rotary angles theta^(-2i / rotary_dim) x position, i < rotary_dim / 2.

    Args:
        position_ids: (B, L) int64.
        rotary_dim: number of rotated dimensions of a head.
        theta: base of the frequencies.
        dtype: of the result; the angles are computed in float32.

    Returns:
        two (B, 1, L, rotary_dim / 2) tensors.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=position_ids.device, dtype=torch.float32) / rotary_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of dimensions, the i-th and the (half + i)-th, i < half, of each head of `x` (..., L, head_dim).

    `cos` and `sin` (B, 1, L, half) are those of `rotary_cos_sin`; what lies beyond the first 2 half dimensions stays.
    """
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    # Nothing in place: torch.compile takes the strides of the first batch for those of all.
    rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat((*rotated, rest), dim=-1)


def take(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Of `x` (B, L, ...), what `index` (S,) names in the flattened (B x L): (S, ...); all of it without an index."""
    return x if index is None else x.flatten(0, 1).index_select(0, index)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out, in the signature of transformers' attention interface.

    Returns:
        the attended values (B, L, heads, head_dim) and the attention weights (B, heads, L, L).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ShortConvolution(nn.Module):
    """Depthwise convolution along the sequence, added to its input: y_t = x_t + sum_o w_o * x_{t+o}, per channel.

    It shows every token its neighbours before the attention looks, so that "what stands next to a copy of this token"
    takes one layer instead of two; language models learn such look-ups much earlier with it (So et al., "Primer",
    arXiv 2109.08668; Allen-Zhu, "Physics of language models 4.1: Canon layers", 2025). The offsets o run over
    -(k-1)/2 .. (k-1)/2, or over -(k-1) .. 0 in a causal model. Nothing is taken from padding, from beyond the ends, or
    from another document of a packed row.
    """

    def __init__(self, hidden_size: int, kernel_size: int, is_causal: bool, layer_idx: int = 0):
        super().__init__()
        if not is_causal and kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size is {kernel_size}: a bidirectional model needs an odd number.")
        first = -(kernel_size - 1) if is_causal else -(kernel_size // 2)
        self.offsets = range(first, first + kernel_size)
        self.layer_idx = layer_idx
        self.weight = nn.Parameter(torch.empty(kernel_size, hidden_size))

    def forward(
        self, hidden_states: torch.Tensor, document_ids: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """Map (B, L, hidden_size) to the same shape.

        Args:
            hidden_states: the residual stream.
            document_ids: (B, L), equal for tokens that may see each other, negative for padding; None means that all
                tokens of a row do.
            cache: in a causal model, holds the last inputs, to which these are added.
        """
        L = hidden_states.shape[1]
        output = hidden_states
        if cache is not None:
            inputs = hidden_states if document_ids is None else hidden_states * (document_ids >= 0)[..., None]
            taken = cache.update_conv_state(inputs.mT, self.layer_idx, conv_kernel_size=len(self.weight)).mT
            taken = nn.functional.pad(taken, (0, 0, len(self.weight), 0))
            for offset, weight in zip(self.offsets, self.weight, strict=True):
                end = taken.shape[1] + offset
                output = output + taken[:, end - L : end] * weight
            return output
        for offset, weight in zip(self.offsets, self.weight, strict=True):
            if abs(offset) >= L:
                continue
            # Target t takes from t + offset: the two slices are the parts of the row where both exist.
            to = slice(max(0, -offset), L - max(0, offset))
            source = slice(max(0, offset), L - max(0, -offset))
            taken = hidden_states[:, source] * weight
            if document_ids is not None:
                same = (document_ids[:, to] == document_ids[:, source]) & (document_ids[:, source] >= 0)
                taken = taken * same[..., None]
            output = output + nn.functional.pad(taken, (0, 0, to.start, L - to.stop))
        return output


class RotaryAttention(nn.Module):
    """Multi-head self-attention with rotary positions: softmax(q k^T / sqrt(head_dim)) v, no biases."""

    def __init__(self, config: RotaryTransformerConfig, is_causal: bool, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = is_causal
        self.scaling = self.head_dim**-0.5
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj.writes_to_residual = True  # type: ignore[assignment]

    def forward(self, hidden_states, attention_mask, cos_sin, cache=None, output_index=None, **kwargs):
        """Attend within (B, L, hidden_size) `hidden_states`, and to the tokens whose keys and values are cached.

        Returns:
            the same shape, or (S, hidden_size) with `output_index` (S,), and the attention weights.
        """
        B, L, _ = hidden_states.shape
        projected = self.qkv_proj(hidden_states).view(B, L, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        (query, key), value = apply_rotary(projected[:2], *cos_sin), projected[2]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(take(attended.reshape(B, L, -1), output_index)), weights


class FeedForward(nn.Module):
    """Two linear maps with an activation between: W2 act(W1 x + b1) + b2."""

    def __init__(self, config: RotaryTransformerConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)  # type: ignore[arg-type]
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)  # type: ignore[arg-type]
        self.down_proj.writes_to_residual = True  # type: ignore[assignment]

    def forward(self, hidden_states):
        """Map (..., hidden_size) to the same shape."""
        return self.down_proj(self.act(self.up_proj(hidden_states)))


class RotaryTransformerLayer(GradientCheckpointingLayer):
    """One pre-norm layer: x + Attention(LN(x)), then x + FeedForward(LN(x)), the short convolution before both."""

    def __init__(self, config: RotaryTransformerConfig, is_causal: bool, layer_idx: int):
        super().__init__()
        self.conv = None
        if config.conv_kernel_size:
            self.conv = ShortConvolution(config.hidden_size, config.conv_kernel_size, is_causal, layer_idx)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = RotaryAttention(config, is_causal, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, attention_mask=None, cos_sin=None, document_ids=None, output_index=None, **kwargs):
        """Map (B, L, hidden_size) to the same shape, or to (S, hidden_size) with `output_index` (S,)."""
        if self.conv is not None:
            hidden_states = self.conv(hidden_states, document_ids, kwargs.get("cache"))
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, cos_sin, output_index=output_index, **kwargs
        )
        hidden_states = take(hidden_states, output_index) + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class RotaryTransformerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of a model with this backbone; every family's base class derives from it."""

    config: RotaryTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RotaryTransformerLayer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": RotaryTransformerLayer, "attentions": RotaryAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.config.initialization == "fan_in":
            if isinstance(module, nn.Linear):
                depth = 2 * self.config.num_hidden_layers if hasattr(module, "writes_to_residual") else 1
                init.normal_(module.weight, std=(depth * module.in_features) ** -0.5)
            elif isinstance(module, nn.Embedding):
                init.normal_(module.weight, std=1.0)
        if isinstance(module, ShortConvolution):
            # torch's own law for a convolution with this many taps per output.
            bound = len(module.offsets) ** -0.5
            init.uniform_(module.weight, -bound, bound)


class RotaryTransformer(RotaryTransformerPreTrainedModel):
    """Token embedding, layers and final norm; the heads belong to the families.

    Args:
        config: architecture.
        is_causal: whether a token sees only itself and what stands before it.
    """

    def __init__(self, config: RotaryTransformerConfig, is_causal: bool = False):
        super().__init__(config)
        self.is_causal = is_causal
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.embed_positions = None
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            RotaryTransformerLayer(config, is_causal, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_layer_norm else nn.Identity()
        )
        self.post_init()

    def _mask(self, embeddings, attention_mask, segment_ids, cache):
        make_mask = create_causal_mask if self.is_causal else create_bidirectional_mask
        skip = "allow_is_causal_skip" if self.is_causal else "allow_is_bidirectional_skip"
        # A mask of ones may be left out, but whether it is one must be read.
        return make_mask(
            config=self.config,
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            cache=cache,
            and_mask_function=None if segment_ids is None else packed_sequence_mask_function(segment_ids),
            **{skip: attention_mask is None or is_synchronous(embeddings.device)},
        )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        output_index: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encode a batch.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side; None means no padding. With a cache
                it covers the tokens in the cache too.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens, so that padding on the
                left and on the right give the same result.
            segment_ids: (B, L) document of each token in a packed row; no token sees another document.
            cache: keys and values of the tokens before these, and inputs of the short convolution; those of these are
                added to it.
            output_index: (S,) indices into the flattened (B x L) tokens whose last hidden states are wanted; None means
                all. In the last layer every token is looked at, but only these go on to its feed-forward block.

        Returns:
            `last_hidden_state` (B, L, hidden_size), or (S, hidden_size) with `output_index`, and `hidden_states` and
            `attentions` where asked for.
        """
        if position_ids is None:
            L = input_ids.shape[1]
            past = 0 if cache is None else cache.get_seq_length()
            mask = input_ids.new_ones(1, past + L) if attention_mask is None else attention_mask.long()
            position_ids = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -L:]
        hidden_states = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        cos_sin = rotary_cos_sin(position_ids, self.config.rotary_dim, self.config.rope_theta, hidden_states.dtype)
        mask = self._mask(hidden_states, attention_mask, segment_ids, cache)
        document_ids = segment_ids
        if attention_mask is not None and self.config.conv_kernel_size:
            document_ids = (torch.zeros_like(input_ids) if segment_ids is None else segment_ids).masked_fill(
                ~attention_mask[:, -input_ids.shape[1] :].bool(), -1
            )
        kwargs.update(attention_mask=mask, cos_sin=cos_sin, document_ids=document_ids, cache=cache)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layers[-1](hidden_states, output_index=output_index, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

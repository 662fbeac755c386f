"""The backbone that all families share: a pre-norm transformer with rotary positions.

It is bidirectional or causal, and may be conditioned on a time. A comparison between families then compares methods,
not architectures. Layer layout: Vaswani et al. (2017) with normalisation before each block; rotary positions: Su et al.
(arXiv 2104.09864), in the rotate-half layout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_patterns import attention_pattern, neighbors_in_copies, pattern_mask, shifted_neighbors
from .backbone_config import RotaryTransformerConfig
from .checked_inputs import check_inputs
from .devices import is_synchronous
from .short_convolution import ConvolutionCacheLayer, ShortConvolution, convolution_offsets
from .time_conditioning import AdaptiveLayerNorm, AdaptiveModulation, TimestepEmbedding, TimeToken
from .vocabulary_head import HeadFunction, head_fields


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


def default_position_ids(tokens: torch.Tensor, attention_mask: torch.Tensor | None, past: int = 0) -> torch.Tensor:
    """Positions (B or 1, L) of `tokens` (B, L, ...): each row counts its own tokens, the `past` ones in a cache too.

    A mask of pairs does not say which tokens exist, so that all of them count.
    """
    L = tokens.shape[1]
    if attention_mask is None or attention_mask.dim() == 4:
        return torch.arange(past, past + L, device=tokens.device)[None]
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -L:]


def check_keywords(keywords: dict[str, Any]) -> None:
    """Raise TypeError for an argument that no forward pass takes; one that is None counts as not given."""
    # The tokenizer is what `generate` of transformers hands on.
    for name in keywords.keys() - {"output_hidden_states", "output_attentions", "use_cache", "tokenizer"}:
        if keywords[name] is not None:
            of_loss = ": the loss of this model is an object of its own, see xlm_hf.XLMTrainer"
            raise TypeError(f"forward has no argument {name!r}{of_loss if name == 'labels' else ''}.")


def take_of_rows(x: torch.Tensor, L: int, index: torch.Tensor | None) -> torch.Tensor:
    """What `index` names of `x` (B, 1 or L, H), which has one entry for all the L tokens of a row or one for each."""
    return take(x, index if index is None or x.shape[1] == L else index // L)


def take(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Of `x` (B, L, ...), what `index` (S,) names in the flattened (B x L): (S, ...); all of it without an index."""
    return x if index is None else x.flatten(0, 1).index_select(0, index)


def eager_attention_forward(module: Any, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs) -> Any:
    """Softmax attention written out, in the signature of transformers' attention interface.

    `attention_mask` is added to the scores, or, where it is of bools, says which of them count.

    Returns:
        the attended values (B, L, heads, head_dim) and the attention weights (B, heads, L, L).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


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

        The result has the same shape, or (S, hidden_size) with `output_index` (S,). The attention weights come second.
        """
        B, L, _ = hidden_states.shape
        projected = self.qkv_proj(hidden_states).view(B, L, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        (query, key), value = apply_rotary(projected[:2], *cos_sin), projected[2]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        options = {"scaling": self.scaling, "dropout": dropout, **kwargs}
        attended, weights = attention(self, query, key, value, attention_mask, **options)
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
    """One pre-norm layer: x + Attention(LN(x)), then x + FeedForward(LN(x)), the short convolution before both.

    With adaptive layer norms it is x + g1 Attention(LN(x) (1 + s1) + b1), then x + g2 FeedForward(LN(x) (1 + s2) + b2).
    These norms have no biases, and b, s and g come from the time.
    """

    def __init__(self, config: RotaryTransformerConfig, is_causal: bool, layer_idx: int):
        super().__init__()
        is_adaptive = config.conditioning == "adaln"
        self.legacy_modulated_residual = config.legacy_modulated_residual
        taps = config.conv_kernel_size
        self.conv = ShortConvolution(config.hidden_size, taps, is_causal, layer_idx) if taps else None
        norm_options: dict[str, Any] = {"eps": config.layer_norm_eps, "bias": not is_adaptive}
        self.input_layernorm = nn.LayerNorm(config.hidden_size, **norm_options)
        self.self_attn = RotaryAttention(config, is_causal, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, **norm_options)
        self.mlp = FeedForward(config)
        self.modulation = AdaptiveModulation(config, 6) if is_adaptive else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, attention_mask, cos_sin, neighbors, conditioning, output_index=None, **kwargs):
        """Map (B, L, hidden_size) to the same shape, or to (S, hidden_size) with `output_index` (S,)."""
        if self.conv is not None:
            hidden_states = self.conv(hidden_states, *neighbors, cache=kwargs.get("cache"))
        normalised = self.input_layernorm(hidden_states)
        if self.modulation is not None:
            shift_1, scale_1, *of_output = self.modulation(conditioning)
            normalised = torch.addcmul(shift_1, normalised, 1 + scale_1)
        attended, _ = self.self_attn(normalised, attention_mask, cos_sin, output_index=output_index, **kwargs)
        if self.modulation is None:
            hidden_states = take(hidden_states, output_index) + self.dropout(attended)
            return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        L, residual = hidden_states.shape[1], normalised if self.legacy_modulated_residual else hidden_states
        gate_1, shift_2, scale_2, gate_2 = (take_of_rows(x, L, output_index) for x in of_output)
        hidden_states = torch.addcmul(take(residual, output_index), gate_1, self.dropout(attended))
        modulated = torch.addcmul(shift_2, self.post_attention_layernorm(hidden_states), 1 + scale_2)
        return torch.addcmul(hidden_states, gate_2, self.dropout(self.mlp(modulated)))


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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass, its tensors checked first (see `check_inputs`)."""
        if self.base_model is not self and not torch.compiler.is_compiling():
            check_inputs(self.config, args, kwargs, type(self).forward, RotaryTransformer.forward)
        return super().__call__(*args, **kwargs)

    def new_cache(self) -> Cache:
        """An empty cache for the backbone; `cache.crop(-n)` takes back the n tokens last added."""
        backbone: Any = self.base_model
        return backbone.new_cache()

    def apply_head(self, hidden_states: torch.Tensor, head_function: HeadFunction | None) -> dict[str, Any]:
        """What the vocabulary head makes of hidden states, by name (see `head_fields`)."""
        suppressed_ids = None if self.config.softmax_over_suppressed else self.config.suppressed_ids
        return head_fields(hidden_states, self.lm_head, suppressed_ids, head_function)

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
        elif isinstance(module, AdaptiveModulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class RotaryTransformer(RotaryTransformerPreTrainedModel):
    """Token embedding, layers and final norm; the heads belong to the families.

    Args:
        config: architecture.
        is_causal: whether a token sees only itself and what stands before it.
    """

    def __init__(self, config: RotaryTransformerConfig, is_causal: bool = False):
        super().__init__(config)
        self.is_causal = is_causal
        is_adaptive = config.conditioning == "adaln"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        shape = (config.max_position_embeddings, config.hidden_size)
        self.embed_positions = nn.Embedding(*shape) if config.learned_positions else None
        self.layers = nn.ModuleList(
            RotaryTransformerLayer(config, is_causal, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        has_norm = config.final_layer_norm and not is_adaptive
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        self.time_embedding = TimestepEmbedding(config) if is_adaptive else None
        self.final_norm = AdaptiveLayerNorm(config) if is_adaptive else None
        self.time_token = TimeToken(config) if config.conditioning == "token" else None
        self.post_init()

    def new_cache(self) -> Cache:
        """An empty cache of keys and values and, where the layers have a short convolution, of its inputs."""
        layer = ConvolutionCacheLayer if self.config.conv_kernel_size else DynamicLayer
        return Cache(layers=[layer() for _ in self.layers])

    def _mask(self, embeddings, attention_mask, pattern, cache, past):
        is_given = attention_mask is not None and attention_mask.dim() == 4
        if pattern is not None and not is_given and self.config._attn_implementation != "flex_attention":
            return pattern_mask(pattern, attention_mask, embeddings, past, self.is_causal)
        make_mask = create_causal_mask if self.is_causal else create_bidirectional_mask
        skip = "allow_is_causal_skip" if self.is_causal else "allow_is_bidirectional_skip"
        # A mask of ones may be left out, but whether it is one must be read.
        options = {skip: attention_mask is None or is_synchronous(embeddings.device), "and_mask_function": pattern}
        return make_mask(self.config, embeddings, attention_mask=attention_mask, cache=cache, **options)

    def _neighbors(self, embeddings, attention_mask: Any, pattern, past, position_ids, segment_ids, is_noisy):
        """`allowed` and `source` of the short convolutions, the same in all layers."""
        if not self.config.conv_kernel_size:
            return None, None
        offsets = convolution_offsets(self.config.conv_kernel_size, self.is_causal)
        if is_noisy is not None:
            source, allowed = neighbors_in_copies(offsets, pattern, position_ids, is_noisy, segment_ids, attention_mask)
            return allowed[..., None].to(embeddings.dtype), source
        if attention_mask is not None and attention_mask.dim() == 4:
            pairs = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            attention_mask = None
            pattern = lambda batch, head, query, key: pairs[batch, head, query - past, key]  # noqa: E731
        exists = shifted_neighbors(offsets, pattern, attention_mask, embeddings, past)
        return None if exists is None else exists[..., None].to(embeddings.dtype), None

    @merge_with_config_defaults
    @capture_outputs
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
        **kwargs,
    ) -> BaseModelOutput:
        """Encode a batch.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side; None means no padding. With a cache
                it covers the tokens in the cache too, (B, cached + L). A mask (B, 1, L, cached + L) of bools says for
                each pair whether it is seen, one of floats what is added to its score.
            position_ids: (B, L) positions; by default each row counts its own tokens, so that padding on the left and
                on the right give the same result. With a mask of pairs every token counts.
            segment_ids: (B, L) document of each token in a packed row; no token sees another document.
            cache: from `new_cache`. It holds the keys, values and inputs of short convolutions of the earlier tokens;
                those of these tokens are added.
            output_index: (S,) indices into the flattened (B x L) tokens whose last hidden states are wanted; None means
                all. In the last layer every token is looked at, but only these go on to its feed-forward block.
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            block_ids: (B, L), or (B, cached + L), block of each token; no token sees a later one (see `block_pattern`).
            is_noisy: (B, L) whether a token belongs to the noisy copy of its document, if a row holds a noisy and a
                clean one. It needs `block_ids`, and `position_ids` that are the same for both copies.
            timesteps: the time or noise of each row (B,), or of each token (B, L); needed if the model is conditioned
                on it.

        Returns:
            `last_hidden_state` (B, L, hidden_size), or (S, hidden_size) with `output_index`, and `hidden_states` and
            `attentions` where asked for.
        """
        check_keywords(kwargs)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        L, past = hidden_states.shape[1], 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = default_position_ids(hidden_states, attention_mask, past)
        if self.time_token is not None:
            hidden_states = self.time_token(hidden_states, input_ids, timesteps)
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        conditioning: Any = None if self.time_embedding is None else self.time_embedding(timesteps)
        cos_sin = rotary_cos_sin(position_ids, self.config.rotary_dim, self.config.rope_theta, hidden_states.dtype)
        pattern = attention_pattern(segment_ids, block_ids, is_noisy)
        kwargs["attention_mask"] = self._mask(hidden_states, attention_mask, pattern, cache, past)
        neighbors = self._neighbors(hidden_states, attention_mask, pattern, past, position_ids, segment_ids, is_noisy)
        kwargs.update(neighbors=neighbors, cos_sin=cos_sin, conditioning=conditioning, cache=cache)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.norm(self.layers[-1](hidden_states, output_index=output_index, **kwargs))
        if self.final_norm is not None:
            hidden_states = self.final_norm(hidden_states, take_of_rows(conditioning, L, output_index))
        return BaseModelOutput(last_hidden_state=hidden_states)

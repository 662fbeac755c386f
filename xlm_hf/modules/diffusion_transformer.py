"""The time-conditioned backbone: the shared transformer with adaptive layer norms (DiT, Peebles and Xie, 2212.09748).

Attention, feed-forward block, masks and positions are those of `rotary_transformer`; a scalar for each row, its time
or its noise, shifts, scales and gates every block.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import strict
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from .rotary_transformer import (
    FeedForward,
    RotaryAttention,
    RotaryTransformer,
    RotaryTransformerConfig,
    RotaryTransformerPreTrainedModel,
    ShortConvolution,
    take,
)


@strict
class DiffusionTransformerConfig(RotaryTransformerConfig):
    """Architecture of the time-conditioned backbone; `final_layer_norm` has no effect, the final norm is adaptive.

    Attributes:
        conditioning_size: width of the embedding of the time.
        timestep_frequencies: number of frequencies in that embedding.
        legacy_modulated_residual: whether the attention block is added to its normalised and modulated input instead of
            to the residual stream. Checkpoints of xlm-core need it; the papers' diffusion transformer does not.
    """

    conditioning_size: int = 128
    timestep_frequencies: int = 128
    legacy_modulated_residual: bool = False


class TimestepEmbedding(nn.Module):
    """Embedding of a scalar s: SiLU(W2 SiLU(W1 [cos(s f), sin(s f)] + b1) + b2), f_i = 10000^(-i / n), i < n."""

    def __init__(self, config: DiffusionTransformerConfig):
        super().__init__()
        self.num_frequencies = config.timestep_frequencies
        self.up_proj = nn.Linear(2 * self.num_frequencies, config.conditioning_size)
        self.down_proj = nn.Linear(config.conditioning_size, config.conditioning_size)
        self.act = nn.SiLU()

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Map (B,) or (B, L) to the same shape and conditioning_size."""
        exponents = torch.arange(self.num_frequencies, device=timesteps.device) / self.num_frequencies
        angles = timesteps[..., None].float() * torch.exp(-math.log(10000.0) * exponents)
        features = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.up_proj.weight.dtype)
        return self.act(self.down_proj(self.act(self.up_proj(features))))


class AdaptiveModulation(nn.Linear):
    """Linear map from the conditioning to shifts, scales and gates, zero at first: layers start as the identity."""

    def __init__(self, config: DiffusionTransformerConfig, num_parts: int):
        super().__init__(config.conditioning_size, num_parts * config.hidden_size)
        self.num_parts = num_parts

    def forward(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Map (B, 1 or L, conditioning_size) to `num_parts` tensors (B, 1 or L, hidden_size)."""
        return super().forward(conditioning).chunk(self.num_parts, dim=-1)


def _of_tokens(x: torch.Tensor, L: int, index: torch.Tensor | None) -> torch.Tensor:
    """What `index` names of `x` (B, 1 or L, H), which has one entry for all the L tokens of a row or one for each."""
    return take(x, index if index is None or x.shape[1] == L else index // L)


class AdaptiveLayerNorm(nn.Module):
    """LN(x) (1 + scale) + shift, the norm without a bias, scale and shift from the conditioning."""

    def __init__(self, config: DiffusionTransformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.modulation = AdaptiveModulation(config, 2)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Map (B, L, hidden_size) to the same shape."""
        shift, scale = self.modulation(conditioning)
        return self.norm(hidden_states) * (1 + scale) + shift


class DiffusionTransformerLayer(GradientCheckpointingLayer):
    """x + g1 Attention(LN(x) (1 + s1) + b1), then x + g2 FeedForward(LN(x) (1 + s2) + b2); b, s, g by the time."""

    def __init__(self, config: DiffusionTransformerConfig, layer_idx: int):
        super().__init__()
        self.legacy_modulated_residual = config.legacy_modulated_residual
        self.conv = None
        if config.conv_kernel_size:
            self.conv = ShortConvolution(config.hidden_size, config.conv_kernel_size, is_causal=False)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.self_attn = RotaryAttention(config, is_causal=False, layer_idx=layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.mlp = FeedForward(config)
        self.modulation = AdaptiveModulation(config, 6)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        cos_sin=None,
        document_ids=None,
        conditioning=None,
        output_index=None,
        **kwargs,
    ):
        """Map (B, L, hidden_size) to the same shape, or to (S, hidden_size) with `output_index` (S,)."""
        shift_1, scale_1, *of_output = self.modulation(conditioning)
        if self.conv is not None:
            hidden_states = self.conv(hidden_states, document_ids)
        modulated = self.input_layernorm(hidden_states) * (1 + scale_1) + shift_1
        attended, _ = self.self_attn(modulated, attention_mask, cos_sin, output_index=output_index, **kwargs)
        residual = take(modulated if self.legacy_modulated_residual else hidden_states, output_index)
        L = hidden_states.shape[1]
        gate_1, shift_2, scale_2, gate_2 = (_of_tokens(x, L, output_index) for x in of_output)
        hidden_states = residual + gate_1 * self.dropout(attended)
        modulated = self.post_attention_layernorm(hidden_states) * (1 + scale_2) + shift_2
        return hidden_states + gate_2 * self.dropout(self.mlp(modulated))


class DiffusionTransformerPreTrainedModel(RotaryTransformerPreTrainedModel):
    """What transformers needs to know of a model with this backbone."""

    config: DiffusionTransformerConfig
    _no_split_modules = ["DiffusionTransformerLayer", "RotaryTransformerLayer"]
    _can_record_outputs = {"hidden_states": DiffusionTransformerLayer, "attentions": RotaryAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AdaptiveModulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class DiffusionTransformer(DiffusionTransformerPreTrainedModel, RotaryTransformer):
    """Token embedding, layers and final norm, all of the layers conditioned on a scalar for each row."""

    def __init__(self, config: DiffusionTransformerConfig):
        # The parent brings embeddings, masks and positions; its layers and its norm know no time.
        super().__init__(config)
        self.time_embedding = TimestepEmbedding(config)
        self.layers = nn.ModuleList(DiffusionTransformerLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.Identity()
        self.final_norm = AdaptiveLayerNorm(config)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, timesteps: torch.Tensor, output_index: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """Encode a batch.

        Args:
            input_ids: (B, L) token ids.
            timesteps: the time or noise of each row (B,), or of each token (B, L) where a row holds several documents.
            output_index: as for `RotaryTransformer`.
            **kwargs: likewise `attention_mask`, `position_ids`, `segment_ids`.

        Returns:
            `last_hidden_state` (B, L, hidden_size), or (S, hidden_size) with `output_index`, and `hidden_states` and
            `attentions` where asked for.
        """
        conditioning = self.time_embedding(timesteps if timesteps.dim() == 2 else timesteps[:, None])
        outputs = super().forward(input_ids, conditioning=conditioning, output_index=output_index, **kwargs)
        conditioning = _of_tokens(conditioning, input_ids.shape[1], output_index)
        outputs.last_hidden_state = self.final_norm(outputs.last_hidden_state, conditioning)
        return outputs

"""How a transformer is told a time or a noise level: adaptive layer norms, or a feature added to a token.

Adaptive layer norms: DiT, Peebles and Xie, arXiv 2212.09748. The token needs nothing of the layers, so that
any language model can be told a time.
"""

import math
from typing import Any

import torch
from torch import nn


class TimestepEmbedding(nn.Module):
    """Embedding of a scalar s: SiLU(W2 SiLU(W1 [cos(s f), sin(s f)] + b1) + b2), f_i = 10000^(-i / n), i < n.

    Args:
        config: with `timestep_frequencies`, n, and `conditioning_size`.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.num_frequencies = config.timestep_frequencies
        self.up_proj = nn.Linear(2 * self.num_frequencies, config.conditioning_size)
        self.down_proj = nn.Linear(config.conditioning_size, config.conditioning_size)
        self.act = nn.SiLU()

    def forward(self, timesteps: torch.Tensor | None) -> torch.Tensor:
        """Map (B,), a time for each row, or (B, L), one for each token, to (B, 1 or L, conditioning_size).

        Raises:
            ValueError: without a time.
        """
        if timesteps is None:
            raise ValueError("The model is conditioned on a time: pass timesteps, a number for each row or token.")
        timesteps = timesteps if timesteps.dim() == 2 else timesteps[:, None]
        exponents = torch.arange(self.num_frequencies, device=timesteps.device) / self.num_frequencies
        angles = timesteps[..., None].float() * torch.exp(-math.log(10000.0) * exponents)
        features = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.up_proj.weight.dtype)
        return self.act(self.down_proj(self.act(self.up_proj(features))))


class AdaptiveModulation(nn.Linear):
    """Linear map from the conditioning to shifts, scales and gates, zero at first: layers start as the identity."""

    def __init__(self, config: Any, num_parts: int):
        super().__init__(config.conditioning_size, num_parts * config.hidden_size)
        self.num_parts = num_parts

    def forward(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Map (B, 1 or L, conditioning_size) to `num_parts` tensors (B, 1 or L, hidden_size)."""
        return super().forward(conditioning).chunk(self.num_parts, dim=-1)


class AdaptiveLayerNorm(nn.Module):
    """LN(x) (1 + scale) + shift, the norm without a bias, scale and shift from the conditioning."""

    def __init__(self, config: Any):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.modulation = AdaptiveModulation(config, 2)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Map (B, L, hidden_size) to the same shape."""
        shift, scale = self.modulation(conditioning)
        return self.norm(hidden_states) * (1 + scale) + shift


class TimeToken(nn.Module):
    """Adds W e(s), e the embedding of the time s, to the embedding of `[BOS]`; W is zero at first.

    Every token with that id gets it, so that each document of a packed row has one and is told its own time.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.bos_token_id = config.bos_token_id
        self.embedding = TimestepEmbedding(config)
        self.projection = AdaptiveModulation(config, 1)

    def forward(
        self, embeddings: torch.Tensor, input_ids: torch.Tensor | None, timesteps: torch.Tensor | None
    ) -> torch.Tensor:
        """Map embeddings (B, L, hidden_size) of `input_ids` (B, L) to the same shape.

        Raises:
            ValueError: without `input_ids`.
        """
        if input_ids is None:
            raise ValueError("conditioning='token' adds the time to [BOS]: pass input_ids beside inputs_embeds.")
        (feature,) = self.projection(self.embedding(timesteps))
        return embeddings + feature * (input_ids == self.bos_token_id)[..., None]

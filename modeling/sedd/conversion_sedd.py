"""From published checkpoints of score entropy diffusion to ours: those of arXiv 2310.16834's authors."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.hub.published_weights import DIFFUSION_TRANSFORMER, Weights, diffusion_transformer_options, renamed

_NAMES = {"hidden_size": "hidden_dim", "length": "model_length"}


def from_paper(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Options of `SEDDConfig` and tensors of `SEDDForScoreEntropy`; see `xlm_hf.convert_checkpoint`.

    Args:
        weights: tensors of a checkpoint.
        arguments: its config.json: `tokens`, `graph`, `noise` and `model`. An absorbing graph has its mask as the last
            id; a uniform one has none, and `mask_token_id` is an id beyond the vocabulary. The schedules run from alpha
            = 1 to 0 here, whatever ends the published ones have.

    Raises:
        ValueError: for an argument that is missing.
    """
    is_absorbing = (arguments.get("graph") or {}).get("type") == "absorb"
    of_model = {_NAMES.get(name, name): value for name, value in (arguments.get("model") or {}).items()}
    if "tokens" in arguments:
        of_model["vocab_size"] = arguments["tokens"] + is_absorbing
    options = diffusion_transformer_options(of_model, weights)
    noise = arguments.get("noise") or {}
    options |= {
        "kernel": "absorb" if is_absorbing else "uniform",
        "scaled_scores": bool(of_model.get("scale_by_sigma")),
        # As far as the published schedules go.
        "noise_eps": math.exp(-noise.get("sigma_max", 20)) if noise.get("type") == "geometric" else 1e-3,
        "mask_token_id": options["vocab_size"] - is_absorbing,
        "suppress_tokens": [],
    }
    return options, renamed(weights, DIFFUSION_TRANSFORMER)

"""From published checkpoints of uniform diffusion to ours: those of arXiv 2412.10193's and 2506.10892's authors."""

from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.hub.published_weights import DIFFUSION_TRANSFORMER, Weights, diffusion_transformer_options, renamed

# What the published training config calls the arguments of the published model's config.
_TRAINING_NAMES = {"hidden_size": "hidden_dim", "length": "model_length"}


def from_paper(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Options of `UDLMConfig` and tensors of `UDLMForUniformDiffusion`; see `xlm_hf.convert_checkpoint`.

    Noise gives every id of the published vocabulary, so none is suppressed. There is no mask: `mask_token_id` is an id
    beyond the vocabulary.

    Args:
        weights: tensors of a checkpoint of the authors of one of the papers.
        arguments: its config.json, or the config that it was trained by.

    Raises:
        ValueError: for an argument that is missing.
    """
    of_model = {_TRAINING_NAMES.get(name, name): value for name, value in (arguments.get("model") or {}).items()}
    given = {**arguments, **of_model}
    options = diffusion_transformer_options(given, weights)
    options |= {
        "time_conditioning": bool(given.get("time_conditioning", True)),
        "mask_token_id": options["vocab_size"],
        "suppress_tokens": [],
    }
    return options, renamed(weights, DIFFUSION_TRANSFORMER)

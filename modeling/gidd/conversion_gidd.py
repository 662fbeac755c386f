"""From the checkpoints of GIDD's authors to ours."""

from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.hub.published_weights import DIFFUSION_TRANSFORMER, Weights, diffusion_transformer_options, renamed
from xlm_hf.modules.messages import did_you_mean

# Names of the authors' sizes, by those of the other diffusion transformers.
_SIZES = {
    "hidden_dim": "hidden_size",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "model_length": "max_seq_len",
}


def from_paper(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Options of `GIDDConfig` and tensors of `GIDDForInterpolatingDiffusion`; see `xlm_hf.convert_checkpoint`.

    Args:
        weights: tensors of a checkpoint of arXiv 2503.04482's authors.
        arguments: its config.json. The mask is the last id of the vocabulary, and noise gives every other one.

    Raises:
        ValueError: for an argument that is missing.
    """
    for name in _SIZES.values():
        if name not in arguments:
            raise ValueError(f"The checkpoint's config has no {name!r}: {did_you_mean(name, arguments)}")
    given = {**arguments, **{name: arguments[own] for name, own in _SIZES.items()}, "dropout": 0.0}
    options = diffusion_transformer_options(given, weights, p_uniform="uniform_share")
    return {**options, "suppress_tokens": []}, renamed(weights, DIFFUSION_TRANSFORMER)

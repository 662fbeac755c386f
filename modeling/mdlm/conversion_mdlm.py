"""From published checkpoints of masked diffusion models to ours: those of the XLM library and those of the paper."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.hub.published_weights import (
    DIFFUSION_TRANSFORMER,
    FINAL_NORM,
    HEADS,
    LAYERS,
    TIME,
    Weights,
    diffusion_transformer_options,
    model_options,
    renamed,
    time_sizes,
)

XLM_CORE = {
    **(HEADS | LAYERS | TIME | FINAL_NORM),
    r"encoder\.(\d+)\.ada_ln_modulations\.modulation": r"model.layers.\1.modulation",
    r"output_layer\.adaLN_modulation\.modulation": "model.final_norm.modulation",
}
# Total noise at t = 1 in the schedule of the XLM library.
_SIGMA_MAX = 10.0


def from_xlm_core(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Options of `MDLMConfig` and tensors of `MDLMForMaskedDiffusion`; see `xlm_hf.convert_checkpoint`."""
    options = model_options(arguments, weights, d_cond="", frequency_embedding_size="")
    options |= {
        "conditioning": "adaln",
        "legacy_modulated_residual": True,
        "noise_eps": math.exp(-_SIGMA_MAX),
        "final_layer_norm": True,
        **time_sizes(weights),
    }
    return options, renamed(weights, XLM_CORE)


def from_paper(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """The same from a checkpoint of arXiv 2406.07524's authors, `arguments` being its config.json.

    Its mask is the last id of the vocabulary. Without `time_conditioning` the network is told sigma = 0 at all times.
    """
    options = diffusion_transformer_options(arguments, weights)
    options["time_conditioning"] = bool(arguments.get("time_conditioning", False))
    return options, renamed(weights, DIFFUSION_TRANSFORMER)

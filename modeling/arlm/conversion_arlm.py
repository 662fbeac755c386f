"""From the published library's checkpoints of this family to ours."""

from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.hub.published_weights import ROTARY_TRANSFORMER, Weights, model_options, renamed


def from_xlm_core(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Options of `ARLMConfig` and tensors of `ARLMForCausalLM`; see `xlm_hf.convert_checkpoint`."""
    options = model_options(arguments, weights)
    # It has no mask token, whatever the vocabulary has.
    options.pop("mask_token_id", None)
    return options, renamed(weights, ROTARY_TRANSFORMER)

"""From the published library's checkpoints of this family to ours."""

from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.hub.published_weights import ROTARY_TRANSFORMER, Weights, model_options, renamed


def from_xlm_core(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Options of `MLMConfig` and tensors of `MLMForMaskedLM`; see `xlm_hf.convert_checkpoint`."""
    return model_options(arguments, weights), renamed(weights, ROTARY_TRANSFORMER)

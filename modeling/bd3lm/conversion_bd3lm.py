"""From the checkpoints of block diffusion's authors to ours."""

from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.hub.published_weights import DIFFUSION_TRANSFORMER, Weights, diffusion_transformer_options, renamed

# Names of the sizes in the authors' training configs, which have them under `model`.
_TRAINING_NAMES = {"hidden_size": "hidden_dim", "length": "model_length"}


def from_paper(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Options of `BD3LMConfig` and tensors of `BD3LMForBlockDiffusion`; see `xlm_hf.convert_checkpoint`.

    Args:
        weights: tensors of a checkpoint of arXiv 2503.09573's authors.
        arguments: its config.json, or the config that it was trained by. The mask is the last id of the vocabulary; the
            network is told sigma = 0 at all times.

    Raises:
        ValueError: for an argument that is missing, a checkpoint without adaptive layer norms (`adaln`), or one that is
            conditioned on the time (`time_conditioning`), which no published one is.
    """
    of_model = {_TRAINING_NAMES.get(name, name): value for name, value in (arguments.get("model") or {}).items()}
    given = {**arguments, **of_model}
    if given.get("time_conditioning"):
        raise ValueError("The checkpoint is conditioned on the time (time_conditioning), which no model here is.")
    options = diffusion_transformer_options(given, weights, block_size="block_length")
    own = {name: tensor for name, tensor in weights.items() if not name.startswith("sampling_eps_")}
    return options, renamed(own, DIFFUSION_TRANSFORMER)

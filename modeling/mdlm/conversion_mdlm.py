"""From published checkpoints of masked diffusion models to ours: those of the XLM library and those of the paper."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.hub.published_weights import HEADS, LAYERS, Weights, model_options, renamed
from xlm_hf.modules.messages import did_you_mean

_TIME = {r"sigma_map\.mlp\.0": "model.time_embedding.up_proj", r"sigma_map\.mlp\.2": "model.time_embedding.down_proj"}
_NORM = {r"output_layer\.norm_final": "model.final_norm.norm"}
XLM_CORE = {
    **(HEADS | LAYERS | _TIME | _NORM),
    r"encoder\.(\d+)\.ada_ln_modulations\.modulation": r"model.layers.\1.modulation",
    r"output_layer\.adaLN_modulation\.modulation": "model.final_norm.modulation",
}
PAPER = {
    **(_TIME | _NORM),
    **{rule.replace("encoder", "blocks"): name for rule, name in LAYERS.items()},
    r"vocab_embed\.embedding": "model.embed_tokens",
    r"blocks\.(\d+)\.attn_out": r"model.layers.\1.self_attn.o_proj",
    r"blocks\.(\d+)\.adaLN_modulation": r"model.layers.\1.modulation",
    r"output_layer\.adaLN_modulation": "model.final_norm.modulation",
    r"output_layer\.linear": "lm_head",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "model_length": "max_position_embeddings",
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
        **_time_sizes(weights),
    }
    return options, renamed(weights, XLM_CORE)


def _time_sizes(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Sizes of the embedding of the time, read off the weights."""
    if "sigma_map.mlp.0.weight" not in weights:
        raise ValueError("The checkpoint has no sigma_map.mlp.0.weight, the embedding of the time.")
    conditioning_size, features = weights["sigma_map.mlp.0.weight"].shape
    return {"conditioning_size": conditioning_size, "timestep_frequencies": features // 2}


def from_paper(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """The same from a checkpoint of arXiv 2406.07524's authors, `arguments` being its config.json.

    Its mask is the last id of the vocabulary. Without `time_conditioning` the network is told sigma = 0 at all times.
    """
    for name in _SIZES:
        if name not in arguments:
            raise ValueError(f"The checkpoint's config has no {name!r}: {did_you_mean(name, arguments)}")
    options = {new: arguments[name] for name, new in _SIZES.items()}
    last = options["vocab_size"] - 1
    options |= {
        **_time_sizes(weights),
        "conditioning": "adaln",
        "time_conditioning": bool(arguments.get("time_conditioning", False)),
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "hidden_dropout_prob": arguments.get("dropout", 0.1),
        "lm_head_bias": "output_layer.linear.bias" in weights,
        "mask_token_id": last,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), last - 1),
    }
    return options, renamed(weights, PAPER)

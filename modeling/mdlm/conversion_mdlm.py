"""From published checkpoints of masked diffusion models to ours.

Those of the XLM library, those of the paper, and large ones: on the layers of Llama (LLaDA, arXiv 2502.09992) and of
Qwen2 (Dream, arXiv 2508.15487).
"""

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
from xlm_hf.modules.messages import did_you_mean

XLM_CORE = {
    **(HEADS | LAYERS | TIME | FINAL_NORM),
    r"encoder\.(\d+)\.ada_ln_modulations\.modulation": r"model.layers.\1.modulation",
    r"output_layer\.adaLN_modulation\.modulation": "model.final_norm.modulation",
}
_LAYERS = "model.language_model.model."
LLADA = {
    r"transformer\.wte": "model.embed_tokens",
    r"transformer\.ff_out": "lm_head",
    r"transformer\.ln_f": f"{_LAYERS}norm",
    r"transformer\.blocks\.(\d+)\.attn_norm": rf"{_LAYERS}layers.\1.input_layernorm",
    r"transformer\.blocks\.(\d+)\.ff_norm": rf"{_LAYERS}layers.\1.post_attention_layernorm",
    r"transformer\.blocks\.(\d+)\.([qkv]_proj)": rf"{_LAYERS}layers.\1.self_attn.\2",
    r"transformer\.blocks\.(\d+)\.attn_out": rf"{_LAYERS}layers.\1.self_attn.o_proj",
    r"transformer\.blocks\.(\d+)\.ff_proj": rf"{_LAYERS}layers.\1.mlp.gate_proj",
    r"transformer\.blocks\.(\d+)\.up_proj": rf"{_LAYERS}layers.\1.mlp.up_proj",
    r"transformer\.blocks\.(\d+)\.ff_out": rf"{_LAYERS}layers.\1.mlp.down_proj",
}
DREAM = {r"embed_tokens": "model.embed_tokens", r"lm_head": "lm_head", r"(layers\..*|norm)": rf"{_LAYERS}\1"}
# Options of Llama's configuration by LLaDA's. What others must be for the layers to be those of Llama or Qwen2 follows.
_LLADA_SIZES = {
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_LLADA_LAYERS = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "llama",
    "clip_qkv": None,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "scale_logits": False,
}
_QWEN2_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta"),
)
_QWEN2_LAYERS = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False}
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


def from_llada(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """The same from a checkpoint of the class LLaDA, `arguments` being its config.json: the layers of Llama.

    Nothing stands between its prompts and the canvas.

    Raises:
        ValueError: for an argument that is missing, or makes other layers than those of Llama.
    """
    options = _options(arguments, "llama", _LLADA_SIZES, _LLADA_LAYERS)
    size = arguments.get("embedding_size") or arguments["vocab_size"]
    tied = bool(arguments.get("weight_tying", False))
    tensors = renamed(weights, LLADA)
    if tied:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return {**options, "vocab_size": size, "tie_word_embeddings": tied}, tensors


def from_dream(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """The same from a checkpoint of the class Dream: the layers of Qwen2, whose state at a token predicts the next."""
    options = _options(arguments, "qwen2", {name: name for name in _QWEN2_SIZES}, _QWEN2_LAYERS)
    return {**options, "vocab_size": arguments["vocab_size"], "shift_logits": True}, renamed(weights, DREAM)


def _options(
    arguments: Mapping[str, Any], model_type: str, sizes: Mapping[str, str], layers: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of `MDLMConfig` on the layers of `model_type`, whose `sizes` are arguments here by their names there.

    Raises:
        ValueError: for an argument that is missing, or is not what `layers` says.
    """
    for name, value in layers.items():
        if arguments.get(name, value) != value:
            found = f"{name} must be {value!r} for the layers of {model_type}, and is {arguments[name]!r}"
            raise ValueError(f"{found}: a checkpoint with other layers cannot be converted.")
    for name in (*sizes, "vocab_size", "mask_token_id", "pad_token_id"):
        if name not in arguments:
            raise ValueError(f"The checkpoint's config has no {name!r}: {did_you_mean(name, arguments)}")
    backbone = {new: arguments[name] for name, new in sizes.items()}
    backbone["rope_parameters"] = {"rope_type": "default", "rope_theta": backbone.pop("rope_theta")}
    return {
        "backbone_config": {"model_type": model_type, **backbone},
        "mask_token_id": arguments["mask_token_id"],
        "pad_token_id": arguments["pad_token_id"],
        "eos_token_id": arguments.get("eos_token_id"),
        "bos_token_id": None,
        "softmax_over_suppressed": True,
    }

"""What the families share of published checkpoints: names of tensors, arguments.

Those of the library xlm-core 0.3, and those of the diffusion transformer that several papers' authors build on (arXiv
2406.07524, 2503.09573).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.modules.messages import did_you_mean

Weights = dict[str, torch.Tensor]

# Name in the checkpoint -> name here. A rule is a pattern for the whole name up to `.weight` or `.bias`.
HEADS = {r"embed_tokens": "model.embed_tokens", r"output_layer\.linear": "lm_head"}
LAYERS = {
    r"encoder\.(\d+)\.norm1": r"model.layers.\1.input_layernorm",
    r"encoder\.(\d+)\.norm2": r"model.layers.\1.post_attention_layernorm",
    r"encoder\.(\d+)\.attn_qkv": r"model.layers.\1.self_attn.qkv_proj",
    r"encoder\.(\d+)\.o_proj": r"model.layers.\1.self_attn.o_proj",
    r"encoder\.(\d+)\.mlp\.0": r"model.layers.\1.mlp.up_proj",
    r"encoder\.(\d+)\.mlp\.2": r"model.layers.\1.mlp.down_proj",
}
ROTARY_TRANSFORMER = {**HEADS, **LAYERS, r"output_layer\.norm_final": "model.norm"}

# The embedding of the time and the adaptive layer norms of a diffusion transformer.
TIME = {r"sigma_map\.mlp\.0": "model.time_embedding.up_proj", r"sigma_map\.mlp\.2": "model.time_embedding.down_proj"}
FINAL_NORM = {r"output_layer\.norm_final": "model.final_norm.norm"}
DIFFUSION_TRANSFORMER = {
    **(TIME | FINAL_NORM),
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

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_pytorch_tanh"}
# Constructor arguments by what they become; None for those that change no result.
_ARGUMENTS = {
    "num_embeddings": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "nhead": "num_attention_heads",
    "dim_feedforward": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
    "max_length": "max_position_embeddings",
    "padding_idx": "pad_token_id",
    "mask_idx": "mask_token_id",
    **dict.fromkeys(("dropout", "activation", "rotary_emb_dim", "final_layer_without_normalization")),
    **dict.fromkeys(("force_flash_attn", "use_flex_attn", "special_final_layer")),
}
_REFUSED = {"input_constraint": "conditions on token types", "keep_type_embeddings": "embeds token types"}


def renamed(weights: Mapping[str, torch.Tensor], rules: Mapping[str, str]) -> Weights:
    """The tensors under their names here, without the buffers, which are computed.

    Raises:
        ValueError: for a tensor that no rule knows.
    """
    result = {}
    for name, tensor in weights.items():
        if re.search(r"(inv_freq|freqs|(^|\.)(sin|cos)\w*)$", name):
            continue
        stem, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            stem, kind = name, "weight"
        new = next((re.sub(rule, to, stem) for rule, to in rules.items() if re.fullmatch(rule, stem)), None)
        if new is None:
            raise ValueError(f"The checkpoint holds a tensor {name!r} that no such model of this family has.")
        result[f"{new}.{kind}"] = tensor
    return result


def model_options(arguments: Mapping[str, Any], weights: Mapping[str, torch.Tensor], **own: str) -> dict[str, Any]:
    """Options of a configuration here from the constructor arguments of a published model.

    Args:
        arguments: of the constructor, by name; names that begin with an underscore are passed over.
        weights: the tensors under their published names; whether there is a norm before the head is read off them.
        **own: further arguments that the family knows, by the name of the option that they become; "" for those that
            it reads itself.

    Raises:
        ValueError: for an argument that is missing, unknown, or asks for what does not exist here.
    """
    known: dict[str, Any] = {**_ARGUMENTS, **own}
    given = {name: value for name, value in arguments.items() if not name.startswith("_") and value is not None}
    for name in given:
        if given[name] and name in _REFUSED:
            raise ValueError(f"The checkpoint {_REFUSED[name]} ({name}), and no family here supports that.")
        if name not in known and name not in _REFUSED:
            raise ValueError(f"A published model has no argument {name!r}: {did_you_mean(name, known)}")
    for name in ("num_embeddings", "d_model", "num_layers", "nhead"):
        if name not in given:
            raise ValueError(f"The constructor argument {name!r} is missing from the checkpoint's config: add it.")
    activation = given.get("activation", "relu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)} and is {activation!r}.")
    head_dim = given["d_model"] // given["nhead"]
    has_final_norm = not {"output_layer.norm_final.weight", "transformer.ln_f.weight"}.isdisjoint(weights)
    if given.get("final_layer_without_normalization", not has_final_norm) == has_final_norm:
        has = f"{'a' if has_final_norm else 'no'} norm before its head: one of them belongs to another model"
        raise ValueError(f"final_layer_without_normalization is {has_final_norm}, and the checkpoint has {has}.")
    dropout = given.get("dropout", 0.1)
    frequencies = weights.get("encoder.0.rotary_emb.inv_freq", torch.empty(32))
    return {
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        **{known[name]: value for name, value in given.items() if known.get(name)},
        "hidden_act": _ACTIVATIONS[activation],
        "partial_rotary_factor": given.get("rotary_emb_dim", 2 * len(frequencies)) / head_dim,
        "attention_dropout": dropout,
        "hidden_dropout_prob": dropout,
        "final_layer_norm": has_final_norm,
        # The published softmax runs over the ids that are never written too.
        "softmax_over_suppressed": True,
    }


def time_sizes(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Sizes of the embedding of the time, read off the weights.

    Raises:
        ValueError: if there is none.
    """
    if "sigma_map.mlp.0.weight" not in weights:
        raise ValueError("The checkpoint has no sigma_map.mlp.0.weight, the embedding of the time.")
    conditioning_size, features = weights["sigma_map.mlp.0.weight"].shape
    return {"conditioning_size": conditioning_size, "timestep_frequencies": features // 2}


def diffusion_transformer_options(
    arguments: Mapping[str, Any], weights: Mapping[str, torch.Tensor], **own: str
) -> dict[str, Any]:
    """Options of a configuration here from the config.json of such a checkpoint, whose mask is the last id.

    Args:
        arguments: of that config.
        weights: the tensors under their published names.
        **own: further arguments that the family needs, by the name of the option that they become.

    Raises:
        ValueError: for an argument that is missing, naming the closest one that is there.
    """
    known = {**_SIZES, **own}
    for name in known:
        if name not in arguments:
            raise ValueError(f"The checkpoint's config has no {name!r}: {did_you_mean(name, arguments)}")
    options: dict[str, Any] = {new: arguments[name] for name, new in known.items()}
    last = options["vocab_size"] - 1
    return {
        **options,
        **time_sizes(weights),
        "conditioning": "adaln",
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "hidden_dropout_prob": arguments.get("dropout", 0.1),
        "lm_head_bias": "output_layer.linear.bias" in weights,
        "mask_token_id": last,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), last - 1),
    }

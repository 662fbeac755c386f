"""What the families share of checkpoints of the published library (xlm-core 0.3): names of tensors, arguments."""

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
        raise ValueError(
            f"final_layer_without_normalization is {has_final_norm}, and the checkpoint has "
            f"{'a' if has_final_norm else 'no'} norm before its head: one of them belongs to another model."
        )
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

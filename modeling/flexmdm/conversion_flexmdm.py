"""From published checkpoints of flexible masked diffusion to ours: those of the XLM library and the authors' own."""

from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.hub.published_weights import HEADS, LAYERS, Weights, model_options, renamed
from xlm_hf.modules.messages import did_you_mean

_TIME = {r"sigma_map\.mlp\.0": "model.time_embedding.up_proj", r"sigma_map\.mlp\.2": "model.time_embedding.down_proj"}
XLM_CORE = {
    **(HEADS | _TIME),
    **{rule.replace("norm1", r"norm1\.norm").replace("norm2", r"norm2\.norm"): name for rule, name in LAYERS.items()},
    r"encoder\.(\d+)\.ada_ln_modulations\.modulation": r"model.layers.\1.modulation",
    r"output_layer\.norm_final\.norm": "token_norm.norm",
    r"output_layer\.adaLN_modulation\.modulation": "token_norm.modulation",
    r"len_pred\.(norm_final|norm)\.norm": "gap_head.norm.norm",
    r"len_pred\.adaLN_modulation\.modulation": "gap_head.norm.modulation",
    r"len_pred\.proj1": "gap_head.up_proj",
    r"len_pred\.(proj2|linear)": "gap_head.classifier",
}
AUTHORS = {
    **_TIME,
    **{rule.replace("encoder", "blocks"): name for rule, name in LAYERS.items()},
    r"vocab_embed\.embedding": "model.embed_tokens",
    r"blocks\.(\d+)\.attn_out": r"model.layers.\1.self_attn.o_proj",
    r"blocks\.(\d+)\.adaLN_modulation": r"model.layers.\1.modulation",
    r"output_layer\.norm_final": "token_norm.norm",
    r"output_layer\.adaLN_modulation": "token_norm.modulation",
    r"output_layer\.linear": "lm_head",
    r"len_pred\.(norm_final|norm)": "gap_head.norm.norm",
    r"len_pred\.(adaLN_modulation|adaLN)": "gap_head.norm.modulation",
    r"len_pred\.proj1": "gap_head.up_proj",
    r"len_pred\.(proj2|linear)": "gap_head.classifier",
}
# Published schedules rise with a time of their own, which is one minus ours.
_SCHEDULES: dict[str, Any] = {
    "linear": "linear",
    "cosine": "cosine",
    "sin": {"name": "cosine", "mirrored": True},
    "polynomial": {"name": "polynomial", "mirrored": True},
}


def published_schedule(schedule: Mapping[str, Any]) -> Any:
    """A published schedule, such as `{"type": "polynomial", "exp": 2}`, as `make_schedule` takes it.

    Raises:
        ValueError: for one that does not exist here.
    """
    name = schedule.get("type", schedule.get("sname"))
    if name not in _SCHEDULES:
        raise ValueError(f"A published schedule {name!r} does not exist here: {did_you_mean(str(name), _SCHEDULES)}")
    if name == "polynomial":
        return {**_SCHEDULES[name], "power": schedule["exp"]}
    return _SCHEDULES[name]


def _head_options(weights: Mapping[str, torch.Tensor], max_length: int) -> dict[str, Any]:
    """What the tensors tell of the embedding of the time and of the head of the gaps."""
    conditioning_size, features = weights["sigma_map.mlp.0.weight"].shape
    classes = weights.get("len_pred.linear.weight")
    return {
        "conditioning": "adaln",
        "conditioning_size": conditioning_size,
        "timestep_frequencies": features // 2,
        "gap_head": "count" if classes is None else "distribution",
        "max_count": max_length if classes is None else len(classes) - 1,
    }


def from_xlm_core(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Options of `FlexMDMConfig` and tensors of the model; see `xlm_hf.convert_checkpoint`.

    The heads "expectation" and "distribution" convert, the latter of type "linear". The network counts to the left of a
    token, and reads `[EOS]` behind the text.
    """
    tensors = renamed(weights, XLM_CORE)
    own = ("d_cond", "frequency_embedding_size", "len_predict_type", "len_head_type", "inner_autocast")
    options = model_options(arguments, weights, **dict.fromkeys(own, ""))
    options |= _head_options(weights, options["max_position_embeddings"])
    options |= {"legacy_modulated_residual": True, "final_layer_norm": True, "end_token": "eos"}
    return options, tensors


def from_authors(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """The same from a checkpoint of arXiv 2509.01025's authors, `arguments` being its config.

    Its network reads a padding token behind the text, and no `[BOS]` before it, for which the padding stands here too.
    """
    for name in ("model", "interpolant"):
        if name not in arguments:
            raise ValueError(f"The checkpoint's config has no {name!r}: {did_you_mean(name, arguments)}")
    tensors = renamed(weights, AUTHORS)
    model, interpolant = arguments["model"], arguments["interpolant"]
    pad_token_id = interpolant["pad_token"]
    options = {
        **_head_options(weights, interpolant["max_length"]),
        "vocab_size": len(weights["vocab_embed.embedding"]),
        "hidden_size": model["hidden_size"],
        "num_hidden_layers": model["n_blocks"],
        "num_attention_heads": model["n_heads"],
        "max_position_embeddings": interpolant["max_length"] + 1,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_dropout_prob": model.get("dropout", 0.1),
        "lm_head_bias": "output_layer.linear.bias" in weights,
        "insertion_schedule": published_schedule(interpolant["insert_schedule"]),
        "unmasking_schedule": published_schedule(interpolant["unmask_schedule"]),
        "softmax_over_suppressed": True,
        "mask_token_id": interpolant["mask_token"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), pad_token_id),
        "end_token": "pad",
    }
    return options, tensors

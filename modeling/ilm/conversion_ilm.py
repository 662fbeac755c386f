"""From the published library's checkpoints of insertion models to ours."""

from collections.abc import Mapping
from typing import Any

import torch

from xlm_hf.hub.published_weights import ROTARY_TRANSFORMER, Weights, model_options, renamed

STOPPING_HEAD = {
    r"length_output_layer\.norm_final": "stop_head.norm",
    r"length_output_layer\.mlp\.0": "stop_head.up_proj",
    r"length_output_layer\.mlp\.2": "stop_head.down_proj",
    r"length_output_layer\.linear": "stop_head.classifier",
}
GPT2 = {
    r"transformer\.wte": "model.embed_tokens",
    r"transformer\.wpe": "model.embed_positions",
    r"transformer\.h\.(\d+)\.ln_1": r"model.layers.\1.input_layernorm",
    r"transformer\.h\.(\d+)\.attn\.c_attn": r"model.layers.\1.self_attn.qkv_proj",
    r"transformer\.h\.(\d+)\.attn\.c_proj": r"model.layers.\1.self_attn.o_proj",
    r"transformer\.h\.(\d+)\.ln_2": r"model.layers.\1.post_attention_layernorm",
    r"transformer\.h\.(\d+)\.mlp\.c_fc": r"model.layers.\1.mlp.up_proj",
    r"transformer\.h\.(\d+)\.mlp\.c_proj": r"model.layers.\1.mlp.down_proj",
    r"transformer\.ln_f": "model.norm",
    r"lm_head": "lm_head",
}


def from_xlm_core(weights: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Options of `ILMConfig` and tensors of `ILMForInsertionLM`; see `xlm_hf.convert_checkpoint`.

    The variants with the rotary and with the GPT-2-style backbone convert, with the stopping head, with a head that
    classifies the number of missing tokens, and with none.
    """
    is_gpt2 = "transformer.wte.weight" in weights
    options = model_options(arguments, weights, num_classes="")
    classifier = weights.get("length_output_layer.linear.weight", ())
    options["num_missing_classes"] = len(classifier)
    options.pop("mask_token_id", None)
    result = renamed(weights, STOPPING_HEAD | (GPT2 if is_gpt2 else ROTARY_TRANSFORMER))
    if is_gpt2:
        options |= {"learned_positions": True, "partial_rotary_factor": 0.0, "layer_norm_eps": 1e-5}
        options["hidden_act"] = arguments.get("activation", "gelu")
        # Its norms and feed-forward blocks have no biases; ours are zero.
        for name in [name for name in result if "norm.weight" in name or ("_proj.weight" in name and "mlp" in name)]:
            result.setdefault(name.replace("weight", "bias"), torch.zeros(len(result[name])))
    return options, result

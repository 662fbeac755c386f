"""The published models, slowly: their forward passes from their tensors by name, without any of our code."""

import math

import torch
from torch.nn.functional import gelu, layer_norm, linear, relu, silu


def random_weights(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.2)
        + (1.0 if "norm" in name and name.endswith("weight") and len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }


def rotary_shapes(V, d, layers, ff, final_norm=True, classes=None, rotary=None):
    shapes = {"embed_tokens.weight": (V, d)}
    for i in range(layers):
        e = f"encoder.{i}."
        shapes |= {f"{e}norm{n}.{kind}": (d,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {e + "attn_qkv.weight": (3 * d, d), e + "o_proj.weight": (d, d)}
        shapes |= {e + "mlp.0.weight": (ff, d), e + "mlp.0.bias": (ff,)}
        shapes |= {e + "mlp.2.weight": (d, ff), e + "mlp.2.bias": (d,)}
        if rotary is not None:
            shapes[e + "rotary_emb.inv_freq"] = (rotary // 2,)
    shapes["output_layer.linear.weight"] = (V, d)
    if final_norm:
        shapes |= {"output_layer.norm_final.weight": (d,), "output_layer.norm_final.bias": (d,)}
    return shapes | classifier_shapes(d, classes)


def classifier_shapes(d, classes):
    if classes is None:
        return {}
    head = "length_output_layer."
    return {
        **{f"{head}norm_final.{kind}": (d,) for kind in ("weight", "bias")},
        **{head + "mlp.0.weight": (2 * d, d), head + "mlp.0.bias": (2 * d,)},
        **{head + "mlp.2.weight": (d, 2 * d), head + "mlp.2.bias": (d,), head + "linear.weight": (classes, d)},
    }


def gpt2_shapes(V, d, layers, ff, positions, classes=2, final_norm=True):
    shapes = {"transformer.wte.weight": (V, d), "transformer.wpe.weight": (positions, d)}
    for i in range(layers):
        h = f"transformer.h.{i}."
        shapes |= {h + "ln_1.weight": (d,), h + "ln_2.weight": (d,)}
        shapes |= {h + "attn.c_attn.weight": (3 * d, d), h + "attn.c_proj.weight": (d, d)}
        shapes |= {h + "mlp.c_fc.weight": (ff, d), h + "mlp.c_proj.weight": (d, ff)}
    if final_norm:
        shapes["transformer.ln_f.weight"] = (d,)
    return {**shapes, "lm_head.weight": (V, d), **classifier_shapes(d, classes)}


def dit_shapes(V, d, layers, ff, conditioning, paper=False, features=256):
    """With `paper`, the layout of the checkpoints of the paper of masked diffusion; else that of the library."""
    block = "blocks" if paper else "encoder"
    modulation = "adaLN_modulation" if paper else "ada_ln_modulations.modulation"
    final = "output_layer.adaLN_modulation" + ("" if paper else ".modulation")
    shapes = {"vocab_embed.embedding" if paper else "embed_tokens.weight": (V, d)}
    for n, inputs in ((0, features), (2, conditioning)):
        shapes |= {f"sigma_map.mlp.{n}.weight": (conditioning, inputs), f"sigma_map.mlp.{n}.bias": (conditioning,)}
    for i in range(layers):
        b = f"{block}.{i}."
        shapes |= {b + "norm1.weight": (d,), b + "norm2.weight": (d,), b + "attn_qkv.weight": (3 * d, d)}
        shapes[b + ("attn_out.weight" if paper else "o_proj.weight")] = (d, d)
        shapes |= {b + "mlp.0.weight": (ff, d), b + "mlp.0.bias": (ff,), b + "mlp.2.weight": (d, ff)}
        shapes |= {b + "mlp.2.bias": (d,), f"{b}{modulation}.weight": (6 * d, conditioning)}
        shapes[f"{b}{modulation}.bias"] = (6 * d,)
    shapes |= {"output_layer.norm_final.weight": (d,), "output_layer.linear.weight": (V, d)}
    if paper:
        shapes |= {"output_layer.linear.bias": (V,), "rotary_emb.inv_freq": (4,)}
    return {**shapes, f"{final}.weight": (2 * d, conditioning), f"{final}.bias": (2 * d,)}


def attention(x, qkv, heads, mask, positions, rotary):
    """Head by head; `mask` (B, L, L) is True where a token sees another."""
    d = x.shape[-1]
    size = d // heads
    outputs = []
    for head in range(heads):
        q, k, v = (linear(x, qkv[n * d + head * size : n * d + (head + 1) * size]) for n in range(3))
        if rotary:
            q, k = rotate(q, positions, rotary), rotate(k, positions, rotary)
        scores = (q @ k.transpose(1, 2) / math.sqrt(size)).masked_fill(~mask, -1e30)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, dim=-1)


def rotate(x, positions, rotary):
    """Turn the pairs (i, i + rotary / 2) of the first `rotary` dimensions by position x 10000^(-2 i / rotary)."""
    result = x.clone()
    for i in range(rotary // 2):
        angle = positions * 10000.0 ** (-2 * i / rotary)
        a, b = x[..., i], x[..., i + rotary // 2]
        result[..., i] = a * angle.cos() - b * angle.sin()
        result[..., i + rotary // 2] = b * angle.cos() + a * angle.sin()
    return result


def norm(x, w, name, eps=1e-5):
    return layer_norm(x, x.shape[-1:], w[name + ".weight"], w.get(name + ".bias"), eps)


def classify(w, x, cls):
    """Logits of the classifier at place `cls` (B,) of each row."""
    x = x[torch.arange(len(x)), cls]
    h = "length_output_layer."
    z = torch.tanh(linear(norm(x, w, h + "norm_final"), w[h + "mlp.0.weight"], w[h + "mlp.0.bias"]))
    return linear(x + linear(z, w[h + "mlp.2.weight"], w[h + "mlp.2.bias"]), w[h + "linear.weight"])


def rotary_forward(w, ids, mask, positions, heads, rotary, causal=False, act=relu, eps=1e-5):
    """Vocabulary logits and the hidden states before the head's norm."""
    L = ids.shape[1]
    sees = mask[:, None, :].expand(-1, L, -1)
    sees = sees & torch.ones(L, L).tril().bool() if causal else sees
    x = w["embed_tokens.weight"][ids]
    for i in range(sum(name.endswith("attn_qkv.weight") for name in w)):
        e = f"encoder.{i}."
        y = attention(norm(x, w, e + "norm1", eps), w[e + "attn_qkv.weight"], heads, sees, positions, rotary)
        x = x + linear(y, w[e + "o_proj.weight"])
        y = act(linear(norm(x, w, e + "norm2", eps), w[e + "mlp.0.weight"], w[e + "mlp.0.bias"]))
        x = x + linear(y, w[e + "mlp.2.weight"], w[e + "mlp.2.bias"])
    final = "output_layer.norm_final"
    y = norm(x, w, final, eps) if final + ".weight" in w else x
    return linear(y, w["output_layer.linear.weight"]), x


def gpt2_forward(w, ids, mask, positions, heads, act=gelu):
    """As `rotary_forward`; the hidden states are those after the last norm, if there is one."""
    sees = mask[:, None, :].expand(-1, ids.shape[1], -1)
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][positions]
    for i in range(sum(name.endswith("c_attn.weight") for name in w)):
        h = f"transformer.h.{i}."
        y = attention(norm(x, w, h + "ln_1"), w[h + "attn.c_attn.weight"], heads, sees, positions, 0)
        x = x + linear(y, w[h + "attn.c_proj.weight"])
        y = act(linear(norm(x, w, h + "ln_2"), w[h + "mlp.c_fc.weight"]))
        x = x + linear(y, w[h + "mlp.c_proj.weight"])
    if "transformer.ln_f.weight" in w:
        x = norm(x, w, "transformer.ln_f")
    return linear(x, w["lm_head.weight"]), x


def dit_forward(w, ids, mask, positions, sigma, heads, rotary, paper=False, act=relu):
    """Vocabulary logits given the total noise `sigma` (B,)."""
    block = "blocks" if paper else "encoder"
    names = ("adaLN_modulation", "attn_out") if paper else ("ada_ln_modulations.modulation", "o_proj")
    n = w["sigma_map.mlp.0.weight"].shape[1] // 2
    angles = sigma[:, None] * torch.tensor([10000.0 ** (-i / n) for i in range(n)])
    c = torch.cat((angles.cos(), angles.sin()), dim=-1)
    c = silu(linear(c, w["sigma_map.mlp.0.weight"], w["sigma_map.mlp.0.bias"]))
    c = silu(linear(c, w["sigma_map.mlp.2.weight"], w["sigma_map.mlp.2.bias"]))
    sees = mask[:, None, :].expand(-1, ids.shape[1], -1)
    x = w["vocab_embed.embedding" if paper else "embed_tokens.weight"][ids]
    for i in range(sum(name.endswith("attn_qkv.weight") for name in w)):
        b = f"{block}.{i}."
        parts = linear(c, w[f"{b}{names[0]}.weight"], w[f"{b}{names[0]}.bias"])[:, None].chunk(6, dim=-1)
        modulated = norm(x, w, b + "norm1") * (1 + parts[1]) + parts[0]
        y = attention(modulated, w[b + "attn_qkv.weight"], heads, sees, positions, rotary)
        x = (x if paper else modulated) + parts[2] * linear(y, w[f"{b}{names[1]}.weight"])
        modulated = norm(x, w, b + "norm2") * (1 + parts[4]) + parts[3]
        y = act(linear(modulated, w[b + "mlp.0.weight"], w[b + "mlp.0.bias"]))
        x = x + parts[5] * linear(y, w[b + "mlp.2.weight"], w[b + "mlp.2.bias"])
    final = "output_layer.adaLN_modulation" + ("" if paper else ".modulation")
    shift, scale = linear(c, w[final + ".weight"], w[final + ".bias"])[:, None].chunk(2, dim=-1)
    x = norm(x, w, "output_layer.norm_final") * (1 + scale) + shift
    return linear(x, w["output_layer.linear.weight"], w.get("output_layer.linear.bias"))

"""The published block diffusion: recorded results of its authors' code are met."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import xlm_hf
from tests.modeling.naive_bd3lm import make_model
from xlm_hf.modeling.bd3lm import BD3LMLoss

RECORDED = Path(__file__).parents[1] / "fixtures" / "published" / "bd3lm"
# The same, as the authors' published config.json has it.
PUBLISHED = {"vocab_size": 30, "hidden_dim": 64, "n_blocks": 2, "n_heads": 4, "model_length": 16, "block_size": 4}


def recorded():
    tensors = load_file(RECORDED.with_suffix(".safetensors"))
    weights = {key.removeprefix("param."): tensor for key, tensor in tensors.items() if key.startswith("param.")}
    return tensors, weights, json.loads(RECORDED.with_suffix(".json").read_text())


@pytest.mark.parametrize("is_published", [False, True])
def test_recorded_results_are_met(is_published):
    tensors, weights, config = recorded()
    if is_published:
        weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
        weights |= {"sampling_eps_min": torch.zeros(1), "sampling_eps_max": torch.ones(1)}
        config = PUBLISHED | {"time_conditioning": False, "dropout": 0.1, "cond_dim": 64}
    model = xlm_hf.convert_checkpoint(family="bd3lm", source="bd3lm", state_dict=weights, config=config)
    assert model.config.block_length == 4
    noisy, clean = tensors["in.xt"], tensors["in.x0"]
    positions = torch.arange(16).expand(3, -1)
    copies = {
        "input_ids": torch.cat((noisy, clean), 1),
        "position_ids": torch.cat((positions, positions), 1),
        "block_ids": torch.cat((positions, positions), 1) // 4,
        "is_noisy": (torch.arange(32) < 16).expand(3, -1),
    }
    logits = model(**copies).logits
    # The mask, the last id, has probability 0.
    torch.testing.assert_close(logits[:, :16, :29], tensors["out.logits"][..., :29], rtol=1e-5, atol=1e-5)
    assert (logits[..., 29] == -torch.inf).all()
    # A canvas by blocks, without a clean copy, as in sampling.
    of_sampling = model(noisy[:, :8], block_ids=copies["block_ids"][:, :8]).logits
    torch.testing.assert_close(of_sampling[..., :29], tensors["out.logits_sample_mode"][..., :29], rtol=1e-5, atol=1e-5)
    # The loss, by a weight of 1 / t for each block; the recorded one averages over the tokens of its mask.
    masked = (noisy == 29) & tensors["in.attention_mask"].bool()
    row, position = masked.nonzero(as_tuple=True)
    items = {
        "logits_index": row * 32 + position,
        "target_ids": clean[masked],
        "target_blocks": row * 4 + position // 4,
        "block_documents": torch.arange(3).repeat_interleave(4),
        "weights": -tensors["out.loss_scale"][:, ::4].flatten(),
        "canvas_lengths": tensors["in.attention_mask"].sum(-1).long(),
        "sequence_tokens": tensors["in.attention_mask"].sum(-1).long(),
    }
    output = BD3LMLoss()(model, copies | items)
    torch.testing.assert_close(output.loss_sum / output.num_items, tensors["out.loss"], rtol=1e-5, atol=1e-5)
    assert 29 not in model.generate(torch.tensor([[1, 28], [2, 28]]), seed=1, max_new_tokens=6).sequences


def test_what_is_not_here_is_refused():
    _, weights, config = recorded()
    convert = xlm_hf.convert_checkpoint
    with pytest.raises(ValueError, match="time_conditioning"):
        convert(family="bd3lm", source="bd3lm", state_dict=weights, config=config | {"time_conditioning": True})
    with pytest.raises(ValueError, match="has no 'block_size'"):
        convert(
            family="bd3lm", source="bd3lm", state_dict=weights, config={k: config[k] for k in ("model", "vocab_size")}
        )
    with pytest.raises(ValueError, match="block_length must be at least 1 and is 0"):
        make_model(0)

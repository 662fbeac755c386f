"""Published checkpoints of flexible masked diffusion against their forward passes, written slowly."""

import pytest
import torch
from torch.nn.functional import gelu, linear, relu, softplus

import xlm_hf
from tests.published_models import dit_forward, dit_shapes, random_weights
from xlm_hf.modeling.flexmdm.conversion_flexmdm import published_schedule
from xlm_hf.modules.noise_schedules import make_schedule

V, D, HEADS, LENGTH = 30, 16, 2, 20


def published(kind, head):
    """Tensors by their published names, constructor arguments, and what `dit_forward` is told of them."""
    paper = kind == "flexmdm"
    weights = random_weights(dit_shapes(V, D, 2, 64, 6, paper=paper), seed=4)
    modulation = ("adaLN" if head == "expectation" else "adaLN_modulation") if paper else "adaLN_modulation.modulation"
    outputs = (("proj1", D), ("proj2", 1)) if head == "expectation" else (("linear", LENGTH),)
    shapes = {f"{modulation}.weight": (2 * D, 6), f"{modulation}.bias": (2 * D,)}
    shapes |= {"norm.weight" if head == "expectation" else "norm_final.weight": (D,)}
    for name, size in outputs:
        shapes |= {f"{name}.weight": (size, D), f"{name}.bias": (size,)}
    weights |= {f"len_pred.{name}": x for name, x in random_weights(shapes, seed=5).items()}
    model = {"hidden_size": D, "cond_dim": 6, "n_blocks": 2, "n_heads": HEADS}
    schedules = {"insert_schedule": {"type": "linear"}, "unmask_schedule": {"type": "sin"}}
    config = {"model": model, "interpolant": {"mask_token": 28, "pad_token": 29, "max_length": LENGTH, **schedules}}
    if not paper:
        config = {"num_embeddings": V, "d_model": D, "num_layers": 2, "nhead": HEADS, "rotary_emb_dim": 4}
        config |= {
            "mask_idx": 2,
            "d_cond": 6,
            "max_length": LENGTH,
            "len_predict_type": head,
            "len_head_type": "linear",
        }
    return weights, config, {"rotary": 8 if paper else 4, "paper": paper, "act": tanh_gelu if paper else relu}


def tanh_gelu(x):
    return gelu(x, approximate="tanh")


@pytest.mark.parametrize("kind", ["xlm-core", "flexmdm"])
@pytest.mark.parametrize("head", ["expectation", "distribution"])
def test_both_kinds_of_checkpoints_convert(kind, head):
    weights, config, told = published(kind, head)
    # In the library's layout the names of norms end in `.norm`.
    as_saved = {
        name[: -len("weight")] + "norm" if kind == "xlm-core" and "norm" in name.split(".")[-2] else name: x
        for name, x in weights.items()
    }
    model = xlm_hf.convert_checkpoint(family="flexmdm", source=kind, state_dict=as_saved, config=config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 28, (3, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 7, [1] * 6 + [0] * 3]).bool()
    positions, t = (mask.long().cumsum(-1) - 1).clamp(min=0), torch.tensor([0.1, 0.5, 0.95])
    output = model(ids, attention_mask=mask, times=1 - t)
    arguments = (ids, mask, positions, t, HEADS, told.pop("rotary"))
    expected = dit_forward(weights, *arguments, **told)
    torch.testing.assert_close(output.logits[mask], expected[mask], rtol=1e-4, atol=1e-4)
    # The hidden states that the head of the gaps reads: a vocabulary head that copies them, with its norm.
    final = "output_layer.adaLN_modulation" + ("" if told["paper"] else ".modulation")
    own = {name.removeprefix("len_pred."): x for name, x in weights.items() if name.startswith("len_pred.")}
    copied = {**weights, "output_layer.linear.weight": torch.eye(D), "output_layer.linear.bias": torch.zeros(D)}
    copied["output_layer.norm_final.weight"] = next(x for name, x in own.items() if "norm" in name)
    for part in ("weight", "bias"):
        copied[f"{final}.{part}"] = next(x for name, x in own.items() if "adaLN" in name and name.endswith(part))
    hidden = dit_forward(copied, *arguments, **told)
    if head == "expectation":
        hidden = gelu(linear(hidden, own["proj1.weight"], own["proj1.bias"]))
        counts = LENGTH * softplus(linear(hidden, own["proj2.weight"], own["proj2.bias"]))[..., 0]
    else:
        logits = linear(hidden, own["linear.weight"], own["linear.bias"])
        torch.testing.assert_close(output.count_logits[mask], logits[mask], rtol=1e-4, atol=1e-4)
        counts = (logits.softmax(-1) * torch.arange(LENGTH)).sum(-1)
    torch.testing.assert_close(output.expected_counts[mask], counts[mask], rtol=1e-4, atol=1e-4)
    # It reads its end token in generation, counts to the left, and writes within its capacity.
    written = model.generate(
        torch.tensor([[8, 9, model.config.bos_token_id]]), seed=1, max_new_tokens=6, do_sample=True
    )
    assert written.sequences.shape[1] <= 9
    assert model.config.mask_token_id not in written.sequences


def test_the_end_token_stands_behind_each_row_and_the_gaps_are_to_its_left():
    weights, config, _ = published("flexmdm", "expectation")
    model = xlm_hf.convert_checkpoint(family="flexmdm", source="flexmdm", state_dict=weights, config=config)
    seen = []

    def note(module, arguments, inputs):
        ids, gaps = inputs["input_ids"], inputs["gap_index"]
        seen.append([int(ids.flatten()[i]) for i in gaps])
        lengths = inputs["attention_mask"].sum(dim=-1)
        assert all(int(row[mask.bool()][-1]) == 29 for row, mask in zip(ids, inputs["attention_mask"], strict=True))
        # All gaps of a row, or none where it is full.
        per_row = torch.bincount(gaps // ids.shape[1], minlength=len(ids))
        assert ((per_row == lengths - 3) | (per_row == 0)).all()

    model.register_forward_pre_hook(note, with_kwargs=True)
    prompts = torch.tensor([[8, 9, 29], [7, 8, 29]])
    model.generate(prompts, torch.ones_like(prompts), seed=1, max_new_tokens=6, num_steps=3)
    # At first the only gap is the one left of the end token.
    assert seen[0] == [29, 29]


def test_published_schedules_run_the_other_way():
    s = torch.tensor([0.01, 0.2, 0.5, 0.9], dtype=torch.float64)
    quarter = torch.pi / 2
    cases = {"linear": s, "sin": torch.sin(quarter * s), "cosine": 1 - torch.cos(quarter * s), "polynomial": s**2}
    for name, expected in cases.items():
        schedule = make_schedule(published_schedule({"type": name, "exp": 2.0}))
        torch.testing.assert_close(schedule.alpha(1 - s), expected)
        torch.testing.assert_close(1 - schedule.inverse(expected), s)
    with pytest.raises(ValueError, match="A published schedule 'polynomal' does not exist here: did you mean"):
        published_schedule({"type": "polynomal"})

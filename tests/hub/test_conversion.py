"""Published checkpoints: recorded results are met, what varies in them is converted or refused, nothing is run."""

import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, gelu, relu
from transformers import AutoModel, AutoTokenizer

import xlm_hf
from tests.published_models import (
    classify,
    dit_forward,
    dit_shapes,
    gpt2_forward,
    gpt2_shapes,
    random_weights,
    rotary_forward,
    rotary_shapes,
)
from xlm_hf.cli import main
from xlm_hf.commands.convert import main as convert
from xlm_hf.hub.conversion import read_checkpoint
from xlm_hf.modeling.arlm import ARLMLoss
from xlm_hf.modeling.ilm import ILMLoss
from xlm_hf.modeling.mdlm import MDLMLoss
from xlm_hf.modeling.mlm import MLMLoss

RECORDED = Path(__file__).parents[1] / "fixtures" / "published"
tanh_gelu = partial(gelu, approximate="tanh")
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def recorded(name):
    tensors = load_file(RECORDED / f"{name}.safetensors")
    weights = {key.removeprefix("param."): tensor for key, tensor in tensors.items() if key.startswith("param.")}
    return tensors, weights, json.loads((RECORDED / f"{name}.json").read_text())


def batch(V, seed=0):
    """Ids, mask and positions of three rows with padding on both sides."""
    ids = torch.randint(7, V, (3, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 7, [1] * 6 + [0] * 3]).bool()
    return ids, mask, (mask.long().cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", ["arlm", "mlm", "ilm_seq2seq"])
def test_recorded_results_are_met_by_us_and_by_the_slow_reference(name):
    tensors, weights, config = recorded(name)
    model = xlm_hf.convert_checkpoint(family=name.split("_")[0], state_dict=weights, config=config)
    ids, mask, positions = (tensors[f"in.{key}"] for key in ("input_ids", "attention_mask", "positions"))
    reference, hidden = rotary_forward(weights, ids, mask, positions, 4, 16, causal=name == "arlm")
    close(reference[mask], tensors["out.logits"][mask])
    output = model(ids, attention_mask=mask)
    close(output.logits[mask], tensors["out.logits"][mask])
    if "out.length_logits" in tensors:
        close(output.stop_logits, tensors["out.length_logits"])
        close(classify(weights, hidden, tensors["in.cls_position"]), tensors["out.length_logits"])


@pytest.mark.parametrize(("name", "loss"), [("mlm", MLMLoss()), ("arlm", ARLMLoss())])
def test_recorded_losses_are_met(name, loss):
    tensors, weights, config = recorded(name)
    model = xlm_hf.convert_checkpoint(family=name, state_dict=weights, config=config)
    targets = tensors["in.target_ids"]
    counts = (targets != -100) & ((tensors["in.input_ids"] == 2) | (name == "arlm"))
    chosen = counts.flatten().nonzero().squeeze(-1)
    index = "logits_index"
    inputs = {"input_ids": tensors["in.input_ids"], "attention_mask": tensors["in.attention_mask"]}
    documents, lengths = chosen // targets.shape[1], counts.sum(-1)
    inputs |= {"target_documents": documents, "target_lengths": lengths, index: chosen}
    output = loss(model, {**inputs, "target_ids": targets.flatten()[chosen]})
    close(output.loss_sum / output.num_items, tensors["out.loss"])


def test_the_recorded_stopping_loss_is_met():
    tensors, weights, config = recorded("ilm_seq2seq")
    model = xlm_hf.convert_checkpoint(family="ilm", state_dict=weights, config=config)
    # The published softmax takes the prompt's rows too; where nothing was dropped there is the stopping loss alone.
    row = int((tensors["in.n_drops"].sum(-1) == 0).nonzero())
    ids, mask = tensors["in.input_ids"][row, None], tensors["in.attention_mask"][row, None]
    empty = torch.zeros(0, dtype=torch.int64)
    slots = mask[0].nonzero().squeeze(-1)[1:]
    output = ILMLoss()(
        model,
        {
            **{"input_ids": ids, "attention_mask": mask, "slot_index": slots},
            **{"cls_index": tensors["in.cls_position"][row, None], "num_dropped": torch.zeros(1, dtype=torch.int64)},
            **{"slot_documents": torch.zeros_like(slots), "target_slots": empty, "target_ids": empty},
            **{"ends": torch.tensor([True]), "weights": torch.ones(1), "sequence_tokens": mask.sum(-1)},
        },
    )
    close(output.loss_sum, tensors["out.batch_loss"][row])


# Constructor arguments beside the sizes, the shapes that they make, and what the slow reference is told.
ROTARY = {
    "plain": ({}, {}, {}),
    "partial_rotary": ({"rotary_emb_dim": 6, "dim_feedforward": 40}, {"ff": 40}, {"rotary": 6}),
    "no_final_norm": ({"final_layer_without_normalization": True}, {"final_norm": False}, {}),
    "gelu": ({"activation": "gelu", "dropout": 0.0, "force_flash_attn": False}, {}, {"act": tanh_gelu}),
    "eps": ({"layer_norm_eps": 1e-2}, {}, {"eps": 1e-2}),
    "flex": ({"use_flex_attn": True, "padding_idx": 3, "mask_idx": 5}, {}, {}),
}


@pytest.mark.parametrize("case", ROTARY)
@pytest.mark.parametrize("family", ["arlm", "mlm"])
def test_what_varies_in_rotary_models_is_converted(family, case):
    arguments, shape, told = ROTARY[case]
    V, d, heads = 31, 24, 2
    weights = random_weights(rotary_shapes(**{"V": V, "d": d, "layers": 3, "ff": 96, **shape}), seed=1)
    config = {"num_embeddings": V, "d_model": d, "num_layers": 3, "nhead": heads, "rotary_emb_dim": 12} | arguments
    model = xlm_hf.convert_checkpoint(family=family, state_dict=weights, config=config)
    ids, mask, positions = batch(V)
    told = {"rotary": 12, **told}
    expected, _ = rotary_forward(weights, ids, mask, positions, heads, causal=family == "arlm", **told)
    close(model(ids, attention_mask=mask).logits[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert model.config.pad_token_id == config.get("padding_idx", 0)


@pytest.mark.parametrize("classes", [None, 2, 5])
@pytest.mark.parametrize("kind", ["rotary", "gpt2", "gpt2_no_norm"])
def test_the_variants_of_insertion_models_are_converted(kind, classes):
    V, d, heads = 29, 20, 2
    ids, mask, positions = batch(V)
    config = {"num_embeddings": V, "d_model": d, "num_layers": 2, "nhead": heads, "dim_feedforward": 50}
    if kind == "rotary":
        weights = random_weights(rotary_shapes(V, d, 2, 50, final_norm=False, classes=classes, rotary=8), seed=2)
        expected, hidden = rotary_forward(weights, ids, mask, positions, heads, 8)
    else:
        weights = random_weights(gpt2_shapes(V, d, 2, 50, 40, classes, final_norm=kind == "gpt2"), seed=2)
        expected, hidden = gpt2_forward(weights, ids, mask, positions, heads)
        config |= {"max_length": 40, "final_layer_without_normalization": kind != "gpt2"}
    model = xlm_hf.convert_checkpoint(family="ilm", state_dict=weights, config=config)
    output = model(ids, attention_mask=mask)
    close(output.logits[mask], expected[mask], rtol=1e-4, atol=1e-4)
    if classes is None:
        assert output.stop_logits is None
    else:
        close(output.stop_logits, classify(weights, hidden, mask.int().argmax(-1)), rtol=1e-4, atol=1e-4)
    written = model.generate(seed=0, max_new_tokens=4, stopping_threshold=None if classes else 0.5)
    assert written.sequences.shape == (1, 6)


@pytest.mark.parametrize(("features", "conditioning", "activation"), [(256, 12, "relu"), (32, 8, "gelu")])
def test_masked_diffusion_is_converted(features, conditioning, activation):
    V, d, heads = 23, 16, 2
    weights = random_weights(dit_shapes(V, d, 2, 64, conditioning, features=features), seed=3)
    config = {"num_embeddings": V, "d_model": d, "num_layers": 2, "nhead": heads, "rotary_emb_dim": 4}
    config |= {"mask_idx": 2, "d_cond": conditioning, "activation": activation}
    model = xlm_hf.convert_checkpoint(family="mdlm", state_dict=weights, config=config)
    ids, mask, positions = batch(V)
    t = torch.tensor([0.05, 0.5, 1.0])
    sigma = -torch.log1p(-(1 - torch.exp(torch.tensor(-10.0))) * t)
    act = relu if activation == "relu" else tanh_gelu
    expected = dit_forward(weights, ids, mask, positions, sigma, heads, 4, act=act)
    close(model(ids, attention_mask=mask, sigma=sigma).logits[mask], expected[mask], rtol=1e-4, atol=1e-4)
    close(model(ids, attention_mask=mask, alpha=1 - t).logits[mask], expected[mask], rtol=1e-3, atol=1e-3)
    # The published loss divides by the number of masked tokens; ours, of which the rest agrees, by that of all.
    chosen, rows = torch.tensor([1, 12, 20]), torch.tensor([0, 1, 2])
    targets = ids.flatten()[chosen]
    items = {"logits_index": chosen, "target_ids": targets, "target_documents": rows, "canvas_lengths": mask.sum(-1)}
    items |= {"sequence_tokens": mask.sum(-1), "given_length": torch.zeros(3, dtype=torch.bool)}
    inputs = {"input_ids": ids, "attention_mask": mask, "alpha": 1 - t, "weights": 1 / t}
    published = (cross_entropy(expected.flatten(0, 1)[chosen], targets, reduction="none") / t).mean()
    close(MDLMLoss()(model, inputs | items).loss_sum / 3, published, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_told_the_time", [False, True])
def test_the_papers_masked_diffusion_is_converted(is_told_the_time):
    V, d, heads = 30, 16, 2
    weights = random_weights(dit_shapes(V, d, 2, 64, 6, paper=True), seed=4)
    config = {"vocab_size": V, "hidden_dim": d, "n_blocks": 2, "n_heads": heads, "model_length": 32, "cond_dim": 6}
    config |= {"time_conditioning": is_told_the_time, "dropout": 0.1, "model_type": "mdlm", "architectures": ["MDLM"]}
    state_dict = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    model = xlm_hf.convert_checkpoint(family="mdlm", source="mdlm", state_dict=state_dict, config=config)
    ids, mask, positions = batch(V)
    sigma = torch.tensor([0.1, 1.0, 3.0])
    seen = sigma if is_told_the_time else torch.zeros(3)
    expected = dit_forward(weights, ids, mask, positions, seen, heads, 8, paper=True, act=tanh_gelu)
    # The mask, the last id, has probability 0 in the paper's parameterisation.
    logits = model(ids, attention_mask=mask, sigma=sigma).logits
    close(logits[mask][:, :-1], expected[mask][:, :-1], rtol=1e-4, atol=1e-4)
    assert (logits[..., -1] == -torch.inf).all()
    assert V - 1 not in model.generate(seed=1, max_new_tokens=6).sequences
    rows = model.generate(torch.tensor([[7, V - 2], [8, V - 2]]), seed=[1, 2], max_new_tokens=6).sequences
    alone = model.generate(torch.tensor([[8, V - 2]]), seed=[2], max_new_tokens=6).sequences[0]
    assert alone.tolist() == rows[1, : len(alone)].tolist()


def small_model(final_norm=True):
    weights = random_weights(rotary_shapes(27, 16, 1, 64, final_norm, rotary=8), seed=5)
    config = {"num_embeddings": 27, "d_model": 16, "num_layers": 1, "nhead": 2, "mask_idx": 2, "rotary_emb_dim": 8}
    return weights, {**config, "max_length": 40}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_embeddings": 28},
            "does not fit its config: model.embed_tokens.weight is .27, 16. and should be .28, 16.",
        ),
        ({"num_layers": 2}, "model.layers.1.input_layernorm.weight is missing"),
        ({"d_modle": 16}, "no argument 'd_modle': did you mean 'd_model'"),
        ({"nhead": None}, "'nhead' is missing"),
        ({"activation": "silu"}, "activation must be one of relu, gelu and is 'silu'"),
        ({"input_constraint": True}, "conditions on token types"),
        ({"final_layer_without_normalization": True}, "one of them belongs to another model"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    weights, config = small_model()
    with pytest.raises(ValueError, match=message):
        xlm_hf.convert_checkpoint(family="mlm", state_dict=weights, config=config | change)


def test_what_is_not_known_is_refused():
    weights, config = small_model()
    convert_it = partial(xlm_hf.convert_checkpoint, state_dict=weights, config=config)
    with pytest.raises(ValueError, match="no family 'mlmm': did you mean 'mlm'"):
        convert_it(family="mlmm")
    with pytest.raises(ValueError, match="converts no 'xlm'"):
        convert_it(family="mlm", source="xlm")
    with pytest.raises(ValueError, match=r"sigma_map\.mlp"):
        convert_it(family="mdlm")
    with pytest.raises(ValueError, match=r"holds a tensor 'extra\.weight'"):
        convert_it(family="mlm", state_dict={**weights, "extra.weight": torch.zeros(2)})


class Hyperparameters:
    """Stands for a class of another project."""

    def __init__(self, value):
        self.value = value


class Dangerous:
    """Makes a file when it is unpickled, by a function of any module."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def lightning(file, weights, **others):
    """A Lightning checkpoint of a training module whose predictor holds the model again."""
    prefixed = {f"model.{name}": tensor for name, tensor in weights.items()}
    prefixed |= {f"predictor.model.{name}": tensor for name, tensor in weights.items()}
    averages = [2 * tensor for name, tensor in weights.items() if "inv_freq" not in name]
    ema = {"decay": 0.99, "num_updates": 3, "shadow_params": averages}
    torch.save({"state_dict": prefixed, "ema": ema, "epoch": 1, **others}, file)


def test_lightning_checkpoints_are_read_averaged_or_raw(tmp_path):
    weights, config = small_model()
    hyper_parameters = {"config": OmegaConf.create({"a": [1, {"b": 2}]}), "own": Hyperparameters(3), "path": tmp_path}
    lightning(tmp_path / "last.ckpt", weights, hyper_parameters=hyper_parameters)
    raw, nothing = read_checkpoint(str(tmp_path / "last.ckpt"), ema=False)
    averaged, _ = read_checkpoint(str(tmp_path / "last.ckpt"))
    assert nothing == {}
    assert raw.keys() == averaged.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(raw[name], tensor)
        assert torch.equal(averaged[name], tensor if "inv_freq" in name else 2 * tensor)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(str(tmp_path / "last.ckpt"))[1] == config


def test_nothing_that_a_checkpoint_names_is_run(tmp_path):
    weights, _ = small_model()
    made = tmp_path / "made"
    lightning(tmp_path / "bad.ckpt", weights, callbacks=Dangerous(shutil.copyfile, __file__, str(made)))
    raw, _ = read_checkpoint(str(tmp_path / "bad.ckpt"), ema=False)
    assert raw.keys() == weights.keys()
    for dangerous in (Dangerous(Path.touch, made), Dangerous(os.mkdir, str(made))):
        lightning(tmp_path / "worse.ckpt", weights, callbacks=dangerous)
        (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(dangerous))
        for name in ("worse.ckpt", "plain.ckpt"):
            with pytest.raises(ValueError, match="cannot be read without running what it holds"):
                read_checkpoint(str(tmp_path / name))
    assert not made.exists()


def test_averages_that_do_not_fit_are_refused(tmp_path):
    weights, _ = small_model()
    lightning(tmp_path / "last.ckpt", weights)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["ema"]["shadow_params"].reverse()
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="--raw"):
        read_checkpoint(str(tmp_path / "last.ckpt"))


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Consolidate the shards of a distributed run first"):
        read_checkpoint(str(tmp_path))


def test_the_command_writes_a_folder_that_loads_and_generates(tmp_path, monkeypatch, capsys):
    weights, config = small_model(final_norm=False)
    weights |= random_weights(rotary_shapes(27, 16, 1, 64, False, classes=2), seed=6)
    published = tmp_path / "published"
    published.mkdir()
    save_file(weights, published / "model.safetensors")
    (published / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    convert(["--from", "xlm-core", str(published), str(out)])
    model, tokenizer = AutoModel.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == "ILMForInsertionLM"
    assert len(tokenizer) == 27
    assert tokenizer.decode([7, 26, 0]) == " 0 19 [PAD]"
    ids, mask, positions = batch(27)
    expected, _ = rotary_forward(weights, ids, mask, positions, 2, 8)
    close(model(ids, attention_mask=mask).logits[mask], expected[mask], rtol=1e-4, atol=1e-4)
    written = model.generate(seed=0, max_new_tokens=20, stopping_threshold=None).sequences[0, 2:]
    assert (written >= 6).all()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "3 4 5"}\n')
    arguments = ["family=ilm", "task=star_easy", "job=generate", f"checkpoint={out}", "generation.max_new_tokens=4"]
    arguments += [f"prompts={tmp_path}/prompts.jsonl", f"output_dir={tmp_path}/run"]
    monkeypatch.setattr("sys.argv", ["xlm-hf", *arguments])
    main()
    assert "prediction" in capsys.readouterr().out


def test_the_command_asks_for_what_the_checkpoint_does_not_say(tmp_path):
    weights, config = small_model()
    lightning(tmp_path / "last.ckpt", weights)
    arguments = ["--from", "xlm-core", str(tmp_path / "last.ckpt"), str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--config"):
        convert(arguments)
    (tmp_path / "arguments.json").write_text(json.dumps(config | {"mask_idx": 4}))
    arguments += ["--config", str(tmp_path / "arguments.json")]
    with pytest.raises(ValueError, match="several families: add --family arlm or --family ilm or --family mlm"):
        convert(arguments)
    arguments += ["--family", "mlm", "--raw"]
    with pytest.raises(ValueError, match="does not hold its tokenizer of 27 tokens"):
        convert(arguments)
    with pytest.raises(ValueError, match=r"mask_token_id is 2 in the tokenizer .* and 4 in the"):
        convert([*arguments, "--tokenizer", "numbers"])
    with pytest.raises(ValueError, match="No family converts 'xlmcore': did you mean 'xlm-core'"):
        convert(["--from", "xlmcore", "a", "b"])
    assert not (tmp_path / "out").exists()

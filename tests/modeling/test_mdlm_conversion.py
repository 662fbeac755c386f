"""LLaDA and Dream: recorded logits and decodes are met, shards are read one by one, adapters can be trained."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, LogitsProcessorList, PreTrainedTokenizerFast, TopKLogitsWarper

import xlm_hf
from xlm_hf.building import build_model
from xlm_hf.commands.convert import main as convert

FOLDER = Path(__file__).parents[1] / "fixtures" / "published"
MASK = 99
close = {"rtol": 1e-5, "atol": 1e-5}


@cache
def recorded(name):
    tensors = load_file(FOLDER / f"{name}.safetensors")
    weights = {key.removeprefix("param."): tensor for key, tensor in tensors.items() if key.startswith("param.")}
    return tensors, weights, json.loads((FOLDER / f"{name}.json").read_text())


@cache
def converted(name):
    _, weights, config = recorded(name)
    return xlm_hf.convert_checkpoint(family="mdlm", source=name, state_dict=weights, config=config)


def check_decode(output, history):
    """The tokens are those at the end of a recorded history (steps, B, L), each written in the step that it says.

    A history holds the canvas after each step, and may begin with the one before the first.
    """
    assert torch.equal(output.sequences, history[-1])
    written = output.history >= 0
    assert (written.sum(dim=-1) == 16).all()
    steps = (history == MASK).sum(dim=0) - (len(history) - int(output.nfe.max()))
    assert torch.equal(output.history[written], steps[written])


def test_recorded_logits_of_llada_are_met():
    tensors, _, _ = recorded("llada")
    mask = tensors["in.attention_mask"]
    logits = converted("llada")(tensors["in.input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(logits[mask], tensors["out.logits_rows_alone"][mask], **close)


@pytest.mark.parametrize(
    ("name", "options"),
    [("steps16", {"num_steps": 16}), ("steps8", {"num_steps": 8}), ("threshold", {"confidence_threshold": 0.075})],
)
def test_recorded_decodes_of_llada_are_met(name, options):
    tensors, _, _ = recorded("llada")
    options = {"sampler": "confidence", "block_length": 8, "suppress_tokens": [], **options}
    output = converted("llada").generate(tensors["in.prompt"], max_new_tokens=16, return_history=True, **options)
    check_decode(output, tensors[f"out.generate_{name}_history"][:, None])


def test_recorded_logits_of_dream_are_met():
    tensors, _, _ = recorded("dream")
    logits = converted("dream")(tensors["in.input_ids"]).logits
    torch.testing.assert_close(logits, tensors["out.logits_full_shifted"], **close)


@pytest.mark.parametrize(
    ("name", "order", "steps"),
    [
        ("entropy_steps16", "entropy", 16),
        ("entropy_steps8", "entropy", 8),
        ("entropy_left_padded", "entropy", 16),
        ("maskgit_plus_steps16", "confidence", 16),
        ("maskgit_plus_steps8", "confidence", 8),
    ],
)
def test_recorded_decodes_of_dream_are_met(name, order, steps):
    tensors, _, _ = recorded("dream")
    is_padded = "padded" in name
    output = converted("dream").generate(
        tensors["in.prompt_left_padded" if is_padded else "in.prompt"],
        attention_mask=tensors["in.prompt_left_padded_mask"] if is_padded else None,
        max_new_tokens=16,
        sampler="confidence",
        order=order,
        num_steps=steps,
        # Its times run from 1 to 0.001, and the public code keeps the 50 most probable tokens.
        mask_schedule={"name": "clipped", "low": 1e-3},
        logits_processor=LogitsProcessorList([TopKLogitsWarper(50)]),
        suppress_tokens=[],
        return_history=True,
    )
    check_decode(output, tensors[f"out.{name}_history"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llada", {"alibi": True}, "alibi must be False for the layers of llama, and is True: a checkpoint"),
        ("llada", {"clip_qkv": 8.0}, "clip_qkv must be None"),
        ("dream", {"rope_scaling": {"type": "yarn"}}, "rope_scaling must be None for the layers of qwen2"),
        ("llada", {"n_layers": None}, "has no 'n_layers'"),
        ("dream", {"mask_token_id": None}, "has no 'mask_token_id'"),
    ],
)
def test_what_makes_other_layers_is_refused(name, change, message):
    _, weights, config = recorded(name)
    config = {key: value for key, value in {**config, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        xlm_hf.convert_checkpoint(family="mdlm", source=name, state_dict=weights, config=config)


def test_a_tied_head_is_the_embedding():
    _, weights, config = recorded("llada")
    weights = {name: tensor for name, tensor in weights.items() if name != "model.transformer.ff_out.weight"}
    config = {**config, "weight_tying": True}
    model = xlm_hf.convert_checkpoint(family="mdlm", source="llada", state_dict=weights, config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weights["model.transformer.wte.weight"])


def tokenizer(size):
    words = {f"w{number}": number for number in range(size - 3)}
    words |= {"<s>": size - 3, "</s>": size - 2, "<mask>": size - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def write_shards(folder, weights, config, num):
    """A sharded checkpoint, as published large ones are."""
    folder.mkdir()
    names, index = sorted(weights), {}
    for number in range(num):
        file = f"model-{number + 1:05d}-of-{num:05d}.safetensors"
        save_file({name: weights[name] for name in names[number::num]}, folder / file)
        index |= dict.fromkeys(names[number::num], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_the_command_converts_shards_with_more_rows_than_tokens(tmp_path, name):
    _, weights, config = recorded(name)
    # Five rows behind the vocabulary, as in the published models, and 16-bit weights.
    size = MASK + 6
    weights = {
        key: torch.cat((tensor, tensor[:5])) if len(tensor) == MASK + 1 else tensor for key, tensor in weights.items()
    }
    weights = {key: tensor.bfloat16() for key, tensor in weights.items()}
    config = {**config, "vocab_size": size, **({"embedding_size": size} if name == "llada" else {})}
    write_shards(tmp_path / name, weights, config, 3)
    tokenizer(MASK + 1).save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    convert(["--from", name, str(tmp_path / name), str(out), "--tokenizer", str(tmp_path / "tokenizer")])
    model = AutoModel.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).mask_token_id == MASK
    # What has no token is gone.
    assert len(model.lm_head.weight) == model.config.vocab_size == MASK + 1
    assert model.config.suppressed_ids == [MASK - 2, MASK]
    prompt = torch.tensor([[5, 6, 7]])
    written = model.generate(prompt, max_new_tokens=8, do_sample=True, temperature=100.0, seed=1).sequences
    assert torch.equal(written[:, :3], prompt)
    assert (written < MASK).all()
    assert converted(name).config.bos_token_id is model.config.bos_token_id is None
    tokenizer(size + 1).save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="vocab_size is 106 in the tokenizer"):
        convert(["--from", name, str(tmp_path / name), str(out), "--tokenizer", str(tmp_path / "larger")])


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_converted_model_is_a_backbone_for_adapters(tmp_path, name):
    _, weights, config = recorded(name)
    write_shards(tmp_path / name, weights, config, 1)
    tokenizer(MASK + 1).save_pretrained(tmp_path / "tokenizer")
    out = str(tmp_path / "out")
    convert(["--from", name, str(tmp_path / name), out, "--tokenizer", str(tmp_path / "tokenizer")])
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    node = {"_target_": "xlm_hf.modeling.mdlm.MDLMConfig", "backbone": out, "lora": lora}
    model = build_model(OmegaConf.create(node), AutoTokenizer.from_pretrained(out))
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in key for key in trained)
    assert model.config.shift_logits is (name == "dream")
    ids = recorded(name)[0]["in.input_ids"]
    torch.testing.assert_close(model.eval()(ids).logits[..., :97], converted(name)(ids).logits[..., :97], **close)


@pytest.mark.slow
def test_conversion_holds_one_copy_of_the_weights(tmp_path):
    d, layers, width = 512, 24, 1408
    _, _, config = recorded("llada")
    config = {**config, "d_model": d, "n_layers": layers, "mlp_hidden_size": width, "n_heads": 8, "n_kv_heads": 8}
    weights = {}
    for key, tensor in recorded("llada")[1].items():
        shape = [{64: d, 160: width}.get(size, size) for size in tensor.shape]
        for layer in range(layers) if ".blocks.0." in key else [0] if ".blocks." not in key else []:
            weights[key.replace(".0.", f".{layer}.")] = torch.zeros(shape, dtype=torch.bfloat16)
    write_shards(tmp_path / "llada", weights, config, 4)
    tokenizer(MASK + 1).save_pretrained(tmp_path / "tokenizer")
    code = """
import sys, threading, time
import xlm_hf.modeling.mdlm, transformers.models.llama.modeling_llama
from xlm_hf.commands.convert import main
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
before, peak = held(), 0
thread = threading.Thread(target=main, args=(sys.argv[1:],))
thread.start()
while thread.is_alive():
    peak = max(peak, held())
    time.sleep(0.002)
print((peak - before) * 1024)
"""
    arguments = ["--from", "llada", str(tmp_path / "llada"), str(tmp_path / "out"), "--tokenizer"]
    command = [sys.executable, "-c", code, *arguments, str(tmp_path / "tokenizer")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    size = sum(tensor.nbytes for tensor in weights.values())
    assert int(printed[-1]) < 1.4 * size

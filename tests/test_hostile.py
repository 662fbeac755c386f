"""Folders and files from elsewhere that would run code, read or write what they must not, or never end: none does."""

import json
import os
import pickle
import shutil
import socket
import struct
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from xlm_hf.building import compose, plain
from xlm_hf.cli import _one_sentence, main, saved_config
from xlm_hf.commands import evaluate, generate, push_to_hub
from xlm_hf.families import families
from xlm_hf.hub.card import render_card
from xlm_hf.modules.backbone_config import token_options
from xlm_hf.reports.decode_page import history_html
from xlm_hf.reports.streamers import Decode, Token
from xlm_hf.tasks.tokenizers import number_tokenizer

MARKER = "was-run"
SECRET = "hf_thesecretofthisaccount"
TINY = ["--config-name", "ilm_star", "size=tiny", *(f"task.num_{name}=4" for name in ("train", "validation", "test"))]
CODE = f"open({MARKER!r}, 'w').close()\n"


class Hostile:
    def __reduce__(self):
        return exec, (CODE,)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run's folder: its config, and a model of star graphs."""
    run = tmp_path_factory.mktemp("sound") / "run"
    tokenizer, family = number_tokenizer(20), families()["ilm"]
    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64}
    config = family.config_class(**options, **token_options(tokenizer))
    family.model_class(config).save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    # Of the code that is exported beside it.
    for file in (run / "model").glob("*.py"):
        file.unlink()
    return run


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it went to the network"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def composed():
    options = ["job=generate", "prompts=prompts.jsonl", "output_dir=out", "generation.max_new_tokens=2"]
    return compose("ilm_star", ["experiment=hostile", *TINY[2:], *options])


def command(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", *arguments])
    return ended(capfd, main)


def ended(capfd, job):
    """Exit status, and what was said."""
    status = 0
    try:
        with _one_sentence():
            job()
    except SystemExit as stopped:
        status = stopped.code
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    return status, said.out + said.err


def changed(**options):
    """A change of a JSON file of the model: `config`, `tokenizer_config` and so on."""

    def change(model):
        for name, values in options.items():
            file = model / f"{name}.json"
            found = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps({**found, **values}))
            (model / "evil.py").write_text(CODE)

    return change


def written(name, content, without=()):
    def change(model):
        for other in without:
            (model / other).unlink()
        content_of = content(model) if callable(content) else content
        (model / name).unlink(missing_ok=True)
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content_of)

    return change


def header(fields, tail=b""):
    text = json.dumps(fields).encode() if isinstance(fields, dict) else fields
    return struct.pack("<Q", len(text)) + text + tail


def linked(name, target):
    def change(model):
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)

    return change


def piped(name):
    def change(model):
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return change


WEIGHTS = "model.safetensors"
PICKLE = pickle.dumps({"weight": Hostile()})
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
EVIL = {"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
DAMAGED = "truncated or damaged"
MODELS = {
    "a pickle alone": (written("pytorch_model.bin", PICKLE, without=[WEIGHTS]), "holds no weights"),
    "a pickle called safetensors": (written(WEIGHTS, PICKLE), DAMAGED),
    "a pickle among the states": (written("optimizer.pt", PICKLE), "damaged, or refused"),
    "a header of 2**62 bytes": (written(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), DAMAGED),
    "a header that is too long": (written(WEIGHTS, struct.pack("<Q", 2**20) + b" " * 99), DAMAGED),
    "a header that is deep": (written(WEIGHTS, header(DEEP)), DAMAGED),
    "offsets behind the end": (
        written(WEIGHTS, header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
        DAMAGED,
    ),
    "offsets that overlap": (
        written(WEIGHTS, header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"\0" * 4)),
        DAMAGED,
    ),
    "a shard elsewhere": (
        written(f"{WEIGHTS}.index.json", b'{"weight_map": {"a": "../../other.safetensors"}}'),
        "names a file elsewhere, ../../other.safetensors",
    ),
    "an index that is none": (written(f"{WEIGHTS}.index.json", b'["a"]'), DAMAGED),
    "an index of numbers": (written(f"{WEIGHTS}.index.json", b'{"weight_map": 5}'), DAMAGED),
    "a shard that is no name": (
        written(f"{WEIGHTS}.index.json", b'{"weight_map": {"a": 5}}'),
        "its shard 5 is missing",
    ),
    "weights that are a link to another file": (linked(WEIGHTS, "/etc/hostname"), DAMAGED),
    "weights that are a pipe": (piped(WEIGHTS), f"{WEIGHTS} is no file"),
    "weights that are a folder": (lambda m: ((m / WEIGHTS).unlink(), (m / WEIGHTS).mkdir()), f"{WEIGHTS} is no file"),
    "a config that is a pipe": (piped("config.json"), "config.json is no file"),
    "a config that is a ring of links": (linked("config.json", "config.json"), "it holds no config.json"),
    "a config that is deep": (written("config.json", DEEP), DAMAGED),
    "a config that is a list": (written("config.json", b"[]"), DAMAGED),
    "code of a model": (changed(config={"auto_map": EVIL, "model_type": "evil"}), "brings code of its own"),
    "code of another repository": (
        changed(config={"auto_map": {"AutoModel": "evil/repo--evil.Evil"}, "model_type": "evil"}),
        "",
    ),
    "an unknown type": (changed(config={"model_type": "../evil", "auto_map": {}}), ""),
    "code of a tokenizer": (
        changed(tokenizer_config={"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}),
        None,
    ),
    "a tokenizer that is a pickle": (written("tokenizer.json", PICKLE), DAMAGED),
    "a base model elsewhere": (
        written("adapter_config.json", b'{"base_model_name_or_path": "evil/repo", "peft_type": "LORA"}'),
        None,
    ),
    "quantised weights": (changed(config={"quantization_config": {"quant_method": "evil"}}), None),
    "pipelines of its own": (
        changed(config={"custom_pipelines": {"text-generation": {"impl": "evil.Evil", "pt": ["AutoModel"]}}}),
        None,
    ),
    "a generation of its own": (written("custom_generate/generate.py", CODE.encode()), None),
    "a pickle beside the weights": (written("pytorch_model.bin", PICKLE), None),
    "a template of chats": (
        written("chat_template.jinja", b"{% for i in range(10**9) %}{{ ''.__class__ }}{% endfor %}"),
        None,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_folders_of_models(name, composed, folder, capfd):
    change, words = MODELS[name]
    change(folder / "model")
    (folder.parent / "prompts.jsonl").write_text('{"prompt": "1 2"}\n')
    # The job without its command line, which takes longer than all of this.
    cfg = OmegaConf.merge(composed, {"checkpoint": f"{folder}/model"})
    status, said = ended(capfd, lambda: generate.run(cfg))
    assert not Path(MARKER).exists()
    assert SECRET not in said
    # Without words it may be loaded as if what is hostile were not there.
    assert words is None or status in (1, 2), said
    assert (words or "") in said
    if status:
        assert said.splitlines()[-1].startswith("Error: ")


# Of each kind of fault one, for the other jobs that read a folder.
REFUSED = (
    "a pickle alone",
    "a pickle among the states",
    "a shard elsewhere",
    "weights that are a pipe",
    "code of a model",
)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("job", [evaluate, push_to_hub], ids=["evaluate", "push"])
def test_folders_of_models_in_other_jobs(job, name, composed, folder, capfd):
    change, words = MODELS[name]
    change(folder / "model")
    cfg = OmegaConf.merge(composed, {"checkpoint": f"{folder}/model"})
    OmegaConf.update(cfg, "trainer.hub_model_id", "a/b", force_add=True)
    status, said = ended(capfd, lambda: job.run(cfg))
    assert not Path(MARKER).exists()
    assert SECRET not in said
    assert (status, words in said) == (2, True), said


CONFIGS = {
    "a task that is a command": ({"task": {"_target_": "os.system", "command": "true"}}, "names os.system, code"),
    "a command that the package imports": (
        {"task": {"_target_": "xlm_hf.commands.compare.subprocess.run", "args": ["touch", MARKER]}},
        "names xlm_hf.commands.compare.subprocess.run, code",
    ),
    "an upload": (
        {"task": {"_target_": "xlm_hf.hub.upload.push_folder", "folder": "/", "repo_id": "a/b"}},
        "names xlm_hf.hub.upload.push_folder, code",
    ),
    "a file that is written": (
        {"task": {"_target_": "xlm_hf.files.write_text", "file": MARKER, "text": ""}},
        "names xlm_hf.files.write_text, code",
    ),
    "a loss": ({"loss": {"_target_": "builtins.exec", "_args_": [CODE]}}, "names builtins.exec, code"),
    "a loss within another": (
        {"loss": {"stop_loss_weight": {"_target_": "builtins.exec", "_args_": [CODE]}}},
        "names builtins.exec, code",
    ),
    "a collator": ({"collator": {"_target_": "subprocess.Popen", "args": ["true"]}}, "names subprocess.Popen, code"),
    "a model": ({"model": {"_target_": "os.abort"}}, "names os.abort, code"),
    "a metric": ({"task": {"metrics": ["./evil"]}}, "names ./evil, code"),
    "a metric's file": ({"task": {"metrics": [{"name": "evil.py"}]}}, "names evil.py, code"),
    "a metric by interpolation": ({"evil": "./evil", "task": {"metrics": ["${evil}"]}}, "has interpolations"),
    "a metric that is a command": (
        {"task": {"metrics": [{"_target_": "xlm_hf.cli.os.abort"}]}},
        "names xlm_hf.cli.os.abort, code",
    ),
    "a function for data": ({"task": {"path": "os:abort"}}, "names os:abort, code"),
    "a function that the package imports": ({"task": {"path": "xlm_hf.cli:os.abort"}}, "xlm_hf.cli:os.abort, code"),
    "a function with a line's end": ({"task": {"path": "os:abort\n"}}, "os:abort"),
    "a function of a mixture": ({"task": {"mixture": [{"path": "os:abort"}]}}, "names os:abort, code"),
    "a metric in this folder": ({"task": {"metrics": ["exact_match", "evil"]}}, "names evil, code"),
    "a metric in a folder with a blank": ({"task": {"metrics": [{"name": "an evil/one"}]}}, "names an evil/one, code"),
    "a secret": ({"experiment": "${oc.env:HF_TOKEN}"}, "has interpolations"),
    "a file by interpolation": ({"experiment": "${oc.decode:'1'}"}, "has interpolations"),
    "a set of another folder": (
        {"task": {"evaluation": [{"name": "../../x", "collator": "seq2seq", "stages": ["test"], "split": "test"}]}},
        "must be a name that a file can have, without a path, and is '../../x'",
    ),
    "arguments of a loss that are calls": (
        {"loss": {"_args_": [{"_target_": "builtins.exec", "_args_": [CODE]}]}},
        "names builtins.exec, code",
    ),
    "an option of generation that is a call": (
        {"generation": {"max_new_tokens": {"_target_": "os.abort"}}},
        "names os.abort, code",
    ),
    "a task of another folder": ({"task": {"name": "../../x"}}, "without a path, and is '../../x'"),
}  # fmt: skip


def merged(config, changes):
    for name, value in changes.items():
        is_node = isinstance(value, dict) and "_target_" not in value
        config[name] = merged(config.get(name) or {}, value) if is_node else value
    return config


@pytest.fixture(scope="module")
def config():
    return plain(compose("ilm_star", TINY[2:]))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_runs(name, config, folder, monkeypatch, capfd):
    changes, words = CONFIGS[name]
    (folder / "config.yaml").write_text(yaml.safe_dump(merged(json.loads(json.dumps(config)), changes)))
    before = set(folder.parent.parent.rglob("*"))
    status, said = command(monkeypatch, capfd, "job=evaluate", f"checkpoint={folder}", "output_dir=out")
    assert not Path(MARKER).exists()
    assert SECRET not in said
    assert (status, words in said) == (2, True), said
    assert {path for path in folder.parent.parent.rglob("*") if "cache" not in str(path)} <= before


def test_a_run_from_elsewhere_is_pushed_nowhere(config, folder):
    changed = merged(json.loads(json.dumps(config)), {"trainer": {"push_to_hub": True, "hub_model_id": "evil/repo"}})
    (folder / "config.yaml").write_text(yaml.safe_dump(changed))
    assert "push_to_hub" not in saved_config(["job=evaluate", f"checkpoint={folder}"]).trainer


TEXTS = [
    (b"!!python/object/new:os.system [touch was-run]", "cannot be read"),
    (b"!!python/name:os.system", "cannot be read"),
    (b"task: !!python/module:os", "cannot be read"),
    (b"!!python/object/apply:os.system ['true']", "cannot be read"),
    (b"- a\n- b\n", "has interpolations, or no options"),
    (b"", "has interpolations, or no options"),
    (b"\x80\x81", "cannot be read"),
    (b"a: [1", "cannot be read"),
    (b"a: " + b"[" * 5000, "cannot be read"),
]


@pytest.mark.parametrize(("text", "words"), TEXTS)
def test_configs_that_are_none(text, words, folder, monkeypatch, capfd):
    (folder / "config.yaml").write_bytes(text)
    status, said = command(monkeypatch, capfd, "job=evaluate", f"checkpoint={folder}", "output_dir=out")
    assert (status, words in said) == (2, True), said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["a pickle called safetensors", "a shard elsewhere", "a config that is deep"])
def test_folders_that_are_converted(name, folder, monkeypatch, capfd):
    change, words = MODELS[name]
    change(folder / "model")
    arguments = ["convert", "--from", "xlm-core", f"{folder}/model", "out", "--tokenizer", "numbers"]
    status, said = command(monkeypatch, capfd, *arguments)
    assert not Path(MARKER).exists()
    assert (status, words in said) == (2, True), said


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_checkpoints_that_are_converted(suffix, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"model{suffix}").write_bytes(PICKLE)
    arguments = ["convert", "--from", "xlm-core", f"model{suffix}", "out", "--tokenizer", "numbers"]
    status, said = command(monkeypatch, capfd, *arguments)
    assert not Path(MARKER).exists()
    assert (status, "is not a Lightning checkpoint" in said or DAMAGED in said) == (2, True), said


SCRIPT = "</script></title></pre>```<script>alert(1)</script><img src=x onerror=alert(1)>\n---\nevil: true\n"


def test_a_page_of_tokens_that_are_markup_and_a_title_that_is():
    page = history_html([Decode([Token(SCRIPT, "prompt")], [[(0, Token(SCRIPT, "insert"))]])], SCRIPT, SCRIPT)
    assert page.count("</script>") == history_html([], " ", "").count("</script>")
    assert "<img" not in page
    assert "alert(1)</script>" not in page


def test_a_card_of_names_that_are_markup():
    variables = {"task": SCRIPT, "experiment": SCRIPT, "metrics": {"test/exact_match": 1.0}, "steps": 1}
    card = render_card(families()["ilm"], variables)
    fields = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert fields["model-index"][0]["results"][0]["dataset"]["name"] == SCRIPT
    assert "evil" not in fields

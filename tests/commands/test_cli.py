"""The command line as a person uses it: whole runs, kills, and mistakes."""

import contextlib
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import xlm_hf_cli
from tests.processes import forked, settle
from xlm_hf.cli import main, saved_config
from xlm_hf.commands._run import run_directory
from xlm_hf.overrides import open_override

SCRIPT = Path(__file__).parents[2] / "examples" / "run_xlm.py"
TINY = [
    "--config-name",
    "ilm_star",
    "size=tiny",
    "task.num_train=200",
    "task.num_validation=10",
    "task.num_test=30",
    "trainer.per_device_eval_batch_size=7",
]
TEXT = ["family=ilm", "task=text", "size=tiny", "task.path=corpus.txt"]


def command(*arguments):
    return forked(SCRIPT, *TINY, *arguments)


def run(*arguments, cwd, check=True, **kwargs):
    result = subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=300, **kwargs)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    result = run(f"output_dir={folder}/run", cwd=folder)
    return folder / "run", result


def test_train_ends_with_metrics_predictions_and_a_model(trained):
    output_dir, result = trained
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert metrics["test/samples"] == 30
    for name in ("test/loss", "test/exact_match", "test/token_accuracy", "test/star_path", "test/nfe", "parameters"):
        assert name in metrics
    predictions = records(output_dir / "predictions" / "test.jsonl")
    assert sorted(record["example_id"] for record in predictions) == list(range(30))
    exact = sum(record["prediction"] == record["reference"] for record in predictions) / 30
    assert metrics["test/exact_match"] == exact
    assert {"config.yaml", "train.log", "model", "metrics.json"} <= {file.name for file in output_dir.iterdir()}
    assert "validation/loss" in (output_dir / "train.log").read_text()
    assert f"{output_dir}/model" in result.stdout
    assert "Next: " in result.stdout
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr


def test_the_end_is_a_table_and_some_decodes_once(trained):
    printed = trained[1].stdout
    assert re.search(r"^test/exact_match  +[\d.]+( ± [\d.e-]+)?$", printed, re.MULTILINE)
    for name in ("test/exact_match  ", "test/loss  ", "Metrics and predictions: "):
        assert printed.count(name) == 1
    assert "test/samples" not in printed
    assert "test/exact_match" not in trained[1].stderr
    assert trained[1].stderr.count("  prediction  ") == 3
    assert "test/exact_match" in (trained[0] / "train.log").read_text()


def test_exported_model_is_the_trained_one(trained):
    output_dir, _ = trained
    last = sorted(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))[-1]
    exported, checkpoint = (load_file(folder / "model.safetensors") for folder in (output_dir / "model", last))
    assert exported.keys() == checkpoint.keys()
    assert all(torch.equal(exported[name], checkpoint[name]) for name in exported)
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "model")
    model = AutoModel.from_pretrained(output_dir / "model")
    prediction = records(output_dir / "predictions" / "test.jsonl")[0]
    output = model.generate(torch.tensor([prediction["prompt_ids"]]), seed=0)
    written = output.sequences[0, len(prediction["prompt_ids"]) + 2 :].tolist()
    assert tokenizer.decode([t for t in written if t != tokenizer.pad_token_id]).strip() == prediction["prediction"]


def test_evaluate_repeats_the_test_from_run_checkpoint_and_model(trained, tmp_path):
    output_dir, _ = trained
    expected = json.loads((output_dir / "metrics.json").read_text())
    for number, checkpoint in enumerate((output_dir, output_dir / "model")):
        run("job=evaluate", f"checkpoint={checkpoint}", f"output_dir=evaluated{number}", cwd=tmp_path)
        metrics = json.loads((tmp_path / f"evaluated{number}" / "metrics.json").read_text())
        for name in ("test/loss", "test/exact_match", "test/token_accuracy", "test/star_path", "test/nfe"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5)
        assert records(tmp_path / f"evaluated{number}" / "predictions" / "test.jsonl") == records(
            output_dir / "predictions" / "test.jsonl"
        )


def test_generate_prints_and_saves_the_order_of_insertion(trained, tmp_path):
    output_dir, _ = trained
    result = run("job=generate", f"checkpoint={output_dir}", "num_samples=3", "output_dir=out", cwd=tmp_path)
    decodes = records(tmp_path / "out" / "predictions" / "generate.jsonl")
    assert len(decodes) == 3
    test = {record["example_id"]: record for record in records(output_dir / "predictions" / "test.jsonl")}
    for decode in decodes:
        assert decode["prediction"] == test[decode["example_id"]]["prediction"]
        assert sorted(decode["steps"]) == list(range(len(decode["prediction_ids"])))
        assert decode["prediction"] in result.stdout
    assert "step 1 " in result.stdout
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": decodes[0]["prompt"]}) + "\n")
    run("job=generate", f"checkpoint={output_dir}", f"prompts={prompts}", "output_dir=own", cwd=tmp_path)
    assert records(tmp_path / "own" / "predictions" / "generate.jsonl")[0]["prediction"] == decodes[0]["prediction"]


def test_generate_shows_the_decode_live_in_a_terminal_and_leaves_a_page_and_a_film(trained, tmp_path):
    output_dir, _ = trained
    terminal, inside = pty.openpty()
    arguments = command("job=generate", f"checkpoint={output_dir}", "num_samples=2", "output_dir=out")
    process = subprocess.Popen(arguments, cwd=tmp_path, stdout=inside, stderr=subprocess.STDOUT)
    os.close(inside)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux reports that the other end is closed
        while part := os.read(terminal, 65536):
            shown += part
    assert process.wait() == 0
    decodes = records(tmp_path / "out" / "predictions" / "generate.jsonl")
    assert shown.count(b"\033[J") >= max(len(decode["prediction_ids"]) for decode in decodes) - 1
    page = (tmp_path / "out" / "decodes.html").read_text()
    rows = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["rows"]
    for decode, (start, steps) in zip(decodes, rows, strict=True):
        words = []
        for (position, word, event), *others in filter(None, steps):
            assert (event, others) == ("insert", [])
            words.insert(position - len(start), word)
        assert " ".join(words) == decode["prediction"]
    assert (tmp_path / "out" / "decode.gif").stat().st_size > 0


def test_prepare_data_shows_the_task(tmp_path):
    result = run("job=prepare_data", cwd=tmp_path)
    assert "train: 200 examples" in result.stdout
    assert not (tmp_path / "outputs").exists()


def test_a_killed_run_resumes_to_the_same_weights(trained, tmp_path):
    """SIGKILL after the first checkpoint; the same command again ends where the uninterrupted run did."""
    output_dir, _ = trained
    process = subprocess.Popen(
        command("output_dir=run"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    first = tmp_path / "run" / "checkpoint-10"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    settle()
    assert first.exists()
    assert not (tmp_path / "run" / "metrics.json").exists()
    result = run("output_dir=run", cwd=tmp_path)
    assert "resuming from checkpoint-" in result.stdout
    expected, resumed = (load_file(folder / "model" / "model.safetensors") for folder in (output_dir, tmp_path / "run"))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    first_metrics, second_metrics = (
        json.loads((folder / "metrics.json").read_text()) for folder in (output_dir, tmp_path / "run")
    )
    assert {k: v for k, v in first_metrics.items() if "seconds" not in k} == {
        k: v for k, v in second_metrics.items() if "seconds" not in k
    }


def test_a_finished_run_started_again_stays_as_it_is(trained):
    output_dir, _ = trained
    before = json.loads((output_dir / "metrics.json").read_text())
    run(f"output_dir={output_dir}", cwd=output_dir.parent)
    after = json.loads((output_dir / "metrics.json").read_text())
    assert after["steps"] == before["steps"] == 20
    assert after["test/loss"] == before["test/loss"]


def test_a_full_disk_stops_with_a_sentence_and_keeps_the_earlier_checkpoint(tmp_path):
    """The file size limit makes real writes fail in the middle, as a full disk does."""
    run("output_dir=run", "trainer.max_steps=10", cwd=tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "run" / "model").iterdir()}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = run("output_dir=run", "trainer.max_steps=20", cwd=tmp_path, check=False, preexec_fn=limit)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    sentence = result.stderr.strip().splitlines()[-1]
    assert "checkpoint-20 could not be written" in sentence
    assert "free disk space" in sentence
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-10"]
    assert {file: file.read_bytes() for file in (tmp_path / "run" / "model").iterdir()} == before
    resumed = run("output_dir=run", "trainer.max_steps=20", cwd=tmp_path)
    assert "resuming from checkpoint-10" in resumed.stdout


def mistake(capsys, monkeypatch, tmp_path, *arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config-name", "ilm_str"], "There is no config 'ilm_str': did you mean 'ilm_star'?"),
        (["task=star_easy"], "The config leaves 'family' open: add family=NAME, one of"),
        ([*TINY, "task=star_esy"], "There is no task 'star_esy': did you mean 'star_easy'?"),
        (["family=ilmm", "task=star_easy"], "There is no family 'ilmm': did you mean 'ilm'?"),
        ([*TINY, "sed=1"], "There is no option 'sed': did you mean 'seed'?"),
        ([*TINY, "job=trian"], "There is no job 'trian': did you mean 'train'?"),
        ([*TINY, "trainer.lerning_rate=1"], "trainer has no option 'lerning_rate': did you mean 'learning_rate'?"),
        ([*TINY, "trainer.learning_rate=fast"], "trainer: learning_rate must be a finite number and is 'fast'."),
        ([*TINY, "trainer.static_length=long"], "trainer: static_length must be an integer or None and is 'long'."),
        ([*TINY, "trainer.static_length=0"], "static_length must be at least 1 and is 0."),
        ([*TINY, "trainer.torch_compile=maybe"], "trainer: torch_compile must be true or false and is 'maybe'."),
        ([*TINY, "train_collator.drop_beta=x"], "collator: drop_beta must be a finite number and is 'x'."),
        ([*TINY, "model.hiden_size=8"], "model has no option 'hiden_size': did you mean 'hidden_size'?"),
        ([*TINY, "model.hidden_size=33"], "hidden_size (33) must be a multiple of num_attention_heads (2)"),
        ([*TINY, "model.hidden_size=wide"], "hidden_size must be an integer and is 'wide'."),
        ([*TINY, "loss.stop_los_weight=1"], "loss has no option 'stop_los_weight': did you mean 'stop_loss_weight'?"),
        ([*TINY, "generation.temprature=1"], "no option 'temprature': did you mean 'temperature'?"),
        ([*TINY, "generation.top_p=7"], "top_p must be in (0, 1] and is 7."),
        ([*TINY, "task.dgree=3"], "has no option 'dgree': did you mean 'degree'?"),
        ([*TINY, "task.num_train=0"], "num_train"),
        ([*TEXT, "task.protocol=packd"], "protocol must be one of sentence, packed and is 'packd'."),
        ([*TINY, "model.max_position_embeddings=20"], "the model has 20 positions"),
        ([*TINY, "checkpoint=nowhere"], "init_from=RUN begins a new one with the weights of another"),
        ([*TINY, "init_from=nowhere"], "There is no checkpoint at nowhere"),
        ([*TINY, "job=evaluate"], "job=evaluate needs a model: add checkpoint=DIR"),
        ([*TINY, "job=evaluate", "checkpoint=nowhere"], "There is no checkpoint at nowhere"),
        ([*TINY, "collator.kind=lm"], "collator has no option 'kind': choose from "),
        ([*TINY, "seed=abc"], "seed must be an integer and is 'abc'."),
        ([*TINY, "seed=[1"], "no viable alternative at input '[1'"),
    ],
)
def test_a_mistake_ends_in_one_sentence(arguments, sentence, capsys, monkeypatch, tmp_path):
    code = mistake(capsys, monkeypatch, tmp_path, *arguments)
    assert sentence in code
    assert code.startswith("Error: ")
    assert "\n" not in code


def test_runs_that_begin_within_a_second_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folders = [run_directory(OmegaConf.create({"output_dir": None, "experiment": "e"})) for _ in range(2)]
    assert sorted(folders) == sorted((tmp_path / "outputs" / "e").iterdir())


def test_a_mistaken_config_lays_no_claim_to_the_folder(capsys, monkeypatch, tmp_path):
    for wrong in ("model.hidden_size=33", "trainer.lerning_rate=1", "loss.stop_weight=1"):
        mistake(capsys, monkeypatch, tmp_path, *TINY, "output_dir=run", wrong)
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_mistaken_command_leaves_no_folder(capsys, monkeypatch, tmp_path):
    mistake(capsys, monkeypatch, tmp_path, *TINY, "model.hidden_size=33")
    mistake(capsys, monkeypatch, tmp_path, *TINY, "trainer.lerning_rate=1", "output_dir=runs/a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    mistake(capsys, monkeypatch, tmp_path, *TINY, "trainer.lerning_rate=1", "output_dir=mine")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_job_on_a_run_reads_its_config(trained, capsys, monkeypatch, tmp_path):
    output_dir, _ = trained
    code = mistake(capsys, monkeypatch, tmp_path, "job=evaluate", f"checkpoint={output_dir}", "num_sample=1")
    assert code == "Error: There is no option 'num_sample': did you mean 'num_samples'?"
    monkeypatch.setattr(sys, "argv", ["xlm-hf", "evaluate", str(output_dir), "output_dir=again"])
    xlm_hf_cli.main()
    again, metrics = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "again", output_dir))
    same = ("test/loss", "test/exact_match", "test/nfe", "parameters")
    assert {name: again[name] for name in same} == {name: metrics[name] for name in same}
    printed = capsys.readouterr().out
    assert re.search(r"^test/exact_match  +[\d.]+( ± [\d.]+)?$", printed, re.MULTILINE)
    for name in ("test/exact_match  ", "test/loss  ", "Metrics and predictions: "):
        assert printed.count(name) == 1
    assert "test/samples" not in printed
    newest = max(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    overrides = [f"checkpoint={newest}", "generation.max_new_tokens=1", "task.num_test=4", "job=generate"]
    cfg = saved_config([open_override(override) for override in overrides])
    assert (cfg.job, cfg.generation.max_new_tokens, cfg.task.num_test) == ("generate", 1, 4)
    assert (cfg.family, cfg.output_dir, cfg.experiment) == ("ilm", None, "ilm_star")
    for others in (["family=mlm"], ["task=star_hard"], ["--config-name", "ilm_star"]):
        assert saved_config([*overrides, *others]) is None
    # An argument that the YAML does not list is added as everywhere.
    added = saved_config([open_override(override) for override in [*overrides, "+collator.corrects=true"]])
    assert added is not None
    assert added.collator.corrects is True
    assert saved_config(["job=train", f"checkpoint={output_dir}"]) is None
    assert saved_config(["job=evaluate", "checkpoint=user/model"]) is None


@pytest.mark.parametrize(
    ("pattern", "code", "name"),
    [
        (r"_target_: xlm_hf\.tasks\.\S+", "_target_: os.system", "os.system"),
        (r"- exact_match", "- ./evil.py", "./evil.py"),
        (r"- exact_match", "- name: folder/evil", "folder/evil"),
        (r"  path: null", "  path: os:getcwd", "os:getcwd"),
    ],
)
def test_a_config_from_elsewhere_brings_no_code(trained, capsys, monkeypatch, tmp_path, pattern, code, name):
    saved = (trained[0] / "config.yaml").read_text()
    changed = re.sub(pattern, code, saved)
    assert changed != saved
    (tmp_path / "config.yaml").write_text(changed)
    sentence = mistake(capsys, monkeypatch, tmp_path, "job=evaluate", f"checkpoint={tmp_path}")
    assert f"config.yaml names {name}, code of no installed family: add --config-name" in sentence


def test_damaged_and_foreign_checkpoints_are_named(trained, capsys, monkeypatch, tmp_path):
    output_dir, _ = trained
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (output_dir / "model").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    code = mistake(capsys, monkeypatch, tmp_path, *TINY, "job=generate", f"checkpoint={damaged}")
    assert "model.safetensors is truncated or damaged" in code
    weights.unlink()
    code = mistake(capsys, monkeypatch, tmp_path, *TINY, "job=generate", f"checkpoint={damaged}")
    assert "it holds no weights" in code
    foreign = ["job=evaluate", f"checkpoint={output_dir}", "task=star_hard"]
    code = mistake(capsys, monkeypatch, tmp_path, *TINY, *foreign)
    assert "The model's vocab_size is 27 and the tokenizer's 63: name the task that the model was trained on" in code
    for job in ("job=evaluate", "job=generate", "job=push_to_hub"):
        other = ["family=mlm", "task=star_easy", "size=tiny", "trainer.hub_model_id=a/b"]
        code = mistake(capsys, monkeypatch, tmp_path, *other, job, f"checkpoint={output_dir}")
        assert code == f"Error: {output_dir}/model is of family 'ilm' and not 'mlm': add family=ilm."
    code = mistake(capsys, monkeypatch, tmp_path, *TINY, f"output_dir={output_dir}", "model.num_hidden_layers=1")
    assert "was run with model.num_hidden_layers=2 and not 1: choose another output_dir" in code
    bad = tmp_path / "prompts.jsonl"
    bad.write_text('{"promt": "1 2"}\n')
    code = mistake(capsys, monkeypatch, tmp_path, *TINY, "job=generate", f"checkpoint={output_dir}", f"prompts={bad}")
    assert "prompts.jsonl, line 1 has no `prompt`, `prompt_ids` or `input_ids`" in code
    bad.write_text(json.dumps({"prompt_ids": [9] * 2000}) + "\n")
    code = mistake(capsys, monkeypatch, tmp_path, *TINY, "job=generate", f"checkpoint={output_dir}", f"prompts={bad}")
    assert "A prompt has 2002 tokens with [CLS] and [BOS], and the model has 1024 positions" in code
    bad.write_text(json.dumps({"prompt_ids": [27]}) + "\n")
    code = mistake(capsys, monkeypatch, tmp_path, *TINY, "job=generate", f"checkpoint={output_dir}", f"prompts={bad}")
    assert "prompts.jsonl, line 1: prompt_ids must be in [0, 27) and is [27]." in code


def test_open_nodes_take_options_that_the_yaml_does_not_list():
    assert open_override("trainer.max_grad_norm=2") == "++trainer.max_grad_norm=2"
    assert open_override("model.layer_norm_eps=1e-6") == "++model.layer_norm_eps=1e-6"
    assert open_override("collators.lm.masking=bernoulli") == "++collator.masking=bernoulli", "the name of old"
    for other in ("seed=1", "++trainer.a=1", "task=star_easy", "~trainer.a", "hydra.run.dir=x"):
        assert open_override(other) == other


def test_the_script_sets_a_nonzero_exit_status(tmp_path):
    command = [sys.executable, SCRIPT, *TINY, "job=trian"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2
    assert "Warning" not in result.stderr
    assert result.stderr.strip().splitlines()[-1] == "Error: There is no job 'trian': did you mean 'train'?"
    assert "Traceback" not in result.stderr

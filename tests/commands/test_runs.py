"""One folder is one run's and one process's: what may change between two calls, and what an interrupted one leaves."""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets.fingerprint import Hasher
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests import commands
from tests.commands.test_cli import SCRIPT, TINY, records
from tests.processes import forked, settle
from tests.training.test_trainer import make_trainer
from xlm_hf import evaluation
from xlm_hf.building import compose
from xlm_hf.cli import main
from xlm_hf.commands import _run
from xlm_hf.commands._run import check_same_run, data_hash, next_command, run_directory
from xlm_hf.files import Journal
from xlm_hf.tasks import load_task
from xlm_hf.training.checkpoints import last_sound_checkpoint, list_checkpoints, saved_state
from xlm_hf.training.signals import ENDS_WITH_INPUT, end_with_parent
from xlm_hf.training.trainer import XLMTrainer

SHORT = [*TINY, "trainer.max_steps=4", "trainer.eval_steps=4", "trainer.save_steps=2", "task.num_test=12"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command in this process; its last sentence if it failed, else None."""

    def run(*arguments, folder):
        status, _, error = commands.call(monkeypatch, capsys, folder, *arguments)
        return status if isinstance(status, str) else error.strip().splitlines()[-1] if status else None

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["run_xlm.py", *SHORT, "output_dir=run", "trainer.hub_token=hf_SECRET"])
        main()
    return folder / "run"


@pytest.fixture(scope="module")
def composed():
    cfg = compose("ilm_star", [*TINY[2:], "experiment=e"])
    OmegaConf.set_struct(cfg, False)
    return cfg


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ("output_dir=b checkpoint=c num_threads=2 logger=[tensorboard] job=evaluate", None),
        ("task.cache_dir=/elsewhere", None),
        ("trainer.dataloader_num_workers=2 trainer.logging_steps=7 trainer.save_steps=3", None),
        ("trainer.per_device_eval_batch_size=3 trainer.hub_token=hf_a", None),
        ("task.num_test=7", "measured"),
        ("generation.temperature=0.5", "measured"),
        ("eval_model=judge", "measured"),
        ("trainer.learning_rate=0.1", "trained"),
        ("trainer.per_device_train_batch_size=3", "trained"),
        ("trainer.dataloader_drop_last=true", "trained"),
        ("trainer.lr_scheduler_type=linear trainer.warmup_steps=3", "trained"),
        ("trainer.ema_decay=0.9", "trained"),
        ("trainer.max_steps=21", "trained"),
        ("budget.tokens=1000", "trained"),
        ("early_stopping.patience=3", "trained"),
        ("debug.name=overfit", "trained"),
        ("trainer.optim=sgd", "another"),
        ("trainer.muon_learning_rate=0.1", "another"),
        ("trainer.data_seed=1", "another"),
        ("task.num_train=201", "another"),
        ("model.hidden_size=64", "another"),
        ("loss.stop_loss_weight=0.5", "another"),
        ("train_collator.drop_beta=3", "another"),
        ("seed=1", "another"),
    ],
)
def test_what_may_change_between_two_calls(changed, kind, composed, tmp_path):
    OmegaConf.save(composed, tmp_path / "config.yaml", resolve=True)
    cfg = OmegaConf.merge(composed, OmegaConf.from_dotlist(changed.split()))
    if kind == "another":
        with pytest.raises(ValueError, match="choose another output_dir, or remove that folder to run it anew"):
            check_same_run(tmp_path, cfg)
    else:
        assert {kind for kind, _, _ in check_same_run(tmp_path, cfg).values()} == ({kind} if kind else set())
    if kind is None:
        assert check_same_run(tmp_path, cfg, whole=True) == {}
    else:
        with pytest.raises(ValueError, match="was run with"):
            check_same_run(tmp_path, cfg, whole=True)


def test_a_finished_run_keeps_its_record(finished, tmp_path, call):
    shutil.copytree(finished, tmp_path / "run")
    before = (finished / "config.yaml").read_text()
    ended = call(*SHORT, "output_dir=run", "trainer.learning_rate=0.1", folder=tmp_path)
    assert ended.startswith("Error: ")
    assert "is finished and was trained with trainer.learning_rate=0.001, which can no longer change" in ended
    ended = call(*SHORT, "output_dir=run", "trainer.max_steps=3", folder=tmp_path)
    assert "checkpoint-4 is at step 4, and this run ends at step 3" in ended
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    # The test graphs come first in the sequence, so that the training set would be another.
    assert "was run with data_hash.train=" in call(*SHORT, "output_dir=run", "task.num_test=5", folder=tmp_path)
    harmless = ["generation.max_new_tokens=9", "trainer.logging_steps=3"]
    assert call(*SHORT, "output_dir=run", *harmless, folder=tmp_path) is None
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test/nfe"] < 10
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").generation.max_new_tokens == 9


def test_no_secret_is_written_or_shown(finished, monkeypatch):
    assert OmegaConf.load(finished / "config.yaml").trainer.hub_token is None
    files = [file for file in finished.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [file for file in files if b"hf_SECRET" in file.read_bytes()]
    secrets = ["++trainer.hub_token=hf_SECRET", "+trainer={hub_token: hf_SECRET}"]
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", *secrets, "task.num_samples=3", "a=1"])
    assert next_command("b=2") == "python run_xlm.py task.num_samples=3 a=1 b=2"
    monkeypatch.setattr(sys, "argv", ["/env/bin/xlm-hf", "a=1"])
    assert next_command("b=2") == "xlm-hf a=1 b=2"


def test_a_resume_takes_what_changed_and_says_so(finished, tmp_path, monkeypatch, call):
    shutil.copytree(finished, tmp_path / "run")
    changed = ["trainer.learning_rate=0.5", "trainer.weight_decay=0.25", "trainer.max_steps=6"]
    optimizers = []
    original = XLMTrainer._load_optimizer_and_scheduler

    def spy(self, checkpoint):
        original(self, checkpoint)
        optimizers.append(self.optimizer)

    monkeypatch.setattr(XLMTrainer, "_load_optimizer_and_scheduler", spy)
    assert call(*SHORT, "output_dir=run", *changed, folder=tmp_path) is None
    assert [group["lr"] for group in optimizers[0].param_groups] == [0.5, 0.5]
    assert sorted(group["weight_decay"] for group in optimizers[0].param_groups) == [0.0, 0.25]
    said = (tmp_path / "run" / "train.log").read_text()
    assert "From step 4 on with trainer.learning_rate=0.5 (0.001 before), trainer.max_steps=6 (4 before)" in said
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").trainer.learning_rate == 0.5
    state = saved_state(tmp_path / "run" / "checkpoint-6")
    assert [log["learning_rate"] for log in state.log_history if log["step"] == 6 and "loss" in log] == [0.5]


# Rates of steps 4 to 6, with a linear schedule down to 0 after 8 steps.
@pytest.mark.parametrize(("rate", "expected"), [(1.0, [0.5, 0.375, 0.25]), (0.25, [0.125, 0.09375, 0.0625])])
def test_a_new_rate_follows_the_schedule_from_the_first_step_on(rate, expected, tmp_path):
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 0, "max_steps": 8, "logging_steps": 1}
    saving = {**schedule, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, learning_rate=1.0, **saving).train()
    again = make_trainer(tmp_path, learning_rate=rate, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    rates = [log["learning_rate"] for log in again.state.log_history if "loss" in log]
    assert rates[4:7] == expected


@pytest.mark.parametrize("pair", [("adamw_torch", "sgd"), ("sgd", "adamw_torch"), ("adamw_torch", "muon")])
def test_the_state_of_another_optimiser_is_refused(pair, tmp_path):
    options = [{"muon_learning_rate": 0.1} if name == "muon" else {"optim": name} for name in pair]
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, **options[0]).train()
    with pytest.raises(ValueError, match="checkpoint-1 holds the state of another optimiser"):
        make_trainer(tmp_path, max_steps=2, **options[1]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_checkpoints_without_a_config_are_of_no_run_that_could_go_on(composed, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match=r"holds checkpoints and no config.yaml, which says of what run"):
        check_same_run(tmp_path, composed)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_are_told_apart_by_their_content(streaming, tmp_path):
    def found(name, content, **options):
        (tmp_path / name).write_text(content)
        task = load_task("text", path=str(tmp_path / name), streaming=streaming, max_length=8, **options)
        return data_hash(task)

    text, (words, other) = "one two three\n" * 30, ("one three two\n", "one two four\n")
    first = found("a.txt", text)
    assert found("b.txt", text) == first
    assert found("a.txt", text + words)["train"] != first["train"]
    assert found("a.txt", text[14:] + other)["tokenizer"] != first["tokenizer"]
    mixed = found("a.txt", text, mixture=[{"path": str(tmp_path / "b.txt"), "weight": 1.0}])
    assert mixed["tokenizer"] == first["tokenizer"]


def hold(folder, ready):
    run_directory(OmegaConf.create({"output_dir": str(folder), "experiment": "e"}))
    ready.set()
    time.sleep(60)


def test_a_folder_is_one_process_s_until_it_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(_run, "_SECONDS_TO_WAIT", 0.2)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    ready.wait(60)
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "experiment": "e"})
    with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on \S+: wait for its end"):
        run_directory(cfg)
    _run.remove_if_empty(str(tmp_path))
    assert (tmp_path / "train.log").exists(), "who is refused takes nothing from who holds it"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert run_directory(cfg) == tmp_path
    # Again in one process, as the runs of a sweep.
    assert run_directory(cfg) == tmp_path


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_state_falls_back_to_the_older_checkpoint_and_then_is_an_error(file, tmp_path, caplog):
    make_trainer(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2).train()
    older, newest = list_checkpoints(tmp_path / "run")
    if file == "trainer_state.json":
        (newest / file).unlink()
    elif file == "scheduler.pt":
        # What would run code when it is loaded.
        torch.save(Hostile(), newest / file)
    else:
        flip_a_byte(newest / file)
    assert last_sound_checkpoint(tmp_path / "run") == older
    assert f"{newest} is skipped: " in caplog.text
    assert file in caplog.text
    (older / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"none of the checkpoints of .* can be resumed, the newest since"):
        last_sound_checkpoint(tmp_path / "run")


class Hostile:
    def __reduce__(self):
        return os.system, ("exit 3",)


@pytest.mark.parametrize("job", ["generate", "evaluate"])
def test_decodes_are_kept_as_they_come_and_go_on(job, finished, tmp_path, monkeypatch, call):
    options = [*SHORT, f"job={job}", f"checkpoint={finished}", "num_samples=12", "trainer.per_device_eval_batch_size=5"]
    assert call(*options, "output_dir=whole", folder=tmp_path) is None
    decoded, original = [], evaluation.decode_records

    def decode(output, batch, examples, *others):
        if len(decoded) == 2 and examples[0]["example_id"] == 10:
            raise KeyboardInterrupt
        decoded.append([example["example_id"] for example in examples])
        return original(output, batch, examples, *others)

    monkeypatch.setattr(evaluation, "decode_records", decode)
    monkeypatch.setattr("xlm_hf.commands.generate.decode_records", decode)
    ended = call(*options, "output_dir=run", folder=tmp_path)
    assert ended == "Interrupted. The same command with the same output_dir goes on with what was saved."
    (journal,) = (tmp_path / "run" / "predictions").glob("*.journal")
    # As a kill would leave it.
    journal.write_bytes(journal.read_bytes() + b'{"example_id": 1')
    decoded.append("again")
    assert call(*options, "output_dir=run", folder=tmp_path) is None
    assert decoded == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], "again", [10, 11]]
    name = "generate.jsonl" if job == "generate" else "test.jsonl"
    whole, resumed = (tmp_path / folder / "predictions" for folder in ("whole", "run"))
    assert records(resumed / name) == records(whole / name)
    assert [file.name for file in resumed.iterdir()] == [name]
    if job == "generate":
        pages = [(tmp_path / folder / "decodes.html").read_text() for folder in ("whole", "run")]
        assert pages[0] == pages[1]


def test_a_journal_of_other_work_is_begun_anew(tmp_path):
    file = tmp_path / "predictions" / "a.journal"
    journal = Journal(file, "first")
    assert not file.parent.exists(), "what makes nothing leaves nothing"
    journal.extend([{"a": 1}])
    journal.extend([{"b": "\u2028"}])
    assert Journal(file, "first") == [{"a": 1}, {"b": "\u2028"}]
    other = Journal(file, "second")
    assert other == []
    other.extend([3])
    assert Journal(file, "second") == [3]
    assert Journal(file, "first") == []
    # A kill within the first line.
    Journal(file, "first").extend([4])
    head = file.read_text().splitlines()[0]
    file.write_text(f'{head}\n{{"a"')
    Journal(file, "first").extend([5])
    assert Journal(file, "first") == [5]


def test_what_decides_a_decode_decides_whether_its_journal_is_taken(tmp_path):
    model = make_trainer(tmp_path).model
    Journal(tmp_path / "j", Hasher.hash((model.state_dict(), 0))).extend([1])
    assert Journal(tmp_path / "j", Hasher.hash((model.state_dict(), 0))) == [1]
    next(model.parameters()).data[0, 0] += 1
    assert Journal(tmp_path / "j", Hasher.hash((model.state_dict(), 0))) == []


def test_a_journal_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "a.journal").symlink_to("/dev/full")
    journal = Journal(tmp_path / "b.journal", "key")
    journal.file = tmp_path / "a.journal"
    with pytest.raises(OSError, match=r"a.journal could not be written \(No space left on device\).* kept: free disk"):
        journal.extend([1])


def start(environment):
    """A launcher and a run that it started: their ids, the run's input, and a pipe that ends when the run is gone."""
    (reading, writing), (alive, mark) = os.pipe(), os.pipe()
    if not (launcher := os.fork()):
        if not os.fork():
            os.close(writing)
            os.dup2(reading, 0)
            os.environ.update(environment)
            end_with_parent()
            os.write(mark, str(os.getpid()).encode())
            time.sleep(30)
        os.close(writing)
        os.close(mark)
        time.sleep(30)
        os._exit(0)
    os.close(reading)
    os.close(mark)
    return launcher, int(os.read(alive, 20)), writing, alive


@pytest.mark.parametrize(
    ("environment", "what", "is_gone"),
    [
        ({ENDS_WITH_INPUT: "1"}, "input", True),
        ({ENDS_WITH_INPUT: "1"}, "launcher", True),
        ({"TORCHELASTIC_RUN_ID": "1"}, "launcher", True),
        ({"TORCHELASTIC_RUN_ID": "1"}, "input", False),
        ({"LOCAL_RANK": "0"}, "launcher", False),
    ],
)
def test_a_run_ends_when_what_it_belongs_to_is_gone(environment, what, is_gone):
    launcher, run, writing, alive = start(environment)
    assert not select.select([alive], [], [], 0.2)[0]
    if what == "launcher":
        os.kill(launcher, signal.SIGKILL)
    else:
        os.close(writing)
    assert bool(select.select([alive], [], [], 20 if is_gone else 1)[0]) == is_gone
    with contextlib.suppress(ProcessLookupError):
        os.kill(run, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)


def test_a_reader_that_goes_away_ends_a_command_quietly(monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", "--config-name", "ilm_star", "--cfg", "job"])
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


def test_a_log_that_cannot_be_written_is_no_traceback(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", "job=trian"])
    monkeypatch.setattr(logging, "raiseExceptions", True)
    with pytest.raises(SystemExit):
        main()
    log, stream = logging.Logger("full"), io.StringIO()
    stream.close()
    log.addHandler(logging.StreamHandler(stream))
    log.warning("lost")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_of_two_processes_on_one_folder_none_ends_wrong(trial, finished, tmp_path):
    """One waits for the other or ends in a sentence, and the weights are those of a single one."""
    chance = random.Random(trial)
    command = forked(SCRIPT, *SHORT, "output_dir=run")
    pipes = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes)]
    time.sleep(chance.uniform(0, 3))
    processes.append(subprocess.Popen(command, **pipes))
    if trial % 2:
        time.sleep(chance.uniform(0, 2))
        processes[0].kill()
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    settle()
    for said, status in ends:
        assert status in (0, -signal.SIGKILL) or re.search(r"Error: \S+ is in use by process \d+", said), said
    assert any(status == 0 for _, status in ends)
    found, expected = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "run", finished))
    assert all(torch.equal(found[name], expected[name]) for name in expected)

"""One folder is one process's, and what is damaged in it is said."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import time

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests.commands.test_cli import SCRIPT, TINY
from tests.processes import forked, settle
from tests.training.test_trainer import make_trainer
from xlm_hf.commands import _run
from xlm_hf.commands._run import run_directory
from xlm_hf.training.checkpoints import last_sound_checkpoint, list_checkpoints

SHORT = [*TINY, "trainer.max_steps=4", "trainer.eval_steps=4", "trainer.save_steps=2", "task.num_test=12"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(forked(SCRIPT, *SHORT, "output_dir=run"), cwd=folder, check=True, capture_output=True)
    return folder / "run"


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


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_of_two_processes_on_one_folder_none_ends_wrong(trial, whole, tmp_path):
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
    found, expected = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "run", whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)

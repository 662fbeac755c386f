"""SIGKILL at random moments of whatever the command line runs: the same command again ends in the same bits."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import forked, python, settle
from xlm_hf.modules.counter_random import uniform

SCRIPT = str(Path(__file__).parents[2] / "examples" / "run_xlm.py")
SHORT = ["size=tiny", "trainer.max_steps=6", "trainer.eval_steps=3", "trainer.save_steps=1", "output_dir=out"]
STAR = [*SHORT, "task.num_train=40", "task.num_validation=4", "task.num_test=4"]
TEXT = [*SHORT, "family=mlm", "task=text", "task.path=corpus.txt", "task.tokenizer=byte", "task.max_length=24"]
COMPARISON = """
defaults: [compare, _self_]
budget: {steps: 4}
families: {ilm: [--config-name=ilm_star], mlm: [--config-name=mlm_star]}
tasks: {star: [task=star_easy, task.num_train=40, task.num_validation=4, task.num_test=4]}
seeds: [0]
nfe_sweep: {mlm: [[generation.confidence_threshold=null, generation.num_steps=2]]}
overrides: [trainer.eval_steps=2, trainer.save_steps=1]
parallel: 2
"""
COMMANDS = {
    "accumulation": ["--config-name=ilm_star", *STAR, "trainer.gradient_accumulation_steps=2"],
    "workers and packing": [*TEXT, "task.protocol=packed", "trainer.dataloader_num_workers=2"],
    "a stream": [*TEXT, "task.streaming=true", "trainer.ema_decay=0.9"],
    "two ranks": ["--config-name=mdlm_star", *STAR, "trainer.use_cpu=true", "trainer.per_device_train_batch_size=4"],
    "compare": ["--config-dir=.", "--config-name=mine", "size=tiny", "output_dir=out"],
    "multirun": ["--multirun", "--config-name=arlm_star", *STAR, "seed=0,1"],
}
KILLS_OF_A_RUN = 2


def start(name, folder):
    """The processes of a command: one, or each rank."""
    arguments = [*COMMANDS[name], *([f"launcher=[{python()}]"] if name == "compare" else [])]
    ranks = 2 if name == "two ranks" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        of_rank = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {**os.environ, **({n: str(v) for n, v in of_rank.items()} if ranks > 1 else {})}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": (folder / f"errors{rank}").open("w")}
        processes.append(subprocess.Popen(forked(SCRIPT, *arguments), cwd=folder, env=environment, **pipes))
    return processes


def prepare(folder):
    folder.mkdir()
    (folder / "corpus.txt").write_text("".join(f"line {number} of {number % 7} words\n" for number in range(60)))
    (folder / "mine.yaml").write_text(COMPARISON)


def finish(name, folder):
    """Run to the end; what is there then, and the seconds that it took."""
    begun = time.monotonic()
    processes = start(name, folder)
    statuses = [process.wait(300) for process in processes]
    seconds = time.monotonic() - begun
    settle()
    assert not any(statuses), [file.read_text() for file in folder.glob("errors*")]
    out = folder / "out"
    metrics = {
        str(file.relative_to(out)): {n: v for n, v in json.loads(file.read_text()).items() if "seconds" not in n}
        for file in out.rglob("metrics.json")
    }
    weights = {str(file.relative_to(out)): load_file(file) for file in out.rglob("model.safetensors")}
    decodes = {str(file.relative_to(out)): file.read_text() for file in out.rglob("predictions/*.jsonl")}
    assert weights
    assert not list(out.rglob("*.incomplete"))
    return SimpleNamespace(metrics=metrics, weights=weights, decodes=decodes, seconds=seconds)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    ends = {}

    def end(name):
        if name not in ends:
            folder = tmp_path_factory.mktemp("whole") / "run"
            prepare(folder)
            ends[name] = finish(name, folder)
        return ends[name]

    return end


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(5))
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_killed_ends_in_the_same_bits(name, trial, whole, tmp_path):
    expected = whole(name)
    folder = tmp_path / "run"
    prepare(folder)
    for kill in range(KILLS_OF_A_RUN):
        moment = float(uniform([*COMMANDS].index(name), trial, torch.tensor(kill)))
        processes = start(name, folder)
        time.sleep(moment * expected.seconds)
        for process in processes:
            process.kill()
            process.wait()
        settle()
    found = finish(name, folder)
    assert found.metrics == expected.metrics
    assert found.decodes == expected.decodes
    assert found.weights.keys() == expected.weights.keys()
    for file, weights in expected.weights.items():
        assert all(torch.equal(found.weights[file][tensor], value) for tensor, value in weights.items()), file

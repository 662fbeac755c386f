"""SIGKILL at random moments, within saves too: the same command again ends in the bits of the uninterrupted run."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from tests.commands.test_cli import command
from tests.training.test_trainer import EXACT, Tokenizer, V, assert_same_weights, make_trainer
from xlm_hf.data import keyed
from xlm_hf.modeling.ilm import ILMCollator, ILMLoss
from xlm_hf.training.checkpoints import last_sound_checkpoint

STEPS = 12
# stream, packing, workers, accumulation, processes
COVERING = [
    (False, False, 0, 1, 1),
    (True, True, 0, 2, 1),
    (True, False, 2, 2, 1),
    (False, True, 2, 1, 1),
    (False, False, 0, 2, 2),
    (True, True, 2, 1, 2),
]


def train(output_dir, config, rank, port):
    """What the command of a run does, in a process of its own."""
    stream, packing, workers, accumulation, processes = config
    if processes > 1:
        distributed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in distributed.items()}, MASTER_ADDR="127.0.0.1")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    trainer = make_trainer(
        output_dir,
        8 // accumulation // processes,
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=workers,
        dataloader_drop_last=True,
        ddp_backend="gloo" if processes > 1 else None,
        max_steps=STEPS,
        ema_decay=0.9,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )
    trainer.data_collator = ILMCollator(Tokenizer(V), max_length=32, seed=7, packing=packing, kind="seq2seq")
    trainer.loss = ILMLoss()
    if stream:
        trainer.train_dataset = keyed(trainer.train_dataset.dataset.to_iterable_dataset(num_shards=2))
    checkpoint = last_sound_checkpoint(output_dir)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    os._exit(0)


def start(output_dir, config):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, so that a start costs no imports.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=train, args=(output_dir, config, rank, port)) for rank in range(config[-1])]
    for process in processes:
        process.start()
    return processes


def kill_at_random(processes, output_dir, chance):
    """Kill all ranks: some time after the start, or while the files of a checkpoint are being written."""
    if chance.random() < 0.5:
        time.sleep(chance.uniform(0.1, 1.0))
    else:
        number = chance.randint(1, STEPS)
        while not list(output_dir.glob(f"checkpoint-{number}*")) and any(process.is_alive() for process in processes):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0.0, 0.02))
    was_running = any(process.is_alive() for process in processes)
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    return was_running


def finish(output_dir, config):
    processes = start(output_dir, config)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    last = output_dir / f"checkpoint-{STEPS}"
    state = json.loads((last / "trainer_state.json").read_text())
    losses = {log["step"]: (log["loss"], log["num_input_tokens_seen"]) for log in state["log_history"]}
    assert len(losses) == STEPS
    return SimpleNamespace(
        weights=load_file(last / "model.safetensors"), average=load_file(last / "ema.safetensors"), losses=losses
    )


def check(tmp_path, config, num_kills, seed):
    expected = finish(tmp_path / "whole", config)
    chance, killed = random.Random(seed), 0
    while killed < num_kills:
        run = tmp_path / f"run{killed}"
        # Two kills of one run, so that a resumed run is killed too.
        for _ in range(2):
            run.mkdir(exist_ok=True)
            killed += kill_at_random(start(run, config), run, chance)
        end = finish(run, config)
        assert_same_weights(end.weights, expected.weights, **EXACT)
        assert_same_weights(end.average, expected.average, **EXACT)
        assert end.losses == expected.losses


def test_a_run_that_is_killed_twice_ends_in_the_same_bits(tmp_path):
    config = COVERING[4]
    check(tmp_path, config, num_kills=2, seed=str(config))


@pytest.mark.slow
@pytest.mark.parametrize("config", COVERING, ids=str)
def test_many_kills(tmp_path, config):
    check(tmp_path, config, num_kills=4, seed=str(config))


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_during_a_save_leaves_the_earlier_checkpoint(small_disk):
    options = (f"output_dir={small_disk}/run", "trainer.save_total_limit=null", "trainer.save_steps=1")
    result = subprocess.run(command(*options), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    sentence = result.stderr.strip().splitlines()[-1]
    assert "could not be written (No space left on device); what was saved before is intact" in sentence
    assert "Traceback" not in result.stderr
    checkpoint = last_sound_checkpoint(small_disk / "run")
    assert checkpoint is not None
    assert not list((small_disk / "run").glob("*.incomplete"))
    evaluate = command("job=evaluate", f"checkpoint={checkpoint}", "output_dir=evaluated")
    done = subprocess.run(evaluate, cwd=small_disk.parent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

"""Peak memory of preparing large texts: bounded by bytes, whatever a line holds.

OMP_NUM_THREADS=1 python -m benchmarks.memory [NAME ...] [--share 0.01] [--options tokenizer=byte max_length=128]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.measure import ROOT, memory, run_child
from xlm_hf import load_task
from xlm_hf.building import build_loss
from xlm_hf.evaluation import EvaluationSet, run_evaluation_set
from xlm_hf.testing import FamilyCase

# Bytes, and words of a line; None for one line of all.
TEXTS = {
    "one line of 500 MB": (500_000_000, None),
    "one line of 100 MB": (100_000_000, None),
    "10,000,000 short lines": (200_000_000, 4),
}


def write_text(file: Path, size: int, words_of_a_line: int | None) -> None:
    """Write words of lower-case letters, as many as Zipf's law says of each, and about `size` bytes of them."""
    chance = np.random.default_rng(0)
    vocabulary = ["".join(chance.choice([*"etaoinshrdlu"], chance.integers(2, 7))) for _ in range(20_000)]
    with file.open("w") as stream:
        while (left := size - stream.tell()) > 0:
            words = [vocabulary[rank % len(vocabulary)] for rank in chance.zipf(1.2, 100_000).tolist()]
            step = words_of_a_line or len(words)
            lines = [" ".join(words[start : start + step]) for start in range(0, len(words), step)]
            stream.write(((" " if words_of_a_line is None else "\n").join([*lines, ""]))[:left])


def prepare(file: str, cache: str, options: dict) -> str:
    """Prepare a text in this process: its CPU seconds, and the largest resident set before and after."""
    before, start = memory(), time.process_time()
    task = load_task("text", path=file, cache_dir=cache, **{"tokenizer": "byte", **options})
    return f"{time.process_time() - start} {before} {memory()} {sum(map(len, task.splits.values()))}"


_LONG = "from benchmarks.memory import long; print(long({!r}))"


def evaluation(num: int = 100_000) -> Iterator[tuple]:
    """The loss of `num` examples; yields after each batch."""
    case, reached = FamilyCase("mdlm"), []
    model, row = case.model(), case.examples(1)[0]
    columns = {name: [row[name]] * num for name in ("prompt_ids", "target_ids")}
    data = Dataset.from_dict({"example_id": range(num), **columns})
    loss = build_loss(case.cfg.loss)
    evaluated = EvaluationSet("a", data, case.collator("seq2seq", model), [], loss=loss)
    run_evaluation_set(model, evaluated, case.task.tokenizer, 500, 0, lambda _: reached.append(state()))
    yield from reached


def generation(num: int = 40) -> Iterator[tuple]:
    """`num` batches of 512 rows."""
    case = FamilyCase("mdlm")
    model = case.model()
    batch = case.collator("seq2seq_prediction", model)(case.examples(1) * 512)
    batch.pop("example_id")
    for number in range(num):
        model.generate(**batch, seed=[*range(number, number + 512)], max_new_tokens=32, num_steps=8)
        yield state()


def training(num: int = 2000) -> Iterator[tuple]:
    """`num` steps."""
    reached = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            reached.append(globals()["state"]())

    case = FamilyCase("mdlm", f"trainer.max_steps={num}", "trainer.save_steps=500", "trainer.eval_steps=500")
    with tempfile.TemporaryDirectory() as folder:
        case.trainer(Path(folder), (Recorder(),)).train()
    yield from reached


def comparison(num: int = 12) -> Iterator[tuple]:
    """The parent of a comparison, after each of `num` cells; none leaves a file among the temporary ones."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        options = ["size=tiny", "budget.steps=2", "families=[mdlm]", "tasks=[star_easy]", f"seeds={[*range(num)]}"]
        options += [f"task.num_{name}=20" for name in ("train", "validation", "test")]
        script = [sys.executable, str(ROOT / "examples" / "run_xlm.py"), "--config-name", "compare"]
        environment = {**os.environ, "TMPDIR": str(scratch), "XLM_HF_CACHE": f"{folder}/cache"}
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        with subprocess.Popen([*script, *options, f"output_dir={folder}/out"], **streams) as process:
            for line in process.stdout:
                if line.endswith(": done\n"):
                    yield state(process.pid)
        assert not process.returncode
        assert not [*scratch.iterdir()]


LONG = {
    "evaluation of 100,000": evaluation,
    "generation of 512 rows": generation,
    "2,000 steps": training,
    "comparison of 12 cells": comparison,
}


def state(process: int | str = "self") -> tuple[int, int]:
    """The resident set of a process in bytes, and its open descriptors."""
    return memory("VmRSS", process), len([*Path(f"/proc/{process}/fd").iterdir()])


def long(name: str) -> str:
    """What a process holds after a tenth, half and all of something long."""
    reached = [*LONG[name]()]
    shown = [reached[len(reached) * share // 10 - 1] for share in (1, 5, 10)]
    return "; ".join(f"{size / 2**20:,.0f} MiB, {descriptors} descriptors" for size, descriptors in shown)


def main() -> None:
    """Measure and print a line for each text, and for what is long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*TEXTS, *LONG]))
    parser.add_argument("--share", type=float, default=1.0, help="of the bytes")
    parser.add_argument("--options", nargs="*", default=[], help="of the task")
    given = parser.parse_args()
    pairs = (option.split("=") for option in given.options)
    options = {name: int(value) if value.isdecimal() else value for name, value in pairs}
    for name in given.names or [*TEXTS, *LONG]:
        if name in LONG:
            print(
                f"{name}, after a tenth, half and all:",
                run_child("-c", _LONG.format(name)).stdout.splitlines()[-1],
                flush=True,
            )
            continue
        size, words = TEXTS[name]
        size = int(size * given.share)
        with tempfile.TemporaryDirectory() as folder:
            file, cache = Path(folder, "text.txt"), Path(folder, "cache")
            write_text(file, size, words)
            if words is None:
                options = {"validation_fraction": 0, "test_fraction": 0, **options}
            program = f"from benchmarks.memory import prepare; print(prepare({str(file)!r}, {str(cache)!r}, {options}))"
            seconds, before, peak, examples = map(float, run_child("-c", program).stdout.split())
            kept = sum(it.stat().st_size for it in cache.rglob("*") if it.is_file())
        print(
            f"{name} ({size / 1e6:,.0f} MB): {size / seconds / 1e6:.2f} MB a second, peak {peak / 2**20:,.0f} MiB "
            f"({before / 2**20:,.0f} before), {examples:,.0f} examples, the cache {kept / size:.2f} times the text",
            flush=True,
        )


if __name__ == "__main__":
    main()

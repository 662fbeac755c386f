"""Time and memory: CPU seconds of one thread, in turns, and the largest resident set of a process of its own."""

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.operations import executed

ROOT = Path(__file__).parent.parent
MATRIX_SIZE = 1024


def cpu_seconds(functions: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """CPU seconds of each function, called in turns, so that what disturbs the machine disturbs all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.process_time()
            function()
            samples[name].append(time.process_time() - start)
    return samples


def compare(functions: dict[str, Callable[[], object]], repetitions: int) -> dict:
    """Measure functions that do the same, beside a matrix product that takes its turn with them.

    Returns:
        median CPU seconds of each, all samples, how many times the others' time is that of "ours", and of ours the
        operations that it executes and how near their rate is to that of the matrix product.
    """
    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE)
    samples = cpu_seconds({**functions, "product": lambda: [a @ b for _ in range(8)]}, repetitions)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    rate = 8 * 2 * MATRIX_SIZE**3 / medians.pop("product")
    operations = executed(functions["ours"])
    return {
        "cpu_seconds": medians,
        "ratios": {f"{name}/ours": medians[name] / medians["ours"] for name in medians if name != "ours"},
        "operations": operations,
        "share_of_matrix_product_rate": operations / medians["ours"] / rate,
        "samples": samples,
    }


def matrix_product_rate() -> float:
    """Floating-point operations a second of a float32 matrix product on one thread, the median of nine."""
    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE)
    a @ b
    seconds = statistics.median(cpu_seconds({"product": lambda: a @ b}, 9)["product"])
    return 2 * MATRIX_SIZE**3 / seconds


def run_child(*arguments: str) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` at the root of the repository on one thread; raises with its output if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed:\n{done.stderr}")
    return done


def memory(field: str = "VmHWM", process: int | str = "self") -> int:
    """Bytes of the largest resident set that a program has had, or of the one that it has now ("VmRSS")."""
    # Not `getrusage`: its count includes the parent's, from before this program was started in its place.
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


def machine() -> dict:
    """What the numbers were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "matrix_product_gflops": matrix_product_rate() / 1e9,
    }

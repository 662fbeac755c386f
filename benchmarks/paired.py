"""Two commands in turns: CPU seconds of each call, the median of the pairs' ratios, and the peak memory of each.

    python -m benchmarks.paired --ours "python -m benchmarks.calls generation ilm" --peer "COMMAND" [--pairs 5]
    python -m benchmarks.paired --whole --ours "python -c 'import xlm_hf'" --peer "COMMAND"

Any command can be a peer, in an environment of its own. It is started once, prints `ready` when it has warmed up, and
answers every line of its standard input by one call and the line `turn SECONDS` (see `take_turns`). With `--whole` it
is any program at all, started anew for every turn. Ours and the peer alternate, so that what
disturbs the machine disturbs both. `--into FILE.json` appends the result to the records of a file.

This file needs the standard library alone, so that a peer of another environment can import it.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def take_turns(function: Callable[[], object], warm_up: int = 1) -> None:
    """Call `function` for every line of the standard input and print its CPU seconds: the side of a measured command.

    The first `warm_up` calls count for nothing.
    """
    for _ in range(warm_up):
        function()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        function()
        print(f"turn {time.process_time() - start}", flush=True)


class Turns:
    """A command that takes turns: started once, asked for one call after the other."""

    def __init__(self, command: str, folder: Path = ROOT):
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(shlex.split(command), cwd=folder, env=environment(folder), **pipes)
        self._answer("ready")

    def __call__(self) -> float:
        """CPU seconds of one call."""
        self.process.stdin.write("\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return float(self._answer("turn "))

    def _answer(self, start: str) -> str:
        for line in self.process.stdout:  # type: ignore[union-attr]
            if line.startswith(start):
                return line.removeprefix(start)
        raise RuntimeError(f"{shlex.join(self.process.args)} ended without the line {start!r}.")  # type: ignore[arg-type]

    def close(self) -> int:
        """End the command; its peak memory in bytes."""
        # Not `getrusage`: its count includes this process, from before the command was started in its place.
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        self.process.communicate()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


class Whole:
    """A program that is started anew for every turn."""

    def __init__(self, command: str, folder: Path = ROOT):
        self.command, self.folder, self.peak = command, folder, 0
        self()

    def __call__(self) -> float:
        """CPU seconds of one run, from its start to its end, those of its own children included."""
        process = subprocess.Popen(shlex.split(self.command), cwd=self.folder, env=environment(self.folder), stdout=-3)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{self.command} failed with status {os.waitstatus_to_exitcode(status)}.")
        self.peak = max(self.peak, 1024 * used.ru_maxrss)
        return used.ru_utime + used.ru_stime

    def close(self) -> int:
        """Its peak memory in bytes; Linux counts no less than what this process held when it started it."""
        return self.peak


def environment(folder: Path) -> dict[str, str]:
    """One thread, and the checkout of `folder` before any other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(folder)}


def in_pairs(ours: Any, peer: Any, pairs: int) -> dict[str, Any]:
    """Let both take `pairs` turns each, the first of a pair being ours and the peer by turns.

    Returns:
        the median CPU seconds of each, the median of the ratios peer / ours of the pairs and all of these, the seconds,
        and the peak memory of each in bytes.
    """
    samples: dict[str, list[float]] = {"ours": [], "peer": []}
    for number in range(pairs):
        for name, side in [("ours", ours), ("peer", peer)][:: 1 if number % 2 == 0 else -1]:
            samples[name].append(side())
    ratios = [theirs / mine for mine, theirs in zip(samples["ours"], samples["peer"], strict=True)]
    return {
        "cpu_seconds": {name: statistics.median(values) for name, values in samples.items()},
        "times_better": statistics.median(ratios),
        "ratios": ratios,
        "samples": samples,
        "peak_bytes": {"ours": ours.close(), "peer": peer.close()},
    }


def device() -> str:
    """The processor by its name."""
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    named = re.search(r"model name\s*:\s*(.+)", lines)
    return f"{named[1] if named else platform.machine()}, 1 thread"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, metavar="COMMAND")
    parser.add_argument("--peer", required=True, metavar="COMMAND")
    parser.add_argument(
        "--peer-folder", type=Path, default=ROOT, help="checkout that the peer runs in, e.g. an older one"
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="start the commands anew for every turn")
    parser.add_argument("--name", help="what is measured; by default our command")
    parser.add_argument("--into", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    side = Whole if options.whole else Turns
    measured = in_pairs(side(options.ours), side(options.peer, options.peer_folder), options.pairs)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about = {"name": options.name or options.ours, "ours": options.ours, "peer": options.peer}
    record = {**about, "commit": commit.stdout.strip(), "device": device(), **measured}
    seconds, peak = record["cpu_seconds"], {name: size / 2**20 for name, size in record["peak_bytes"].items()}
    print(
        f"{record['name']}: ours {seconds['ours']:.4g} s, peer {seconds['peer']:.4g} s, {record['times_better']:.3g} "
        f"times ({min(record['ratios']):.3g} to {max(record['ratios']):.3g}); peak {peak['ours']:,.0f} and "
        f"{peak['peer']:,.0f} MiB",
        flush=True,
    )
    if options.into:
        records = json.loads(options.into.read_text()) if options.into.exists() else []
        kept = [r for r in records if r["name"] != record["name"]]
        options.into.write_text(json.dumps([*kept, record], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Has anything become twice as slow? A check of ratios, for continuous integration.

    OMP_NUM_THREADS=1 python -m benchmarks.check [--record]

Measures the quick settings beside the plain references and compares the ratios with `benchmarks/results/ratios.json`:
a ratio below half of what is recorded there is measured once more, and if it is low again the check fails. It also
fails for a ratio that has no record. Both sides of a ratio run in turns on the same machine, so its speed and its load
cancel. `--record` renews the file.
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks import collation, generation, training
from benchmarks.cases import FAMILIES

FILE = Path(__file__).parent / "results" / "ratios.json"
TOLERATED = 0.5


def measurements() -> dict:
    """A function for every ratio that is watched."""
    (training_setting,), (collation_setting,) = training.QUICK, collation.QUICK
    watched = {}
    for family in FAMILIES:
        watched[f"training {family}"] = lambda f=family: training.measure(f, training_setting, 3, with_memory=False)
        watched[f"collation {family}"] = lambda f=family: collation.measure(f, collation_setting, 3)
    for setting in generation.QUICK:
        watched[f"generation {setting.family}"] = lambda s=setting: generation.measure(s)
    return watched


def main() -> None:
    """Measure and compare, or record."""
    torch.set_num_threads(1)
    ratios, watched = {}, measurements()
    recorded = {} if "--record" in sys.argv else json.loads(FILE.read_text())
    unknown = [name for name in watched if name not in recorded]
    if recorded and unknown:
        sys.exit(f"No ratio is recorded in {FILE} for {', '.join(unknown)}: run with --record.")
    slow = []
    for name, measure in watched.items():
        ratios[name] = measure()["ratios"]["plain/ours"]
        bound = TOLERATED * recorded.get(name, 0.0)
        if ratios[name] < bound:
            ratios[name] = max(ratios[name], measure()["ratios"]["plain/ours"])
        print(f"{name}: {ratios[name]:.2f} times as fast as plain, at least {bound:.2f} is expected", flush=True)
        if ratios[name] < bound:
            slow.append(name)
    if not recorded:
        FILE.write_text(json.dumps({name: round(ratio, 2) for name, ratio in ratios.items()}, indent=1) + "\n")
    if slow:
        sys.exit(f"Twice as slow as recorded in {FILE}: {', '.join(slow)}.")


if __name__ == "__main__":
    main()

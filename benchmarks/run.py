"""Run the benchmarks: one thread, CPU seconds, medians of interleaved repetitions, beside the references.

    OMP_NUM_THREADS=1 python -m benchmarks.run [training generation ...] [--quick] [--families ilm]

Without names all are run, which takes about an hour; `--quick` takes one or two minutes and leaves the ablation out.
Every benchmark goes to `benchmarks/results/speed/NAME.json` (with `--quick` to `NAME_quick.json`), beside the machine
and its matrix-product rate; `python -m benchmarks.tables` then renews the tables of benchmarks/results/speed/README.md.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import ablation, collation, generation, noises, preparation, training
from benchmarks.cases import FAMILIES
from benchmarks.measure import machine, matrix_product_rate

RESULTS = Path(__file__).parent / "results" / "speed"


def run_training(families, quick: bool) -> Iterator[dict]:
    """An optimiser step at every setting."""
    for setting in training.QUICK if quick else training.SETTINGS:
        repetitions = 31 if "star" in setting else 3
        for family in families:
            yield training.measure(family, setting, repetitions, with_memory=not quick and "star" not in setting)


def run_collation(families, quick: bool) -> Iterator[dict]:
    """The training collators at every setting."""
    for setting in collation.QUICK if quick else collation.SETTINGS:
        for family in families:
            yield collation.measure(family, setting, 3 if quick else 5)


def run_generation(families, quick: bool) -> Iterator[dict]:
    """Whole batches at every setting."""
    for setting in generation.QUICK if quick else generation.SETTINGS:
        if setting.family in families:
            yield generation.measure(setting)


def run_preparation(families, quick: bool) -> Iterator[dict]:
    """Importing the library, preparing a data set."""
    yield {"import_cpu_seconds": preparation.import_times(3 if quick else 7)}
    yield {"examples_per_second": preparation.preparation_speeds(1_000 if quick else 50_000)}


def run_noises(families, quick: bool) -> Iterator[dict]:
    """The diffusion families beside one another."""
    (setting,) = training.QUICK if quick else (noises.STEPS,)
    yield noises.training_steps(setting, 3 if quick else 7, with_memory=not quick)
    rows, length, repetitions = (2, 32, 1) if quick else (noises.ROWS, noises.LENGTH, 3)
    yield noises.cached_blocks(rows, length, noises.BLOCK, 500 if quick else noises.VOCABULARY, repetitions)


def run_ablation(families, quick: bool) -> Iterator[dict]:
    """What each optimisation brings."""
    yield from ablation.measure(1 if quick else 3)


BENCHMARKS = {
    "training": run_training,
    "collation": run_collation,
    "generation": run_generation,
    "noises": run_noises,
    "preparation": run_preparation,
    "ablation": run_ablation,
}


def line(record: dict) -> str:
    """What a record says, in one line."""
    names = [str(record[name]) for name in ("family", "setting") if name in record]
    numbers = {
        **{f"{name} s": value for name, value in record.get("cpu_seconds", {}).items()},
        **record.get("examples_per_second", {}),
        **record.get("import_cpu_seconds", {}),
        **record.get("ratios", {}),
        **{name: record[name] for name in ("share_of_matrix_product_rate", "nfe") if name in record},
        **{f"{name} MiB": value / 2**20 for name, value in record.get("peak_bytes", {}).items()},
    }
    return ", ".join(names + [f"{name} {value:,.4g}" for name, value in numbers.items()])


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="small settings, no ablation")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    options = parser.parse_args(arguments)
    unknown = set(options.benchmarks) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {unknown.pop()!r}: there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in options.benchmarks or [n for n in BENCHMARKS if not (options.quick and n == "ablation")]:
        command = f"python -m benchmarks.run {name}{' --quick' if options.quick else ''}"
        result = {"command": command, **machine(), "records": []}
        file = RESULTS / f"{name}{'_quick' if options.quick else ''}.json"
        for record in BENCHMARKS[name](options.families, options.quick):
            result["records"].append(record)
            # Written every time: a run that is ended early leaves what it has.
            result["matrix_product_gflops_at_the_end"] = matrix_product_rate() / 1e9
            file.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {line(record)}", flush=True)
        print(f"{name}: {file}")


if __name__ == "__main__":
    main()

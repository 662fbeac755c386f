"""job=compare: families x tasks x seeds under one budget, each cell a run of its own, and what they come to."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from xlm_hf.building import check_config, compose, plain
from xlm_hf.commands._run import check_same_run, run_directory, say
from xlm_hf.files import check_file_name, write_text
from xlm_hf.modules.checked_options import check_value
from xlm_hf.modules.messages import check_options
from xlm_hf.overrides import is_open, quoted
from xlm_hf.reports.comparison import MOST_COLUMNS, NOT_IN_TABLE, markdown_table, plot, summarise, write_tables
from xlm_hf.training.checkpoints import list_checkpoints, saved_state
from xlm_hf.training.signals import ENDS_WITH_INPUT

_BUDGETS = {"steps": "trainer.max_steps", "tokens": "budget.tokens", "seconds": "budget.seconds"}
# A standard input that ends when this process does, whose other end nobody closes.
_ALIVE, _ = os.pipe()
# Of a run as such, not of its quality.
_COSTS = ("parameters", "steps", "tokens", "seconds")


@dataclass(frozen=True)
class Cell:
    """One run: a family on a task with a seed.

    Attributes:
        family: its label in the comparison.
        task: its label in the comparison.
        seed: of the run.
        folder: its run directory.
        arguments: the command line of the run.
        sweep: by name of a point, the further options under which the trained model is evaluated.
    """

    family: str
    task: str
    seed: int
    folder: Path
    arguments: list[str]
    sweep: dict[str, list[str]]


def run(cfg: DictConfig) -> None:
    """Run what is missing of the comparison, and write `results.csv`, `results.md` and the plots.

    Raises:
        ValueError: before anything runs, if a cell's config is mistaken or differs from that of its folder; at the end,
            if a cell failed.
    """
    if "families" not in cfg:
        raise ValueError("This config names no families to compare: use --config-name compare or one made from it.")
    output_dir = run_directory(cfg)
    options = plain(cfg)
    cells = plan(options, output_dir)
    for cell in cells:
        check_config(config := config_of(cell))
        check_same_run(cell.folder, config, whole=True)
    say(f"{len(cells)} runs, {sum(bool(_metrics(cell.folder)) for cell in cells)} of them done; {output_dir}")
    launcher = options["launcher"] or [sys.executable]
    missing = [cell for cell in cells if not _metrics(cell.folder)]
    begun, left = time.monotonic(), len(missing)

    def run_and_tell(cell: Cell) -> list[str]:
        nonlocal left
        failed = run_cell(cell, launcher)
        if cell in missing:
            left -= 1
            minutes = (time.monotonic() - begun) / (len(missing) - left) * left / 60
            running = f"{min(left, cfg.parallel)} running, about {minutes:.0f} minutes to go"
            say(f"{len(cells) - left} of {len(cells)} runs done, {running}")
        return failed

    with ThreadPoolExecutor(cfg.parallel) as pool:
        failures = [*itertools.chain(*pool.map(run_and_tell, cells))]
    write_comparison(cells, output_dir, options["quality"])
    if failures:
        sys.exit(
            f"Error: {len(failures)} of the runs failed ({', '.join(failures)}), their last lines are above: the same "
            "command tries them again and keeps the others."
        )


def plan(options: dict[str, Any], output_dir: Path) -> list[Cell]:
    """The cells of a comparison.

    Raises:
        ValueError: if there is not exactly one budget, nothing to compare, or a sweep of a family that is not there.
    """
    budget = {_BUDGETS[unit]: amount for unit, amount in options["budget"].items() if amount is not None}
    if len(budget) != 1:
        raise ValueError(f"A comparison has one budget of {', '.join(_BUDGETS)}, and this one has {len(budget)}.")
    families, tasks = _with_options(options["families"]), _with_options(options["tasks"])
    if not (families and tasks and options["seeds"]):
        raise ValueError("There is nothing to compare: families, tasks and seeds must each name at least one.")
    given = HydraConfig.get().overrides.task
    check_options("nfe_sweep", options["nfe_sweep"], [*families, *(it.removeprefix("~families.") for it in given)])
    # A size that the YAML gives as an option counts as well.
    size = options.get("size", HydraConfig.get().runtime.choices["size"])
    size = next((override.split("=")[1] for override in given if override.startswith("size=")), size)
    shared = [*_search_path(), f"size={size}", *options["overrides"]]
    shared += [f"eval_model={quoted(options['eval_model'])}"] if options["eval_model"] else []
    limit = [f"{name}={amount}" for name, amount in budget.items()]
    cells = []
    for task, family, seed in itertools.product(tasks, families, dict.fromkeys(options["seeds"])):
        # A named experiment brings its family.
        ours = _with_default(families[family], f"family={family}", ("family=", "--config-name="))
        theirs = _with_default(tasks[task], f"task={task}", ("task=",))
        identity = [f"seed={seed}", f"experiment={family}_{task}"]
        arguments = [*shared, *ours, *theirs, *_passed_on(), *limit, *identity]
        # Options such as --config-name cannot stand among the overrides.
        arguments.sort(key=lambda argument: not argument.startswith("--"))
        points = [[point] if isinstance(point, str) else point for point in options["nfe_sweep"].get(family, [])]
        sweep = {_file_name(point): point for point in points}
        cells.append(Cell(family, task, seed, output_dir / f"{family}_{task}_{seed}", arguments, sweep))
    return cells


def _with_default(options: list[str], default: str, names: tuple[str, ...]) -> list[str]:
    return options if any(option.startswith(names) for option in options) else [*options, default]


def _with_options(entries: Mapping[str, list[str] | None] | Sequence[str] | None) -> dict[str, list[str]]:
    found = entries if isinstance(entries, Mapping) else dict.fromkeys(entries or [])
    for name, options in found.items():
        check_file_name("A label of a comparison", str(name))
        check_value(f"the options of {name}", options, list[str] | None)
    return {str(name): options or [] for name, options in found.items()}


def _file_name(options: list[str]) -> str:
    named = [option.removeprefix("generation.") for option in options if not option.endswith("=null")]
    return re.sub(r"[^\w.=-]+", "_", ",".join(named)) or "default"


def _search_path() -> list[str]:
    """The folders of configs that this command line added, as an override for the runs."""
    sources = HydraConfig.get().runtime.config_sources
    added = [f"{it.schema}://{it.path}" for it in sources if "command" in it.provider or "searchpath" in it.provider]
    return [f"hydra.searchpath=[{','.join(added)}]"] if added else []


def _passed_on() -> list[str]:
    """The options of this command line that are those of the runs."""
    return [override for override in HydraConfig.get().overrides.task if is_open(override.removeprefix("++"))]


def config_of(cell: Cell) -> DictConfig:
    """The config of a cell, composed as its own process will."""
    prefix = "--config-name="
    named = [argument.removeprefix(prefix) for argument in cell.arguments if argument.startswith(prefix)]
    overrides = [argument for argument in cell.arguments if not argument.startswith(prefix)]
    return compose(named[-1] if named else "config", overrides)


def run_cell(cell: Cell, launcher: list[str]) -> list[str]:
    """Train a cell and evaluate the points of its sweep, all that is missing; the names of what failed."""
    if not _finish(cell.folder, [*cell.arguments, "job=train"], launcher):
        return [cell.folder.name]
    trained = [*cell.arguments, "job=evaluate", f"checkpoint={quoted(str(cell.folder / 'model'))}"]
    return [
        f"{cell.folder.name}/{name}"
        for name, options in cell.sweep.items()
        if not _finish(cell.folder / "nfe" / name, [*trained, *options], launcher)
    ]


def _finish(folder: Path, arguments: list[str], launcher: list[str]) -> bool:
    """Run a command in a process of its own unless its metrics are there; whether they are then."""
    if _metrics(folder):
        return True
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "console.log"
    command = [*launcher, sys.argv[0], *arguments, f"output_dir={quoted(str(folder))}"]
    streams: dict[str, Any] = {"stdin": _ALIVE, "stderr": subprocess.STDOUT}
    with log.open("w") as console:
        status = subprocess.run(command, env=os.environ | {ENDS_WITH_INPUT: "1"}, stdout=console, **streams).returncode
    if status == 0 and _metrics(folder):
        say(f"{folder}: done")
        return True
    lines = log.read_text(errors="replace").strip().splitlines()[-8:]
    say("\n    ".join([f"{folder}: failed with exit status {status}", *lines]))
    return False


def _metrics(folder: Path) -> dict[str, Any]:
    file = folder / "metrics.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write_comparison(cells: list[Cell], output_dir: Path, quality: list[str]) -> None:
    """Write the tables and plots of the cells that are done."""
    done = [cell for cell in cells if _metrics(cell.folder)]
    if not done:
        return
    runs = _frame([(cell, _metrics(cell.folder)) for cell in done])
    # A family without a sweep is one point.
    evaluations = [
        (cell, metrics | {"options": name})
        for cell in done
        for name in cell.sweep or ["-"]
        if (metrics := _metrics(cell.folder / "nfe" / name if cell.sweep else cell.folder))
    ]
    # What was logged up to the newest checkpoint.
    newest = [(cell, checkpoint) for cell in done for checkpoint in list_checkpoints(cell.folder)[-1:]]
    history = _frame([(cell, log) for cell, checkpoint in newest for log in saved_state(checkpoint).log_history])
    points = _frame(evaluations)
    chosen = _named(runs, [*quality, "nfe"])
    others = [name for name in sorted(runs) if "/" in name and not name.endswith(NOT_IN_TABLE) and name not in chosen]
    table = summarise(runs, ["family"], [*chosen, *_COSTS, *others])
    text = f"# Comparison\n\nMean ± standard deviation over seeds.\n\n{markdown_table(table)}"
    if table.shape[1] > MOST_COLUMNS:
        text += "\nFurther metrics are in results.csv.\n"
    if any(cell.sweep for cell in done):
        text += f"\n# Forward passes\n\n{markdown_table(summarise(points, ['family', 'options'], chosen))}"
        write_text(output_dir / "results_nfe.csv", points.to_csv(index=False))
    write_tables(output_dir, "results", runs, text)
    plot(output_dir / "quality_steps.png", history, "step", "step", _named(history, quality))
    for passes in _named(points, ["nfe"])[:1]:
        plot(output_dir / "quality_nfe.png", points, "options", passes, _named(points, quality))
    say(f"\n{text}\nTables and plots: {output_dir}/results.md, results*.csv, quality_*.png")


def _frame(rows: list[tuple[Cell, dict[str, Any]]]) -> pd.DataFrame:
    return pd.DataFrame([{"family": c.family, "task": c.task, "seed": c.seed, **values} for c, values in rows])


def _named(frame: pd.DataFrame, metrics: list[str]) -> list[str]:
    """The columns of the metrics, whichever evaluation set reports them, in the order of the metrics."""
    return [name for metric in metrics for name in frame if name.endswith(f"/{metric}")]

"""job=compare: families x tasks x seeds under one budget, each cell a run of its own, and what they come to."""

import json
import logging
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from xlm_hf.checkpoints import list_checkpoints, write_text
from xlm_hf.commands.common import is_open, open_override, plain, run_directory, say
from xlm_hf.comparison import markdown_table, plot, summary_rows, write_csv
from xlm_hf.modules.messages import did_you_mean

logger = logging.getLogger(__name__)

_BUDGETS = {"steps": "trainer.max_steps", "tokens": "budget.tokens", "seconds": "budget.seconds"}
# Of a run as such, not of its quality.
_COSTS = ("parameters", "steps", "tokens", "seconds")
_NOT_IN_TABLE = ("/samples", "/seconds", "_standard_error")
# How much of the output of a run that fails is shown.
_LAST_LINES = 8


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
    arguments: tuple[str, ...]
    sweep: dict[str, list[str]]


def run(cfg: DictConfig) -> None:
    """Run what is missing of the comparison, and write `results.csv`, `results.md` and the plots.

    Raises:
        ValueError: before anything runs, if a cell's config is mistaken or differs from the one that its folder was run
            with; at the end, if a cell failed, the others having run.
    """
    if "families" not in cfg:
        raise ValueError("This config names no families to compare: use --config-name compare or one made from it.")
    output_dir = run_directory(cfg)
    options = plain(cfg)
    cells = plan(options, output_dir)
    for cell in cells:
        check_unchanged(cell)
    launcher = options["launcher"] or [sys.executable]
    say(f"{len(cells)} runs, {sum(_metrics(cell.folder) is not None for cell in cells)} of them done; {output_dir}")
    with ThreadPoolExecutor(cfg.parallel) as pool:
        failures = [name for names in pool.map(lambda cell: run_cell(cell, launcher), cells) for name in names]
    write_comparison(cells, output_dir, options["quality"])
    if failures:
        raise ValueError(
            f"{len(failures)} of the runs failed ({', '.join(failures)}), their last lines are above: the same command "
            "tries them again and keeps the others."
        )


def plan(options: dict[str, Any], output_dir: Path) -> list[Cell]:
    """The cells of a comparison.

    Raises:
        ValueError: if there is not exactly one budget, nothing to compare, or a sweep of a family that is not there.
    """
    budget = {_BUDGETS[unit]: amount for unit, amount in options["budget"].items() if amount is not None}
    if len(budget) != 1:
        raise ValueError(
            f"A comparison has exactly one budget of {', '.join(_BUDGETS)}, and this one has {len(budget)}."
        )
    families, tasks = _with_options(options["families"]), _with_options(options["tasks"])
    for name, entries in {"families": families, "tasks": tasks, "seeds": options["seeds"]}.items():
        if not entries:
            raise ValueError(f"There is nothing to compare: {name} is empty.")
    for family in options["nfe_sweep"]:
        if family not in families:
            raise ValueError(f"nfe_sweep names {family!r}: {did_you_mean(str(family), list(families))}")
    shared = [*_search_path(), f"size={HydraConfig.get().runtime.choices['size']}", *options["overrides"]]
    cells = []
    for task, task_options in tasks.items():
        for family, family_options in families.items():
            # A named experiment brings its family.
            named = any(option.startswith(("family=", "--config-name=")) for option in family_options)
            ours = [*family_options, *([] if named else [f"family={family}"])]
            theirs = [*task_options, *([] if any(o.startswith("task=") for o in task_options) else [f"task={task}"])]
            limit = [f"{name}={amount}" for name, amount in budget.items()]
            for seed in options["seeds"]:
                name = f"{family}_{task}_{seed}"
                identity = [f"seed={seed}", f"experiment={family}_{task}"]
                sweep = {_file_name(point): point for point in map(_as_list, options["nfe_sweep"].get(family, []))}
                arguments = [*shared, *ours, *theirs, *_passed_on(), *limit, *identity]
                # Options such as --config-name cannot stand among the overrides.
                arguments = sorted(arguments, key=lambda argument: not argument.startswith("--"))
                cells.append(Cell(family, task, seed, output_dir / name, tuple(arguments), sweep))
    return cells


def _with_options(entries: Mapping[str, list[str] | None] | Sequence[str] | None) -> dict[str, list[str]]:
    if isinstance(entries, Mapping):
        return {str(name): options or [] for name, options in entries.items()}
    return {str(name): [] for name in entries or []}


def _as_list(entry: str | list[str]) -> list[str]:
    return [entry] if isinstance(entry, str) else entry


def _file_name(options: list[str]) -> str:
    return re.sub(r"[^\w.=-]+", "_", ",".join(option.removeprefix("generation.") for option in options))


def _search_path() -> list[str]:
    """The folders of configs that this command line added, as an override for the runs."""
    sources = HydraConfig.get().runtime.config_sources
    added = [f"{it.schema}://{it.path}" for it in sources if "command" in it.provider or "searchpath" in it.provider]
    return [f"hydra.searchpath=[{','.join(added)}]"] if added else []


def _passed_on() -> list[str]:
    """The options of this command line that are those of the runs."""
    return [override for override in HydraConfig.get().overrides.task if is_open(override.removeprefix("++"))]


def composed(cell: Cell) -> DictConfig:
    """The config of a cell's run, by which a mistake in it is found before anything runs."""
    prefix = "--config-name="
    named = [argument.removeprefix(prefix) for argument in cell.arguments if argument.startswith(prefix)]
    overrides = [open_override(argument) for argument in cell.arguments if not argument.startswith(prefix)]
    return hydra.compose(named[-1] if named else "config", overrides)


def check_unchanged(cell: Cell) -> None:
    """Raise ValueError if the cell's folder holds a run of another config."""
    wanted = _flat(plain(composed(cell)))
    file = cell.folder / "config.yaml"
    found = _flat(plain(OmegaConf.load(file))) if file.exists() else wanted
    # Where it lies may change. An option that is not set is as good as one that is not there.
    for name in sorted((found.keys() | wanted.keys()) - {"output_dir"}):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{cell.folder} was run with {name}={found.get(name)} and not {wanted.get(name)}: choose another "
                "output_dir, or remove that folder to run it anew."
            )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    leaves = [_flat(value, f"{prefix}.{name}" if prefix else str(name)).items() for name, value in node.items()]
    return {name: value for items in leaves for name, value in items}


def run_cell(cell: Cell, launcher: list[str]) -> list[str]:
    """Train a cell and evaluate the points of its sweep, all that is missing; the names of what failed."""
    arguments = list(cell.arguments)
    if not _finish(cell.folder, [*arguments, "job=train"], launcher):
        return [cell.folder.name]
    trained = [*arguments, "job=evaluate", f"checkpoint='{cell.folder / 'model'}'"]
    points = {name: cell.folder / "nfe" / name for name in cell.sweep}
    return [
        f"{cell.folder.name}/{name}"
        for name, folder in points.items()
        if not _finish(folder, [*trained, *cell.sweep[name]], launcher)
    ]


def _finish(folder: Path, arguments: list[str], launcher: list[str]) -> bool:
    """Run a command in a process of its own unless its metrics are there; whether they are then."""
    if _metrics(folder) is not None:
        return True
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "console.log"
    command = [*launcher, sys.argv[0], *arguments, f"output_dir='{folder}'"]
    with log.open("w") as console:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT).returncode
    if status == 0:
        say(f"{folder}: done")
        return True
    lines = log.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
    say("\n    ".join([f"{folder}: failed with exit status {status}", *lines]))
    return False


def _metrics(folder: Path) -> dict[str, float] | None:
    file = folder / "metrics.json"
    return json.loads(file.read_text()) if file.exists() else None


def write_comparison(cells: list[Cell], output_dir: Path, quality: list[str]) -> None:
    """Write the tables and plots of the cells that are done."""
    done = [cell for cell in cells if _metrics(cell.folder) is not None]
    if not done:
        return
    rows = [_row(cell, _metrics(cell.folder)) for cell in done]
    write_csv(output_dir / "results.csv", rows)
    points = [
        {**_row(cell, _metrics(cell.folder / "nfe" / name)), "options": name} if name else {**row, "options": "-"}
        for cell, row in zip(done, rows, strict=True)
        for name in cell.sweep or [""]
        if not name or _metrics(cell.folder / "nfe" / name) is not None
    ]
    measured = {name for row in rows for name in row if "/" in name and not name.endswith(_NOT_IN_TABLE)}
    ordered = sorted(measured, key=lambda name: (name.split("/")[-1] not in [*quality, "nfe"], name))
    text = f"# Comparison\n\nMean ± standard deviation over seeds.\n\n{_table(rows, ['family'], [*ordered, *_COSTS])}"
    written = ["results.csv", "results.md"]
    if any(cell.sweep for cell in done):
        write_csv(output_dir / "results_nfe.csv", points)
        chosen = ["test/nfe", *(f"test/{metric}" for metric in quality)]
        text += f"\n# Forward passes\n\n{_table(points, ['family', 'options'], chosen)}"
        written.append("results_nfe.csv")
    write_text(output_dir / "results.md", text)
    drawings = {"quality_steps.png": (_step_curves(done, quality), "steps", False)}
    drawings["quality_nfe.png"] = (_nfe_curves(points, quality), "forward passes", True)
    for name, (panels, x_label, log_x) in drawings.items():
        if panels and plot(output_dir / name, panels, x_label, log_x):
            written.append(name)
    say(f"\n{text}\nWritten: {', '.join(str(output_dir / name) for name in written)}")


def _row(cell: Cell, metrics: dict[str, float] | None) -> dict[str, Any]:
    return {"family": cell.family, "task": cell.task, "seed": cell.seed, **(metrics or {})}


def _table(rows: list[dict[str, Any]], by: list[str], metrics: list[str]) -> str:
    return markdown_table(summary_rows(rows, by, "task", metrics))


def _step_curves(cells: list[Cell], quality: list[str]) -> dict[str, dict[str, list]]:
    """Panel, family, and at each step the validation metric of each seed, from the runs' newest checkpoints."""
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for cell in cells:
        for checkpoint in list_checkpoints(cell.folder)[-1:]:
            for log in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]:
                for metric in quality:
                    if f"validation/{metric}" in log:
                        title = f"{cell.task} validation/{metric}"
                        found[title][cell.family][log["step"]].append(log[f"validation/{metric}"])
    return {title: {name: sorted(c.items()) for name, c in curves.items()} for title, curves in found.items()}


def _nfe_curves(points: list[dict[str, Any]], quality: list[str]) -> dict[str, dict[str, list]]:
    """Panel, family, and for each point of its sweep the mean number of passes and the test metric of each seed."""
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for point in points:
        for metric in quality:
            if f"test/{metric}" in point and "test/nfe" in point:
                curves = found[f"{point['task']} test/{metric}"]
                curves[point["family"]][point["options"]].append((point["test/nfe"], point[f"test/{metric}"]))
    return {title: {name: _ordered(c) for name, c in curves.items()} for title, curves in found.items()}


def _ordered(seeds: Mapping[str, list[tuple[float, float]]]) -> list[tuple[float, list[float]]]:
    return sorted((sum(x for x, _ in pairs) / len(pairs), [y for _, y in pairs]) for pairs in seeds.values())

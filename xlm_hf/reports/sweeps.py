"""Hydra's --multirun: a folder for each run, named from what is swept, and one table of all runs at the end."""

import hashlib
import json
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from xlm_hf.overrides import quoted
from xlm_hf.reports.comparison import NOT_IN_TABLE, markdown_table, number, write_tables

# Beside the metrics of a run that failed there are none: one sentence with its cause.
ERROR_FILE = "error.txt"


def run_name(overrides: str) -> str:
    """A folder's name from `++trainer.learning_rate=0.1,seed=0`: `trainer.learning_rate-0.1_seed-0`.

    A name that is long, or leaves characters out by which two runs may differ, ends in a hash of the overrides.
    """
    plain = overrides.replace("++", "").replace("=", "-")
    name = re.sub(r"[^\w.-]+", "_", plain, flags=re.ASCII)
    if len(name) > 100 or re.search(r"[^\w.,'\[\]-]", plain, re.ASCII):
        return f"{name[:100]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
    return name or "run"


OmegaConf.register_new_resolver("run_name", run_name, replace=True)


class SweepSummary(Callback):
    """Names the folders of a sweep, and writes `sweep.csv` and `sweep.md` from its runs' `metrics.json`."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Put the sweep in `output_dir`, or `outputs/<config>/<time>_sweep`, each run named by the swept options alone.

        The same `output_dir` again resumes each run that is not finished.
        """
        time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = config.output_dir or f"outputs/{kwargs['config_name']}/{time}_sweep"
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        constant = ",".join(f"'{override.key_or_group}'" for override in parsed if not override.is_sweep_override())
        for file in Path(folder).glob(f"*/{ERROR_FILE}"):
            file.unlink()
        with read_write(config):
            config.hydra.sweep.dir = folder
            # The configs of the runs are composed anew, from these.
            config.hydra.overrides.hydra += [
                f"hydra.sweep.dir={quoted(str(folder))}",
                f"hydra.job.config.override_dirname.exclude_keys=[{constant}]",
            ]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Close what a tracker holds open, which would take the next run for the same one."""
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and print the table; exit with status 1 if a run failed."""
        folder = Path(config.hydra.sweep.dir)
        found = {file.parent.name: json.loads(file.read_text()) for file in sorted(folder.glob("*/metrics.json"))}
        if found:
            runs = pd.DataFrame([{"run": name, **metrics} for name, metrics in found.items()])
            shown = runs[[name for name in runs if not name.endswith(NOT_IN_TABLE)]]
            table = markdown_table(shown.map(lambda value: value if isinstance(value, str) else number(value)))
            write_tables(folder, "sweep", runs, table)
            print(f"\n{table}\nWritten: {folder / 'sweep.csv'}, {folder / 'sweep.md'}", flush=True)
        if failed := sorted(file.parent.name for file in folder.glob(f"*/{ERROR_FILE}")):
            sys.exit(f"Error: {len(failed)} runs of the sweep failed ({', '.join(failed)}): the cause is above.")

"""The application behind `examples/run_xlm.py` and `xlm-hf`: compose a config, run a job, fail in one sentence."""

import importlib
import logging
import os
import pkgutil
import re
import sys
import traceback

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import xlm_hf.commands
from xlm_hf.commands.common import closest

# Nodes whose keys are those of an object; what the YAML does not list may be given all the same, and is checked when
# the object is built.
_OPEN_NODES = ("trainer", "model", "generation", "task", "loss")
_NOT_JOBS = ("common",)
_TRACEBACK = "XLM_HF_TRACEBACK"


def main() -> None:
    """Run the command line; a mistake ends in one sentence and exit status 1."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("xlm_hf").setLevel(logging.INFO)
    # Hydra then raises instead of printing errors of its own.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = [open_override(argument) for argument in sys.argv[1:]]
    try:
        hydra.main(version_base="1.3", config_path="pkg://xlm_hf.configs", config_name="config")(run_job)()
    except (ValueError, TypeError, OSError, HydraException, OmegaConfBaseException) as error:
        logging.getLogger("xlm_hf").debug(traceback.format_exc())
        if os.environ.get(_TRACEBACK):
            raise
        sys.exit(f"Error: {explain(error)}")


def run_job(cfg: DictConfig) -> None:
    """Run the job that the config names."""
    cfg.experiment = cfg.experiment or HydraConfig.get().job.config_name
    jobs = [module.name for module in pkgutil.iter_modules(xlm_hf.commands.__path__) if module.name not in _NOT_JOBS]
    if cfg.job not in jobs:
        raise ValueError(f"There is no job {cfg.job!r}: {closest(cfg.job, jobs)}")
    importlib.import_module(f"xlm_hf.commands.{cfg.job}").run(cfg)


def open_override(argument: str) -> str:
    """Let `trainer.NAME=value` and its like set what the YAML does not list, as Hydra's `++` does."""
    return f"++{argument}" if re.match(rf"({'|'.join(_OPEN_NODES)})\.[\w.]+=", argument) else argument


def explain(error: BaseException) -> str:
    """One sentence for a person: the cause, and for a name that is not known the closest one that is."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        missing = str(error.missing_cfg_file)
        if "/" in missing and error.options:
            group, name = missing.rsplit("/", 1)
            return f"There is no {group} {name!r}: {closest(name, list(error.options))}"
        return f"There is no config {missing!r}: {closest(missing, _experiments())}"
    if isinstance(error, ConfigCompositionException):
        cause = error.__cause__ or error
        match = re.search(r"Key '([^']+)' is not in struct", str(cause))
        if match:
            known = re.findall(r"\w+", str((getattr(cause, "parent_node", None) and list(cause.parent_node)) or ""))
            return f"There is no option {match[1]!r}: {closest(match[1], known)}"
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _experiments() -> list[str]:
    from importlib.resources import files

    return [
        file.name.removesuffix(".yaml") for file in files("xlm_hf.configs").iterdir() if file.name.endswith(".yaml")
    ]

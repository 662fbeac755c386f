"""The application behind `examples/run_xlm.py` and `xlm-hf`: compose a config, run a job, fail in one sentence."""

import contextlib
import importlib
import inspect
import logging
import os
import pkgutil
import re
import signal
import sys
import traceback
from collections.abc import Collection, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import datasets
import hydra
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import xlm_hf.commands
from xlm_hf.building import check_config, plain
from xlm_hf.commands._run import remove_if_empty
from xlm_hf.families import families
from xlm_hf.files import write_text
from xlm_hf.metrics import shipped_metrics
from xlm_hf.modules.checked_options import Count, Interval, PositiveInt, check_value
from xlm_hf.modules.messages import did_you_mean, import_target
from xlm_hf.overrides import open_override
from xlm_hf.reports.sweeps import ERROR_FILE
from xlm_hf.saved_configs import load_config, translate_config
from xlm_hf.tasks import Task
from xlm_hf.training.checkpoints import resolve_checkpoint
from xlm_hf.training.debugging import apply_debug_options
from xlm_hf.training.finite_guard import NotFiniteError
from xlm_hf.training.signals import TrainingStopped, end_with_parent

# Commands with arguments of their own, `xlm-hf NAME ...`, beside the jobs of a config.
_TOOLS = ("scaffold", "convert")
_USAGE = (ValueError, HydraException, OmegaConfBaseException, StrictDataclassError)
_FAILURES = (OSError, NotFiniteError)
# Options of the config itself, where it has them; those of its nodes are checked by the objects that they make.
_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("output_dir", "checkpoint", "init_from", "experiment", "prompts", "eval_model"), str | None),
    **dict.fromkeys(("ema", "trust_remote_code", "exist_ok"), bool),
    **dict.fromkeys(("logger", "overrides", "quality"), list[str]),
    **dict.fromkeys(("families", "tasks"), dict | list[str] | None),
    **dict.fromkeys(("num_samples", "parallel"), PositiveInt),
    **dict.fromkeys(("model", "loss", "collator", "train_collator", "generation", "trainer", "task"), dict),
    **dict.fromkeys(("budget", "early_stopping", "nfe_sweep"), dict),
    **{"job": str, "launcher": list[str] | None, "seed": Count},
    **{
        "num_threads": Annotated[int, Interval("[1, 1024]")] | None,
        "seeds": Annotated[list[int], Interval("[0, inf)")],
    },
}


def main() -> None:
    """Run the command line; a mistake ends in one sentence, one of usage with exit status 2 and a failure with 1."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("xlm_hf").setLevel(logging.INFO)
    # What cannot be logged, e.g. on a full disk, is no reason for a traceback.
    logging.raiseExceptions = False
    end_with_parent()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if sys.argv[1:2] and sys.argv[1] in _TOOLS:
        with _one_sentence():
            return importlib.import_module(f"xlm_hf.commands.{sys.argv[1]}").main(sys.argv[2:])
    # Hydra then raises instead of printing errors of its own.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    is_sweep = not {"-m", "--multirun"}.isdisjoint(sys.argv)
    sys.argv[1:] = [open_override(argument, is_sweep) for argument in sys.argv[1:]]
    with _one_sentence():
        if saved := saved_config(sys.argv[1:]):
            _run(saved)
        else:
            hydra.main(version_base="1.3", config_path="pkg://xlm_hf.configs", config_name="config")(run_job)()
    if torch.distributed.is_initialized():
        # Its threads, if they outlive the interpreter, can end a process that has done its work by an abort.
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn a mistake into one sentence; XLM_HF_TRACEBACK=1 shows where it came from."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads the output has seen enough, and nothing more can be flushed there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (*_USAGE, *_FAILURES) as error:
        if os.environ.get("XLM_HF_TRACEBACK"):
            raise
        print(f"Error: {explain(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, _FAILURES) and not isinstance(error, HydraException) else 2)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        # As the shell reports a process that died of the signal.
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command with the same output_dir goes on with what was saved.")


def saved_config(arguments: list[str]) -> DictConfig | None:
    """The config of the run whose checkpoint a job shall read, with the arguments over it.

    Returns:
        None if the arguments name a config of their own, or nothing but a config says what the job is about.

    Raises:
        ValueError: if the config names code that no installed family brings, since it may come from elsewhere.
    """
    if any(argument.startswith("-") for argument in arguments):
        return None
    parsed = OverridesParser.create().parse_overrides(arguments)
    given = {override.key_or_group: override for override in parsed}
    if not {"job", "checkpoint"} <= given.keys() or {"family", "task", "size"} & given.keys():
        return None
    checkpoint = Path(str(given["checkpoint"].value())).expanduser()
    file = next((it for it in (checkpoint / "config.yaml", checkpoint.parent / "config.yaml") if it.exists()), None)
    if file is None or given["job"].value() == "train":
        # A name that is mistaken has no config either.
        resolve_checkpoint(str(given["checkpoint"].value()))
        return None
    base: Any = OmegaConf.load(str(files("xlm_hf.configs") / "config.yaml"))
    here = OmegaConf.masked_copy(base, ["output_dir", "prompts", "num_samples", "exist_ok", "trust_remote_code"])
    del base["hydra"], base["defaults"]
    config: Any = OmegaConf.merge(base, load_config(file), here)
    packages = {"xlm_hf", *(family.config_class.__module__.split(".")[0] for family in families().values())}
    for name in _code_named(plain(config)):
        if not _is_installed(name, packages):
            raise ValueError(f"{file} names {name}, code of no installed family: add --config-name, or family=, task=.")
    # What is read goes nowhere else.
    config.trainer.pop("push_to_hub", None)
    OmegaConf.set_struct(config, True)
    for name, override in given.items():
        OmegaConf.update(config, name, override.value(), force_add=override.is_force_add() or override.is_add())
    return config


def _code_named(node: Any, key: str = "") -> Iterator[str]:
    """What a config makes objects of, or calls: each `_target_`, metrics that are not shipped, functions for data."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _code_named(value, key if (key, name) == ("metrics", "name") else name)
    elif isinstance(node, list):
        for value in node:
            yield from _code_named(value, key)
    elif isinstance(node, str):
        is_function = key == "path" and ":" in node and not Path(node).expanduser().exists()
        if key == "_target_" or is_function or (key == "metrics" and node not in shipped_metrics()):
            yield node


def _is_installed(name: str, packages: Collection[str]) -> bool:
    """Whether a name is that of a class, or of a function that makes a task, which a package defines itself."""
    if name.split(".")[0] not in packages or ":" in name:
        return False
    # What a package imports has a name in it too.
    found = import_target("code", name)
    makes_tasks = inspect.isfunction(found) and inspect.signature(found).return_annotation in (Task, "Task")
    return (inspect.isclass(found) or makes_tasks) and found.__module__.split(".")[0] in packages


def run_job(cfg: DictConfig) -> None:
    """Run the job that the config names, alone or as one of a sweep."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _run_of_a_sweep(cfg)
    else:
        # Within Hydra, which otherwise reports a failing job in words of its own.
        with _one_sentence():
            _run(cfg)


def _run_of_a_sweep(cfg: DictConfig) -> None:
    """Run in the sweep's folder for it; a mistake is said there and here, and leaves the other runs alone."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    cfg.output_dir = str(folder)
    try:
        _run(cfg)
    except Exception as error:
        if os.environ.get("XLM_HF_TRACEBACK") or not isinstance(error, (*_USAGE, *_FAILURES)):
            traceback.print_exc()
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ERROR_FILE, f"{explain(error)}\n")
        print(f"Error: {folder.name}: {explain(error)}", file=sys.stderr)


def _check_options(cfg: DictConfig) -> None:
    """Raise ValueError for an option of no group that is not what it must be."""
    for option, kind in _OPTIONS.items():
        if option in cfg:
            check_value(option, cfg[option], kind)
            if cfg[option] == "":
                raise ValueError(f"{option} is empty: give it a value, or leave it out.")


def _run(cfg: DictConfig) -> None:
    _check_options(cfg)
    translate_config(cfg)
    if HydraConfig.initialized():
        name = HydraConfig.get().job.config_name
        cfg.experiment = cfg.experiment or (f"{cfg.family}_{cfg.task.name}" if name == "config" else name)
        if "debug" in cfg:
            apply_debug_options(cfg, HydraConfig.get().overrides.task)
    if cfg.experiment and (Path(cfg.experiment).is_absolute() or ".." in Path(cfg.experiment).parts):
        raise ValueError(f"experiment must be a name and is {cfg.experiment!r}: output_dir says where a run is.")
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    names = (module.name for module in pkgutil.iter_modules(xlm_hf.commands.__path__))
    jobs = sorted(name for name in names if name not in _TOOLS and not name.startswith("_"))
    if cfg.job not in jobs:
        raise ValueError(f"There is no job {cfg.job!r}: {did_you_mean(cfg.job, jobs)}")
    try:
        if "families" not in cfg:
            check_config(cfg)
        importlib.import_module(f"xlm_hf.commands.{cfg.job}").run(cfg)
    except (*_USAGE, *_FAILURES):
        if cfg.output_dir is not None:
            remove_if_empty(cfg.output_dir)
        raise


def experiments() -> list[str]:
    """The names that `--config-name` takes: those of files, and those of the published recipes."""
    own = [file.name for file in files("xlm_hf.configs").iterdir() if file.name.endswith(".yaml")]
    recipes = [f"paper/{name}" for name in ConfigStore.instance().list("paper")]
    return sorted(name.removesuffix(".yaml") for name in [*own, *recipes] if name != "config.yaml")


def explain(error: BaseException) -> str:
    """One sentence for a person: the cause, and for a name that is not known the closest one that is."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        missing = str(error.missing_cfg_file)
        if error.options:
            group, name = missing.rsplit("/", 1)
            return f"There is no {group} {name!r}: {did_you_mean(name, list(error.options))}"
        return f"There is no config {missing!r}: {did_you_mean(missing, experiments())}"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None and cause.key is not None:
        known = [str(key) for key in cause.parent_node if key != "hydra"]
        return f"There is no option {cause.full_key!r}: {did_you_mean(str(cause.key), known)}"
    if unset := re.match(r"You must specify '(\w+)'.*Available options:\s+(.*)", str(error), re.DOTALL):
        return f"The config leaves {unset[1]!r} open: add {unset[1]}=NAME, one of {', '.join(unset[2].split())}."
    shown = cause if isinstance(error, HydraException) else error
    return " ".join(str(shown).split()) or type(shown).__name__

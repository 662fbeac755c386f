"""Configs as Hydra composes them, and overrides as a person writes them, in the form in which Hydra takes them."""

import re
from collections.abc import Iterable

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.version import VersionBase
from omegaconf import DictConfig

from xlm_hf.saved_configs import translate_config, translate_override

# Nodes whose keys are those of an object: what the YAML does not list may be given all the same, and is checked when
# the object is built.
_OPEN_NODES = ("trainer", "model", "generation", "task", "loss", "collator", "train_collator")
# Options whose value is a text whatever it looks like, such as a folder called 2026_11_30 or a#b.
_TEXTS = r"\+*(output_dir|checkpoint|init_from|prompts|experiment|eval_model|task\.(path|test_path|cache_dir))"
# What Hydra takes as it is: quoted, interpolated, a list, nothing, and names that are no number and no word of YAML.
_AS_IT_IS = r"(?!(?i:true|false|null|nan|inf)$)[A-Za-z_/.][\w/.-]*(?<![.])|null|'.*'|\".*\"|.*\$\{.*|\[.*\]|\?\?\?|"


def compose(config_name: str = "config", overrides: Iterable[str] = ()) -> DictConfig:
    """Compose a config as the command line does, e.g. `compose("config", ["family=NAME", "task=text"])`.

    It works anywhere, in a notebook and within another Hydra application: Hydra's global state stays as it was.
    """
    state = Singleton._instances
    kept: tuple[type, ...] = (GlobalHydra, VersionBase)
    outer = {cls: state.pop(cls) for cls in kept if cls in state}
    try:
        with hydra.initialize_config_module("xlm_hf.configs", version_base="1.3"):
            return translate_config(hydra.compose(config_name, [open_override(override) for override in overrides]))
    finally:
        state.update(outer)


def open_override(argument: str, is_sweep: bool = False) -> str:
    """Let `trainer.NAME=value` and its like set what the YAML does not list, as Hydra's `++` does.

    An option that was renamed gets the name of today. A path is quoted if Hydra would take it for something else; in a
    sweep what looks like several values stays as it is.
    """
    argument = translate_override(argument)
    name, _, value = argument.partition("=")
    is_several = is_sweep and re.search(r",|\w\(", value)
    if re.fullmatch(_TEXTS, name) and not is_several and not re.fullmatch(_AS_IT_IS, value, re.DOTALL | re.ASCII):
        argument = f"{name}={quoted(value)}"
    is_opened = is_open(argument) or argument.startswith(("families.", "tasks.", "nfe_sweep."))
    return f"++{argument}" if is_opened else argument


def quoted(value: str) -> str:
    """A text as Hydra reads it back, whatever it holds."""
    # Backslashes count as such before a quote alone, and at the end, where one closes the text.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), value) + "'"


def is_open(override: str) -> bool:
    """Whether an override sets an option of one of the objects of a run."""
    return re.match(rf"({'|'.join(_OPEN_NODES)})\.[\w.]+=", override) is not None

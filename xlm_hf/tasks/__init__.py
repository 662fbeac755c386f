"""Tasks: datasets with all that is needed to train and score on them, built from a name or a mapping."""

import importlib.resources
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast

from xlm_hf.data import Mixture
from xlm_hf.modules.checked_options import check_arguments
from xlm_hf.modules.messages import did_you_mean, import_target
from xlm_hf.overrides import compose

_Target = TypeVar("_Target", bound=Callable[..., Any])

_COLUMNS = {"lm": ("example_id",), "seq2seq": ("example_id", "prompt_ids", "target_ids"), "infill": ("example_id",)}

# What a task's config says to the evaluation and the generation; arguments of its target only where it takes them.
_FOR_OTHERS = ("evaluation", "metrics", "num_samples", "max_new_tokens", "do_sample")


@dataclass
class Task:
    """A dataset with all that is needed to train and score on it.

    Attributes:
        name: used in messages and in the names of files.
        kind: "lm", "seq2seq" or "infill"; it decides which collators fit.
        splits: every split has the column `example_id` (int64, unique in its split) and, for seq2seq, `prompt_ids` and
            `target_ids` (lists of int32). Further columns are allowed and are written into prediction files. `train`
            may be a stream or a `Mixture`.
        tokenizer: turns the ids of the splits back into text.
        files: the local files that the splits were read from, by split, and those of a folder that were not used.

    Raises:
        ValueError: if the kind is unknown or a split lacks a column that the kind needs.
    """

    name: str
    kind: str
    splits: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerFast
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in _COLUMNS:
            raise ValueError(f"unknown kind {self.kind!r} of task {self.name!r}: {did_you_mean(self.kind, _COLUMNS)}")
        for split, data in self.splits.items():
            for dataset in data.sets if isinstance(data, Mixture) else [data]:
                # A stream may not know its columns before it is read.
                columns = dataset.column_names or list(next(iter(dataset), {}))
                for column in _COLUMNS[self.kind]:
                    if column not in columns:
                        raise ValueError(
                            f"split {split!r} of the {self.kind} task {self.name!r} lacks the column {column!r} "
                            f"(it has {', '.join(columns)}): add it."
                        )


def for_families(*names: str) -> Callable[[_Target], _Target]:
    """Mark keys of a task's config that the configs of families read, and that are no arguments of its target."""

    def marked(target: _Target) -> _Target:
        target.for_families = names  # type: ignore[attr-defined]
        return target

    return marked


def load_task(task: str | Mapping[str, Any], /, **overrides: Any) -> Task:
    """Build a task.

    Args:
        task: the name of a shipped config (`xlm_hf/configs/task/<name>.yaml`), or a mapping whose `_target_` is the
            dotted name of any callable that returns a `Task` and whose other keys are its arguments.
        overrides: arguments that replace those of the config.

    Raises:
        ValueError: for an unknown name, a target that cannot be imported, or an argument that the target does not take
            or lacks: before any work. Later, for whatever the target itself refuses.
    """
    options = task_options(task, **overrides)
    # The target is called outside of Hydra, which would wrap its one-sentence errors in an exception of its own.
    result = instantiate(options, _convert_="all", _partial_=True)()
    if not isinstance(result, Task):
        raise ValueError(f"{options['_target_']} returned a {type(result).__name__}: a task target must return a Task.")
    return result


def task_options(task: str | Mapping[str, Any], /, **overrides: Any) -> dict[str, Any]:
    """The options with which `load_task` calls a task's target, and that target, checked before any work."""
    config = _shipped_config(task) if isinstance(task, str) else task
    if "_target_" not in config:
        raise ValueError(
            f"a task given as a mapping needs `_target_`, and this one has only the keys {sorted(config)}."
        )
    target = config["_target_"]
    function = import_target("task target", target)
    is_other = inspect.isbuiltin(function) or (inspect.isclass(function) and not issubclass(function, Task))
    if is_other or not callable(function):
        raise ValueError(f"the task target {target!r} is no function that returns a Task: name one.")
    ignored = {*_FOR_OTHERS, *getattr(function, "for_families", ())} - set(inspect.signature(function).parameters)
    options = {**_resolve(config, ignored), **overrides}
    given = {name: value for name, value in options.items() if not name.startswith("_")}
    check_arguments(f"Task {task if isinstance(task, str) else target!r}", given, function)
    return options


def _shipped_config(name: str) -> Mapping[str, Any]:
    files = [file.name for file in importlib.resources.files("xlm_hf.configs").joinpath("task").iterdir()]
    known = [file.removesuffix(".yaml") for file in files if file.endswith(".yaml") and not file.startswith("_")]
    if name not in known:
        raise ValueError(f"unknown task {name!r}: {did_you_mean(name, known)}")
    return compose(f"task/{name}").task


def _resolve(config: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """Arguments of a composed task as plain Python; those `ignored` or still missing (`???`) are left out."""
    node: Any = config if OmegaConf.is_config(config) else OmegaConf.create(dict(config), flags={"allow_objects": True})
    names = [name for name in node if name not in ignored and not OmegaConf.is_missing(node, name)]
    return {
        name: OmegaConf.to_container(node[name], resolve=True) if OmegaConf.is_config(node[name]) else node[name]
        for name in names
    }

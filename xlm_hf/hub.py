"""Self-contained repositories: register a family, and export its code, weights, tokenizer and model card.

Whatever saves a registered configuration - alone, with its model, by a trainer or to the Hub - also writes the Python
files that the model needs, so that the folder loads by `trust_remote_code=True` where this package is not installed.
"""

import ast
import copy
import inspect
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import transformers
from huggingface_hub import EvalResult, ModelCardData
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from xlm_hf.checkpoints import replaced_folder, write_text
from xlm_hf.modules.messages import did_you_mean

_MODULES = Path(__file__).resolve().parent / "modules"
# What an export rewrites and follows. The loader of transformers finds the files of a repository by the same pattern.
_FILE_IMPORT = re.compile(r"^([ \t]*)from[ \t]+(xlm_hf\.modules)?\.(\w+)[ \t]+import\b", re.MULTILINE)
_EXPORTED_SUFFIXES = {".json", ".safetensors", ".py", ".md", ".txt", ".jinja", ".model"}
_CARD_VARIABLES = {
    *("model_id", "parameters", "experiment", "task", "dataset", "steps"),
    *("seed", "config", "metrics", "protocol", "samples", "base_model"),
}


@dataclass(frozen=True)
class Family:
    """A registered family.

    Attributes:
        config_class: its configuration, which names the `model_type`.
        model_class: the model with its head.
        auto_classes: names of the Auto classes of transformers that give `model_class`.
        converters: what reads checkpoints of other projects, by the project's name (see `xlm_hf.convert_checkpoint`).
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    auto_classes: tuple[str, ...]
    converters: Mapping[str, Callable[..., tuple[dict[str, Any], dict[str, Any]]]] = field(default_factory=dict)


_FAMILIES: dict[str, Family] = {}


def families() -> dict[str, Family]:
    """All registered families by `model_type`, in the order of their registration."""
    return dict(_FAMILIES)


def register_family(
    config_class: type[PreTrainedConfig],
    model_class: type[PreTrainedModel],
    auto_classes: Sequence[str] = ("AutoModel",),
    converters: Mapping[str, Callable[..., tuple[dict[str, Any], dict[str, Any]]]] | None = None,
) -> None:
    """Make a family known to the Auto classes, and let everything that saves it export its code.

    Args:
        config_class: configuration with a `model_type` of its own.
        model_class: the model, in a file that imports only `.<file beside it>`, `xlm_hf.modules.<file>`, torch,
            transformers and the standard library.
        auto_classes: names of the Auto classes that shall give `model_class`.
        converters: for each project whose checkpoints can be imported, a function (weights, config) -> (options of
            `config_class`, weights of `model_class`).

    Raises:
        ValueError: if a class is defined in `__main__`, from where its code cannot be exported.
    """
    for cls in (config_class, model_class):
        if cls.__module__ == "__main__":
            raise ValueError(f"{cls.__name__} is defined in __main__: move it to a file of its own to export its code.")
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for name in auto_classes:
        getattr(transformers, name).register(config_class, model_class, exist_ok=True)
    # A model saves its config after it has noted what lies in the folder, so that an upload takes the code along.
    config_class.save_pretrained = _save_config_and_code  # type: ignore[method-assign]
    config_class._get_files_timestamps = _timestamps_without_code  # type: ignore[method-assign]
    model_class._upload_modified_files = _upload_with_card  # type: ignore[method-assign, assignment]
    _FAMILIES[config_class.model_type] = Family(config_class, model_class, tuple(auto_classes), converters or {})


def _save_config_and_code(self, save_directory, push_to_hub=False, **kwargs):
    """Save as transformers does, with the code beside the configuration and `auto_map` naming its classes."""
    family = _FAMILIES.get(self.model_type)
    # The config in memory stays as it is.
    saved = copy.deepcopy(self)
    if "use_cache" not in {option.name for option in fields(saved)}:
        # `Trainer` sets it on the config of every model.
        vars(saved).pop("use_cache", None)
    if family is not None and self.architectures in (None, [family.model_class.__name__]):
        export_code(family, save_directory)
        classes = {"AutoConfig": family.config_class, **dict.fromkeys(family.auto_classes, family.model_class)}
        saved.auto_map = {name: f"{_source_file(cls).stem}.{cls.__name__}" for name, cls in classes.items()}
    else:
        vars(saved).pop("auto_map", None)
        warnings.warn(
            f"{save_directory} is saved without code because {' '.join(self.architectures or [self.model_type])} is "
            "not registered: call xlm_hf.register_family to export it.",
            stacklevel=2,
        )
    PreTrainedConfig.save_pretrained(saved, save_directory, push_to_hub=push_to_hub, **kwargs)


def _upload_with_card(self, working_dir, repo_id, files_timestamps, **kwargs):
    """Upload as transformers does, with the family's card in place of the empty one; a written one stays."""
    card = Path(working_dir) / "README.md"
    if "This model card has been automatically generated." in card.read_text(encoding="utf-8"):
        variables = {"model_id": repo_id, "parameters": self.num_parameters()}
        card.write_text(render_card(_FAMILIES[self.config.model_type], variables), encoding="utf-8")
    return PreTrainedModel._upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs)


def _timestamps_without_code(self, working_dir):
    """Leave the code, which is just written, out of what `save_pretrained(push_to_hub=True)` takes for uploaded."""
    code = family_code(_FAMILIES[self.model_type]) if self.model_type in _FAMILIES else {}
    timestamps = PreTrainedConfig._get_files_timestamps(self, working_dir)
    return {name: time for name, time in timestamps.items() if name not in code}


def export_code(family: Family, directory: str | os.PathLike) -> None:
    """Write the Python files of `family` (see `family_code`) into `directory`, each of them complete or not at all."""
    directory = Path(directory)
    code = family_code(family)
    directory.mkdir(parents=True, exist_ok=True)
    for name, source in code.items():
        write_text(directory / name, source)


def family_code(family: Family) -> dict[str, str]:
    """Collect the files that a family needs where this package is not installed.

    Starts from the files of the two classes and follows their imports, function-local ones included, to files beside
    them and in `xlm_hf.modules`; the latter imports are made relative.

    Returns:
        file name -> source; the names are flat.

    Raises:
        ValueError: if a file imports something that an export cannot carry, or two files have one name.
    """
    pending = [_source_file(family.config_class), _source_file(family.model_class)]
    paths: dict[str, Path] = {}
    code: dict[str, str] = {}
    while pending:
        path = pending.pop()
        if paths.setdefault(path.name, path) != path:
            raise ValueError(f"{paths[path.name]} and {path} would be exported under one name: rename one of them.")
        if path.name not in code:
            code[path.name], imported = _flatten(path)
            pending += imported
    return code


def _source_file(cls: type) -> Path:
    return Path(str(sys.modules[cls.__module__].__file__)).resolve()


def _flatten(path: Path) -> tuple[str, list[Path]]:
    """Source of `path` with all its imports of neighbours relative, and the files that it imports."""
    source = path.read_text(encoding="utf-8")
    imported = [
        (_MODULES if in_modules else path.parent) / f"{name}.py" for _, in_modules, name in _FILE_IMPORT.findall(source)
    ]
    for file in imported:
        if not file.is_file():
            raise ValueError(f"{path} imports from {file}, which is no file: an export is flat.")
    flat = _FILE_IMPORT.sub(r"\1from .\3 import", source)
    for node in ast.walk(ast.parse(flat)):
        if not _is_portable(node, {file.stem for file in imported}):
            raise ValueError(
                f"{path} says {ast.unparse(node)!r}, which an export cannot carry: write `from .<file> import ...` or "
                "`from xlm_hf.modules.<file> import ...`, and nothing else of this package."
            )
    return flat, imported


def _is_portable(node: ast.AST, files: set[str]) -> bool:
    if isinstance(node, ast.Import):
        return all(alias.name.split(".")[0] != "xlm_hf" for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return str(node.module).split(".")[0] != "xlm_hf"
    return not isinstance(node, ast.ImportFrom) or (node.level == 1 and node.module in files)


def export_model(
    model: PreTrainedModel, tokenizer: Any, directory: str | os.PathLike, card_variables: dict[str, Any] | None = None
) -> Path:
    """Write a folder that is ready for the Hub: weights, configurations, tokenizer, code and model card.

    It is written beside `directory` - new, empty, or an earlier export - and takes its place once it is complete. For
    `card_variables` see `render_card`; `model_id` is by default the name of the folder. Returns the path of the folder.

    Raises:
        ValueError: if the model's family is not registered, or `directory` holds something other than an export.
        OSError: if the folder cannot be written; what `directory` held before is intact.
    """
    # Here, because `import xlm_hf` needs this file and not that one.
    from xlm_hf.backbones import merged

    target = Path(directory).resolve()
    model_type = model.config.model_type
    if model_type not in _FAMILIES:
        raise ValueError(f"{model_type!r} is not a registered family: call xlm_hf.register_family before exporting it.")
    _check_replaceable(target)
    variables = {"model_id": target.name, "parameters": model.num_parameters(), **(card_variables or {})}
    with replaced_folder(target) as staging:
        merged(model).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(render_card(_FAMILIES[model_type], variables), encoding="utf-8")
    return Path(directory)


def _check_replaceable(target: Path) -> None:
    """Raise ValueError unless replacing `target` loses nothing but an earlier export."""
    entries = sorted(target.iterdir()) if target.exists() else []
    foreign = [entry.name for entry in entries if entry.is_dir() or entry.suffix not in _EXPORTED_SUFFIXES]
    names = {entry.name for entry in entries}
    if foreign or (names and not {"config.json", "README.md"} <= names):
        what = f"{foreign[0]!r}" if foreign else "files but no exported model"
        raise ValueError(f"{target} holds {what}, which an export would delete: name a new or an empty folder.")


def render_card(family: Family, variables: dict[str, Any]) -> str:
    """Fill the model card of a family: `hub_card.md` beside its configuration, or else its own in `hub_cards/`.

    Args:
        family: a registered family.
        variables: what is missing leaves its section out.
            model_id (str): repository or folder that the example loads.
            parameters (int): size of the model.
            experiment, task, dataset (str), steps (int), seed (int or list), config (str): the recipe, `config` being
                the composed config as YAML.
            metrics (dict): the flat object of metrics.json: `<set>/<metric>`, its `<set>/<metric>_standard_error` where
                there is one, and `<set>/samples`.
            protocol (str): how the metrics were measured.
            base_model (str): folder or Hub id of what the weights were taken from, whose licence then holds.
            samples (list of dict): decodes, each a `prediction`, and a `prompt` and `reference` where it has them.

    Returns:
        Markdown with a YAML header.

    Raises:
        ValueError: for a variable that does not exist.
    """
    if unknown := sorted(variables.keys() - _CARD_VARIABLES):
        raise ValueError(f"A model card has no variable {unknown[0]!r}: {did_you_mean(unknown[0], _CARD_VARIABLES)}")
    model_type = family.config_class.model_type
    results = _eval_results(variables.get("task", model_type), variables.get("metrics", {}))
    origin = variables.get("base_model")
    if is_folder := origin is not None and Path(origin).exists():
        variables = {**variables, "base_model": Path(origin).name}
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=None if origin else "apache-2.0",
        base_model=None if is_folder else origin,
        tags=["xlm-hf", *(family.model_class.model_tags or ["non-autoregressive"]), model_type],
        model_name=variables.get("model_id", model_type) if results else None,
        eval_results=results or None,
    )
    own = Path(inspect.getfile(family.config_class)).with_name("hub_card.md")
    external = {f"{model_type}.md": own.read_text(encoding="utf-8")} if own.exists() else {}
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.DictLoader(external), jinja2.FunctionLoader(_card_template)]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.select_template([f"{model_type}.md", "_base.md"]).render(
        card_data=card_data.to_yaml(),
        model_type=model_type,
        model_class=family.model_class.__name__,
        results=results,
        **variables,
    )


def _card_template(name: str) -> str | None:
    template = resources.files("xlm_hf.hub_cards") / name
    return template.read_text(encoding="utf-8") if template.is_file() else None


def _eval_results(task: str, metrics: dict[str, float]) -> list[EvalResult]:
    results = []
    for name, value in metrics.items():
        set_name, _, metric = name.rpartition("/")
        # The Hub keeps metadata as JSON, which has no number that is not finite.
        is_detail = metric in ("samples", "seconds") or metric.endswith("_standard_error")
        if not set_name or is_detail or not math.isfinite(value):
            continue
        details = {"samples": f"{set_name}/samples", "standard_error": f"{name}_standard_error"}
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=task,
                metric_type=metric,
                metric_name=name,
                metric_value=float(value),
                metric_args={detail: metrics[key] for detail, key in details.items() if key in metrics},
            )
        )
    return results

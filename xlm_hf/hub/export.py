"""Self-contained repositories: a family's code, weights, tokenizer and model card in one folder.

Whenever a registered configuration is saved, the Python files that the model needs are written too. This holds for a
configuration alone, a model, a trainer and a push. The folder then loads by `trust_remote_code=True` where this package
is not installed.
"""

import ast
import copy
import functools
import os
import re
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from xlm_hf.families import Family, families
from xlm_hf.files import replaced_folder, write_text
from xlm_hf.hub.card import render_card

_MODULES = Path(__file__).resolve().parents[1] / "modules"
_PIPELINE = Path(__file__).resolve().with_name("text_generation_pipeline.py")
# Stands behind the code of a model, so that whoever saves the model copies the file of its pipeline too.
_NAMES_PIPELINE = f"""

def _pipeline_class():
    from .{_PIPELINE.stem} import XLMTextGenerationPipeline

    return XLMTextGenerationPipeline
"""
# What an export rewrites and follows. The loader of transformers finds the files of a repository by the same pattern.
_FILE_IMPORT = re.compile(r"^([ \t]*)from[ \t]+(xlm_hf\.modules)?\.(\w+)[ \t]+import\b", re.MULTILINE)
_EXPORTED_SUFFIXES = {".json", ".safetensors", ".py", ".md", ".txt", ".jinja", ".model"}


def save_code_with(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """Let whatever saves a configuration or model of these classes write the family's code beside it."""
    # A model saves its config after it has noted what lies in the folder, so that an upload takes the code along.
    config_class.save_pretrained = _save_config_and_code  # type: ignore[method-assign]
    config_class._get_files_timestamps = _timestamps_without_code  # type: ignore[method-assign]
    model_class._upload_modified_files = _upload_with_card  # type: ignore[method-assign, assignment]


def _save_config_and_code(self, save_directory, push_to_hub=False, **kwargs):
    """Save as transformers does, with the code beside the configuration, which names its classes and its pipeline."""
    family = families().get(self.model_type)
    # The config in memory stays as it is.
    saved = copy.deepcopy(self)
    if "use_cache" not in {option.name for option in fields(saved)}:
        # `Trainer` sets it on the config of every model.
        vars(saved).pop("use_cache", None)
    if family is not None and self.architectures in (None, [family.model_class.__name__]):
        export_code(family, save_directory)
        classes = {"AutoConfig": family.config_class, **dict.fromkeys(family.auto_classes, family.model_class)}
        saved.auto_map = {name: f"{_source_file(cls).stem}.{cls.__name__}" for name, cls in classes.items()}
        if family.model_class.can_generate():
            pipeline = {"impl": f"{_PIPELINE.stem}.XLMTextGenerationPipeline", "pt": ["AutoModel"]}
            saved.custom_pipelines = {"text-generation": pipeline}
    else:
        for name in ("auto_map", "custom_pipelines"):
            vars(saved).pop(name, None)
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
        card.write_text(render_card(families()[self.config.model_type], variables), encoding="utf-8")
    return PreTrainedModel._upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs)


def _timestamps_without_code(self, working_dir):
    """Leave the code, which is just written, out of what `save_pretrained(push_to_hub=True)` takes for uploaded."""
    code = family_code(families()[self.model_type]) if self.model_type in families() else {}
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

    Starts from the files of the two classes. It follows their imports, function-local ones included, to files beside
    them and in `xlm_hf.modules`. The latter imports are made relative. A model that writes gets a pipeline, too.

    Returns:
        file name -> source; the names are flat.

    Raises:
        ValueError: if a file imports something that an export cannot carry, or two files have one name.
    """
    pending = [_source_file(family.config_class), _source_file(family.model_class)]
    writes = getattr(family.model_class, "can_generate", bool)()
    if writes:
        pending.append(_PIPELINE)
    paths: dict[str, Path] = {}
    code: dict[str, str] = {}
    while pending:
        path = pending.pop()
        if paths.setdefault(path.name, path) != path:
            raise ValueError(f"{paths[path.name]} and {path} would be exported under one name: rename one of them.")
        if path.name not in code:
            code[path.name], imported = _flatten(path)
            pending += imported
    if writes:
        code[_source_file(family.model_class).name] += _NAMES_PIPELINE
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
    stranger = _not_portable(flat := _FILE_IMPORT.sub(r"\1from .\3 import", source))
    if stranger is not None:
        remedy = "write `from .<file> import ...` or `from xlm_hf.modules.<file> import ...`, and nothing else of it"
        raise ValueError(f"{path} says {stranger!r}, which an export cannot carry: {remedy}.")
    return flat, imported


@functools.lru_cache(maxsize=256)
def _not_portable(flat: str) -> str | None:
    """The first statement of a rewritten source that an export cannot carry; a run asks at each of its checkpoints."""
    files = {name for _, _, name in _FILE_IMPORT.findall(flat)}
    return next((ast.unparse(node) for node in ast.walk(ast.parse(flat)) if not _is_portable(node, files)), None)


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
    from xlm_hf.hub.pretrained_backbones import merged

    target = Path(directory).resolve()
    model_type = model.config.model_type
    if model_type not in families():
        raise ValueError(f"{model_type!r} is not a registered family: call xlm_hf.register_family before exporting it.")
    _check_replaceable(target)
    variables = {"model_id": target.name, "parameters": model.num_parameters(), **(card_variables or {})}
    with replaced_folder(target) as staging:
        merged(model).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(render_card(families()[model_type], variables), encoding="utf-8")
    return Path(directory)


def _check_replaceable(target: Path) -> None:
    """Raise ValueError unless replacing `target` loses nothing but an earlier export."""
    entries = sorted(target.iterdir()) if target.exists() else []
    foreign = [entry.name for entry in entries if entry.is_dir() or entry.suffix not in _EXPORTED_SUFFIXES]
    names = {entry.name for entry in entries}
    if foreign or (names and not {"config.json", "README.md"} <= names):
        what = f"{foreign[0]!r}" if foreign else "files but no exported model"
        raise ValueError(f"{target} holds {what}, which an export would delete: name a new or an empty folder.")

"""Where texts come from: a file, a folder, a data set of the Hub, or a Python function."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.fingerprint import Hasher

from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.messages import did_you_mean, import_target

_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

Source: TypeAlias = Path | str | DatasetDict


def locate(path: str, text_column: str) -> Source:
    """What `path` names: a file or folder, what a function `module:function` returned, or else a Hub id.

    A function returns a `Dataset`, a list of texts (its training set), or a dict of either by split.

    Raises:
        ValueError: if there is nothing of that name, or the function returned something else.
    """
    found = Path(path).expanduser()
    if found.exists():
        if found.is_file() and found.suffix not in _BUILDERS:
            raise ValueError(f"{path} must be one of {', '.join(_BUILDERS)}: rename or convert it.")
        return found
    if ":" in path:
        made = import_target("function", path)()
        splits = made if isinstance(made, Mapping) else {"train": made}
        return DatasetDict({name: _as_dataset(split, text_column, path) for name, split in splits.items()})
    if found.suffix in _BUILDERS or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(
            f"there is no file or folder {path!r}: name one (.txt, .jsonl, .parquet), a Hub id such as user/name, or a "
            "Python function as module:function."
        )
    return path


def _as_dataset(split: Any, text_column: str, path: str) -> Dataset:
    if isinstance(split, Dataset):
        return split
    texts = list(split) if isinstance(split, (list, tuple)) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{path} returned a {type(split).__name__}: a data function returns a Dataset, a list of texts, or a dict "
            "of either by split."
        )
    return Dataset.from_dict({text_column: texts})


def content_key(source: Source) -> Any:
    """What identifies the content of a source: the hashes of its files, or the fingerprints of its splits."""
    if isinstance(source, DatasetDict):
        return {name: Hasher.hash(split) for name, split in source.items()}
    if isinstance(source, str):
        return source
    files = [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.suffix in _BUILDERS)
    key = {}
    for file in files:
        with file.open("rb") as stream:
            name = file.name if source.is_file() else file.relative_to(source).as_posix()
            key[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return key


def read(source: Source, scratch: Path, options: Mapping[str, Any]) -> DatasetDict:
    """The splits of a source; validation and test sets that it lacks are drawn from its training documents.

    Args:
        source: see `locate`.
        scratch: folder for the Arrow files.
        options: those of `xlm_hf.tasks.text.text_corpus`.

    Raises:
        ValueError: if there is no training set, too few documents to draw from, or no such column.
    """
    found = source if isinstance(source, DatasetDict) else _load(source, scratch, options)
    if "train" not in found:
        raise ValueError(
            f"{source} has no training set, only {', '.join(found)}: name a file of it, or say which split to train on "
            "with splits, e.g. task.splits={train: validation}."
        )
    column = options["text_column"]
    for split, data in found.items():
        if column not in data.column_names:
            closest = did_you_mean(column, data.column_names)
            raise ValueError(f"split {split!r} has no column {column!r}: {closest} Set text_column.")
    fractions = {name: options[f"{name}_fraction"] for name in ("validation", "test") if name not in found}
    return _with_drawn_splits(found, fractions, options["seed"])


def _with_drawn_splits(found: DatasetDict, fractions: Mapping[str, float], seed: int) -> DatasetDict:
    documents = found["train"]
    sizes = {name: max(1, round(share * len(documents))) for name, share in fractions.items() if share > 0}
    if sum(sizes.values()) >= len(documents):
        raise ValueError(
            f"{len(documents)} documents are too few to draw the sets {', '.join(sizes)} from: provide these sets, or "
            "make more documents with sample_by."
        )
    order, start = uniform(seed, torch.arange(len(documents))).argsort(), 0
    drawn = {}
    for name, size in sizes.items():
        drawn[name], start = order[start : start + size], start + size
    drawn["train"] = order[start:]
    selected = {name: documents.select(rows.sort().values.numpy(), keep_in_memory=True) for name, rows in drawn.items()}
    return DatasetDict({**found, **selected})


def _load(source: Path | str, scratch: Path, options: Mapping[str, Any]) -> DatasetDict:
    name, arguments = str(source), {"name": options["subset"], "revision": options["revision"]}
    if isinstance(source, Path):
        arguments = {"data_files": name} if source.is_file() else {}
        has_lines = source.suffix == ".txt" or any(source.rglob("*.txt"))
        arguments.update({"sample_by": options["sample_by"]} if has_lines else {})
        name = _BUILDERS[source.suffix] if source.is_file() else name
    try:
        if options["splits"] is None:
            return load_dataset(name, cache_dir=str(scratch), **arguments)
        ours = dict(options["splits"])
        parts = load_dataset(name, cache_dir=str(scratch), split=list(ours.values()), **arguments)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error
    return DatasetDict(zip(ours, parts, strict=True))

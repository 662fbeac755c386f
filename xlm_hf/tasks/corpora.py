"""Where texts come from: a file, a folder, a data set of the Hub, or a Python function."""

import hashlib
import pkgutil
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.fingerprint import Hasher

from xlm_hf.modules.counter_random import uniform

_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

Source = Path | str | DatasetDict


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
        try:
            function = pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"the function {path!r} cannot be imported: {error}.") from error
        made = function()
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


def read(
    source: Source,
    scratch: Path,
    splits: Mapping[str, str] | None,
    fractions: Mapping[str, float],
    seed: int,
    **arguments: Any,
) -> DatasetDict:
    """The splits of a source; those of `fractions` that it lacks are drawn from its training set.

    Args:
        source: see `locate`.
        scratch: folder for the Arrow files.
        splits: which splits of the source are ours, e.g. `{"train": "train[:-1000]"}`; by default its own.
        fractions: of the training documents, for each split that may have to be made.
        seed: of the draw.
        arguments: of `datasets.load_dataset`; `sample_by` only applies to plain text.

    Raises:
        ValueError: if there is no training set, or too few documents to draw from.
    """
    found = source if isinstance(source, DatasetDict) else _load(source, scratch, splits, arguments)
    if "train" not in found:
        raise ValueError(
            f"{source} has no training set, only {', '.join(found)}: name a file of it, or say which split to train on "
            "with splits, e.g. task.splits={train: validation}."
        )
    return _with_drawn_splits(found, {name: share for name, share in fractions.items() if name not in found}, seed)


def _with_drawn_splits(found: DatasetDict, fractions: Mapping[str, float], seed: int) -> DatasetDict:
    documents = found["train"]
    sizes = {name: max(1, round(share * len(documents))) for name, share in fractions.items() if share > 0}
    if sum(sizes.values()) >= len(documents):
        raise ValueError(
            f"{len(documents)} documents are too few to draw the sets {', '.join(sizes)} from: bring them, or make more "
            "documents with sample_by."
        )
    order, start = uniform(seed, torch.arange(len(documents))).argsort(), 0
    drawn = {}
    for name, size in sizes.items():
        drawn[name], start = order[start : start + size], start + size
    drawn["train"] = order[start:]
    selected = {name: documents.select(rows.sort().values.numpy(), keep_in_memory=True) for name, rows in drawn.items()}
    return DatasetDict({**found, **selected})


def _load(source: Path | str, scratch: Path, splits: Mapping[str, str] | None, arguments: dict[str, Any]) -> DatasetDict:
    sample_by = arguments.pop("sample_by")
    is_folder = isinstance(source, Path) and source.is_dir()
    if isinstance(source, Path):
        arguments = {}
    if isinstance(source, Path) and source.is_file():
        arguments = {"data_files": str(source)}
    if isinstance(source, Path) and (source.suffix == ".txt" or (is_folder and any(source.rglob("*.txt")))):
        arguments["sample_by"] = sample_by
    name = _BUILDERS[source.suffix] if "data_files" in arguments else str(source)  # type: ignore[union-attr]
    try:
        if splits is None:
            return load_dataset(name, cache_dir=str(scratch), **arguments)
        parts = load_dataset(name, cache_dir=str(scratch), split=list(splits.values()), **arguments)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error
    return DatasetDict(zip(splits, parts, strict=True))

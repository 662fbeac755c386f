"""Where texts come from: a file, a folder, a data set of the Hub, or a Python function."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.fingerprint import Hasher

from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.messages import did_you_mean, import_target

_BUILDERS = {
    **{".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"},
    **{".csv": "csv", ".tsv": "csv"},
}

# What the files and sub-folders of a split are called; a file may have a number, or a prefix that ends with a dot.
_CALLED = {"train": "train", "validation": "validation|valid|val|dev", "test": "test"}
_NUMBER = r"(?:[-_.]\d+(?:-of-\d+)?(?:-[0-9a-f]+)?)?"

# The files of a folder that are in no split.
UNUSED = "not used"

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


def files_of(source: Source, splits: Mapping[str, str] | None = None) -> dict[str, list[Path]]:
    """The files of a local source by split, and those of a folder that are `UNUSED`; nothing for other sources.

    The files of a folder that are called train, validation (valid, val, dev) or test, or lie in a folder of that name,
    are these splits. If there are none, all files are the training set. Any other file is a split of its own name only
    if `splits` asks for it.

    Args:
        source: see `locate`.
        splits: the option of that name, e.g. `{"test": "test_scaffolds[:100]"}`.
    """
    if not isinstance(source, Path) or not source.exists():
        return {}
    if source.is_file():
        return {"train": [source]}
    named: dict[str, list[Path]] = {split: [] for split in _CALLED}
    others: list[Path] = []
    for file in sorted(file for file in source.rglob("*") if file.suffix in _BUILDERS):
        split = _split_of(file, source)
        (others if split is None else named[split]).append(file)
    named = {split: files for split, files in named.items() if files}
    if not named and others:
        builders = [_BUILDERS[file.suffix] for file in others]
        most = max(builders, key=builders.count)
        named = {"train": [file for file in others if _BUILDERS[file.suffix] == most]}
    if splits is not None:
        asked = {match[0] for part in splits.values() if (match := re.match(r"[\w.]+", part))}
        named = {name: files for name, files in named.items() if name in asked}
        named.update({file.stem: [file] for file in others if file.stem in asked})
    used = {file for files in named.values() for file in files}
    unused = [file for file in source.rglob("*") if file.suffix in _BUILDERS and file not in used]
    return {**named, **({UNUSED: sorted(unused)} if unused else {})}


def _split_of(file: Path, folder: Path) -> str | None:
    """The split that a file of a folder is called, or else the nearest folder that it lies in."""
    names = [(file.stem, rf"(?:.*\.)?(?:{{}}){_NUMBER}")]
    names += [(parent.name, "{}") for parent in file.parents if folder in parent.parents]
    for name, form in names:
        for split, called in _CALLED.items():
            if re.fullmatch(form.format(called), name):
                return split
    return None


def content_key(source: Source, splits: Mapping[str, str] | None = None) -> Any:
    """What identifies the content of a source: the hashes of its files, or the fingerprints of its splits."""
    if isinstance(source, DatasetDict):
        return {name: Hasher.hash(split) for name, split in source.items()}
    if isinstance(source, str):
        return source
    key = {}
    for split, files in files_of(source, splits).items():
        for file in files if split != UNUSED else ():
            with file.open("rb") as stream:
                name = file.name if source.is_file() else file.relative_to(source).as_posix()
                key[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return key


def read(source: Source, scratch: Path, options: Mapping[str, Any]) -> DatasetDict:
    """The splits of a source; validation and test sets that it lacks are drawn from its training documents.

    Args:
        source: see `locate`.
        scratch: folder for the Arrow files.
        options: `splits`, `subset`, `revision`, `sample_by`, `validation_fraction`, `test_fraction` and `seed` of
            `xlm_hf.tasks.text.text_corpus`.

    Raises:
        ValueError: if there is no training set, or too few documents to draw from.
    """
    found = source if isinstance(source, DatasetDict) else _load(source, scratch, options)
    if "train" not in found:
        raise ValueError(
            f"{source} has no training set, only {', '.join(found)}: name a file of it, or say which split to train on "
            "with splits, e.g. task.splits={train: validation}."
        )
    fractions = {name: options[f"{name}_fraction"] for name in ("validation", "test") if name not in found}
    return _with_drawn_splits(found, fractions, options["seed"])


def check_columns(found: DatasetDict, columns: Sequence[str]) -> None:
    """Raise ValueError if a split lacks one of the columns."""
    for split, data in found.items():
        for column in columns:
            if column not in data.column_names:
                closest = did_you_mean(column, data.column_names)
                raise ValueError(f"split {split!r} has no column {column!r}: {closest} Set the option that names it.")


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
        by_split = {split: files for split, files in files_of(source, options["splits"]).items() if split != UNUSED}
        suffixes = sorted({file.suffix for files in by_split.values() for file in files})
        builders = {_BUILDERS[suffix] for suffix in suffixes}
        if len(builders) != 1:
            found = f"files of several formats ({', '.join(suffixes)})" if builders else "no data that it asks for"
            raise ValueError(f"{source} has {found}: put the splits into files of one of {', '.join(_BUILDERS)}.")
        name = builders.pop()
        arguments = {"data_files": {split: list(map(str, files)) for split, files in by_split.items()}}
        arguments.update({"sample_by": options["sample_by"]} if name == "text" else {})
        arguments.update({"sep": "\t"} if ".tsv" in suffixes else {})
    try:
        if options["splits"] is None:
            return load_dataset(name, cache_dir=str(scratch), **arguments)
        ours = dict(options["splits"])
        parts = load_dataset(name, cache_dir=str(scratch), split=list(ours.values()), **arguments)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error
    return DatasetDict(zip(ours, parts, strict=True))

"""Where texts come from: a file, a folder, a data set of the Hub, or a Python function."""

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from datasets import Dataset, DatasetDict, ReadInstruction, load_dataset
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable

from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.messages import did_you_mean, import_target
from xlm_hf.tasks.pieces import buffers_of, release
from xlm_hf.tasks.readers import KINDS, kind_of, read_files

logger = logging.getLogger(__name__)

# What the files and sub-folders of a split are called; a file may have a number, or a prefix that ends with a dot.
_CALLED = {"train": "train", "validation": "validation|valid|val|dev", "test": "test"}
_NUMBER = r"(?:[-_.]\d+(?:-of-\d+)?(?:-[0-9a-f]+)?)?"

# The files of a folder that are in no split.
UNUSED = "not used"

# The files of a local source by split, a Hub id, or data.
Source: TypeAlias = Mapping[str, Sequence[Path]] | str | DatasetDict

_ROWS_AT_ONCE = 65_536


def locate(path: str, text_column: str, splits: Mapping[str, str] | None = None) -> Source:
    """What `path` names: a file or folder, what a function `module:function` returned, or else a Hub id.

    A function returns a `Dataset`, a list of texts (its training set), or a dict of either by split.

    Returns:
        of a file or folder the files by split, with those of the folder that are `UNUSED`: the one list by which it is
        hashed, read and shown.

    Raises:
        ValueError: if there is nothing of that name, it has no data, or the function returned something else.
    """
    found = Path(path).expanduser()
    if found.exists():
        return _files(found, splits)
    if ":" in path:
        try:
            made = import_target("function", path)()
        except TypeError as error:
            raise ValueError(f"{path} is no function without arguments ({error}): name one.") from error
        by_split = made if isinstance(made, Mapping) else {"train": made}
        return DatasetDict({name: _as_dataset(split, text_column, path) for name, split in by_split.items()})
    if kind_of(found) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(
            f"there is no file or folder {path!r}: name one (.txt, .jsonl, .parquet), a Hub id such as user/name, or a "
            "Python function as module:function."
        )
    return path


def local_files(source: Source) -> Mapping[str, Sequence[Path]]:
    """The files of a source, by split; nothing if they are not here."""
    return {} if isinstance(source, (str, DatasetDict)) else source


def _as_dataset(split: Any, text_column: str, path: str) -> Dataset:
    if isinstance(split, Dataset):
        return split
    texts = list(split) if isinstance(split, (list, tuple)) else [None]
    if not all(isinstance(text, str) for text in texts):
        kinds = "a Dataset, a list of texts, or a dict of either"
        raise ValueError(f"{path} returned a {type(split).__name__}: a data function returns {kinds}.")
    return Dataset.from_dict({text_column: texts})


def _files(source: Path, splits: Mapping[str, str] | None) -> dict[str, list[Path]]:
    """The files of a file or folder by split.

    The files of a folder that are called train, validation (valid, val, dev) or test, or lie in a folder of that name,
    are these splits. If there are none, all files of the kind that most have are the training set. Any other file is a
    split of its own name only if `splits` asks for it. Hidden files and folders are none.
    """
    choose = f"choose files of {', '.join(KINDS)}, which may end with .gz"
    if source.is_file():
        if kind_of(source) is None:
            raise ValueError(f"{source} is of no kind that can be read: {choose}; rename or convert it.")
        return {"train": [source]}
    found = [file for file in sorted(source.rglob("*")) if kind_of(file) and file.is_file()]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(source).parts)]
    named = {split: [file for file in found if _split_of(file, source) == split] for split in _CALLED}
    named = {split: files for split, files in named.items() if files} or _of_one_kind(source, found)
    if splits is not None:
        asked = {match[0] for part in splits.values() for match in re.finditer(r"[A-Za-z_][\w.]*", part)}
        others: dict[str, list[Path]] = {}
        for file in found:
            others.setdefault(_name(file), []).append(file)
        named = {name: files for name, files in {**others, **named}.items() if name in asked}
    if not named:
        raise ValueError(f"{source} has no data that it is asked for: {choose}.")
    used = {file for files in named.values() for file in files}
    unused = [file for file in found if file not in used]
    return {**named, **({UNUSED: unused} if unused else {})}


def _of_one_kind(source: Path, found: Sequence[Path]) -> dict[str, list[Path]]:
    """All files of the kind that most have, as the training set."""
    kinds = [str(kind_of(file)) for file in found]
    ranked = sorted({*kinds}, key=kinds.count, reverse=True)
    if len(ranked) > 1 and kinds.count(ranked[0]) == kinds.count(ranked[1]):
        formats = ", ".join(sorted(ranked))
        raise ValueError(f"{source} has files of several formats ({formats}) and none is called train: name one file.")
    return {"train": [file for file in found if kind_of(file) == ranked[0]]} if found else {}


def _name(file: Path) -> str:
    """A file's name without its kind."""
    return re.sub(r"\.\w+(\.gz)?$", "", file.name, flags=re.IGNORECASE)


def _split_of(file: Path, folder: Path) -> str | None:
    """The split that a file of a folder is called, or else the nearest folder that it lies in."""
    names = [(_name(file), rf"(?:.*\.)?(?:{{}}){_NUMBER}")]
    names += [(parent.name, "{}") for parent in file.parents if folder in parent.parents]
    for name, form in names:
        for split, called in _CALLED.items():
            if re.fullmatch(form.format(called), name, re.IGNORECASE):
                return split
    return None


def content_key(source: Source) -> Any:
    """What identifies the content of a source: the hashes of its files, or the fingerprints of its splits."""
    if isinstance(source, DatasetDict):
        return {name: Hasher.hash(split) for name, split in source.items()}
    if isinstance(source, str):
        return source
    key: dict[str, list] = {}
    for split, files in source.items():
        for file in files if split != UNUSED else ():
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            key.setdefault(split, []).append([str(kind_of(file)), digest])
    return key


def read(source: Source, columns: Mapping[str, bool], scratch: Path, options: Mapping[str, Any]) -> DatasetDict:
    """The splits of a source; validation and test sets that it lacks are drawn from its training documents.

    Documents without text are in no drawn split.

    Args:
        source: see `locate`.
        columns: those to read, see `xlm_hf.tasks.readers.read_files`. One for a text and one for a list must be there.
        scratch: folder for the Arrow files.
        options: `path`, `splits`, `subset`, `revision`, `sample_by`, `validation_fraction`, `test_fraction` and `seed`
            of `xlm_hf.tasks.text.text_corpus`.

    Raises:
        ValueError: if there is no training set, too few documents to draw from, or a column that is missing or no text.
    """
    found = source if isinstance(source, DatasetDict) else _load(source, columns, scratch, options)
    # A column of a column has a name such as `translation.en`.
    found = found.flatten()
    if "train" not in found:
        said = f"{options['path']} has no training set, only {', '.join(found) or 'nothing'}"
        raise ValueError(f"{said}: say which to train on, e.g. task.splits={{train: {next(iter(found), 'NAME')}}}.")
    _check_texts(found, columns, options["path"])
    present = [name for name in columns if name in found["train"].column_names]
    if not present:
        check_columns(found, [*columns])
    fractions = {name: options[f"{name}_fraction"] for name in ("validation", "test") if name not in found}
    return _with_drawn_splits(found, fractions, options["seed"], present)


def check_columns(found: DatasetDict, columns: Sequence[str]) -> None:
    """Raise ValueError if a split lacks one of the columns."""
    for split, data in found.items():
        for column in columns:
            if column not in data.column_names:
                closest = did_you_mean(column, data.column_names)
                raise ValueError(f"split {split!r} has no column {column!r}: {closest} Set the option that names it.")


def _check_texts(found: DatasetDict, columns: Mapping[str, bool], path: str) -> None:
    for split, data in found.items():
        for name in columns.keys() & {*data.column_names}:
            kind: Any = data.features[name]
            kind = kind.feature if columns[name] and isinstance(kind, datasets.List) else kind
            if getattr(kind, "dtype", "") not in ("string", "large_string"):
                where = f"the column {name!r} of split {split!r} of {path}"
                raise ValueError(f"{where} holds no texts but {data.features[name]}: name another, or convert it.")


def _with_text(documents: Dataset, columns: Iterable[str]) -> np.ndarray:
    """The rows that have a text in each of the columns."""
    masks = []
    for table in documents.select_columns([*columns]).with_format("arrow").iter(_ROWS_AT_ONCE):
        mask = np.ones(len(table), bool)
        for column in table.columns:
            is_list = pa.types.is_nested(column.type)
            has = pc.greater(pc.list_value_length(column), 0) if is_list else pc.match_substring_regex(column, r"\S")
            mask &= pc.fill_null(has, False).to_numpy()
        masks.append(mask)
        release(buffers_of(table))
    return np.concatenate(masks).nonzero()[0]


def _with_drawn_splits(
    found: DatasetDict, fractions: Mapping[str, float], seed: int, columns: Iterable[str]
) -> DatasetDict:
    documents = found["train"]
    rows = _with_text(documents, columns)
    sizes = {name: max(1, round(share * len(rows))) for name, share in fractions.items() if share > 0}
    if sum(sizes.values()) >= len(rows):
        few = f"{len(rows)} documents with text are too few to draw the sets {', '.join(sizes) or 'train'} from"
        raise ValueError(f"{few}: provide these sets, or make more documents with sample_by.")
    if not sizes:
        return found
    # In place: there may be tens of millions of rows.
    draws = np.arange(len(rows), dtype=float)
    for block in np.split(draws, range(_ROWS_AT_ONCE, len(rows), _ROWS_AT_ONCE)):
        block[:] = uniform(seed, torch.from_numpy(block).long())
    order, start = draws.argsort(), 0
    del draws
    selected = {}
    for name, size in {**sizes, "train": len(rows) - sum(sizes.values())}.items():
        drawn, start = order[start : start + size], start + size
        drawn.sort()
        selected[name] = _selected(documents, rows[drawn])
    return DatasetDict({**found, **selected})


def _selected(documents: Dataset, rows: np.ndarray) -> Dataset:
    """`documents.select(rows)`, without the list of Python's numbers that it makes, of 40 bytes each."""
    if documents._indices is not None:
        return documents.select(rows, keep_in_memory=True)
    indices = InMemoryTable.from_pydict({"indices": rows.view(np.uint64)})
    fingerprint = f"{documents._fingerprint}-{xxhash.xxh3_64_hexdigest(rows.data)}"
    return Dataset(documents.data, documents.info, documents.split, indices, fingerprint)


def _load(
    source: Mapping[str, Sequence[Path]] | str, columns: Mapping[str, bool], scratch: Path, options: Mapping[str, Any]
) -> DatasetDict:
    ours = options["splits"]
    if isinstance(source, str):
        try:
            arguments = {"name": options["subset"], "revision": options["revision"], "cache_dir": str(scratch)}
            found = load_dataset(source, **arguments, split=None if ours is None else [*ours.values()])
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error
        return found if ours is None else DatasetDict(zip(ours, found, strict=True))
    read = {}
    for split, files in source.items():
        if split != UNUSED:
            data, names = read_files(files, columns, scratch / f"{split}-texts.arrow", options["sample_by"])
            if not len(data):
                raise ValueError(f"{', '.join(map(str, files))} has no text: the split {split!r} would be empty.")
            missing = [name for name in columns if name not in names]
            for is_list in columns.values():
                alike = [name for name, kind in columns.items() if kind == is_list]
                if not {*alike} - {*missing}:
                    closest = f"{did_you_mean(alike[-1], names)} Set the option that names it."
                    raise ValueError(f"split {split!r} has no column {alike[-1]!r}: {closest}")
            read[split] = data.remove_columns(missing)
    sizes = {name: len(data) for name, data in read.items()}
    return DatasetDict(
        {name: _sliced(read, part, sizes) for name, part in (ours or {name: name for name in read}).items()}
    )


def _sliced(read: Mapping[str, Dataset], part: str, sizes: dict[str, int]) -> Dataset:
    """A part of the splits such as `train[:100]`, as `datasets` writes it."""
    if part in read:
        return read[part]
    pieces = [
        read[piece.splitname].select(range(piece.from_, piece.to))
        for piece in ReadInstruction.from_spec(part).to_absolute(sizes)
    ]
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)

"""Local files of texts, read as Arrow files in the memory of one document or a few megabytes, whichever is more."""

import csv
import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from pyarrow.parquet import ParquetFile

KINDS = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".tsv")

# Bytes of text that are held at a time, but for a longer document.
_BYTES_AT_ONCE = 2**22
_BLOCK = 2**20
_SEPARATORS = {"line": b"\n", "paragraph": b"\n\n", "document": None}

# A row, with its number in the file: a line, or of a Parquet file a row.
_Row = tuple[int, Mapping[str, Any]]


def kind_of(file: Path) -> str | None:
    """One of `KINDS` by the name of a file, whose case does not matter and which may end with `.gz`; else None."""
    name = file.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def read_files(
    files: Sequence[Path], columns: Mapping[str, bool], target: Path, sample_by: str = "line"
) -> tuple[Dataset, set[str]]:
    """Read files, one after the other, into an Arrow file.

    Args:
        files: of any `KINDS`; compressed ones end with `.gz`.
        columns: the columns to read, "outer.inner" for a column of a column, and whether each is a list of texts, in
            which a single text stands for a list of one. All others are left out, and need not agree between the files.
            A row that lacks a column, or has null there, has an empty text.
        target: the Arrow file to write.
        sample_by: of what is text alone, see `xlm_hf.tasks.text.text_corpus`.

    Returns:
        the rows, and the names of all columns of the files.

    Raises:
        ValueError: for a file that cannot be decoded or parsed, or a value that is no text: the file, the line and the
            cause.
    """
    text = Value("large_string")
    kinds = {name: List(text) if is_list else text for name, is_list in columns.items()}
    names: set[str] = set()
    with ArrowWriter(features=Features(kinds), path=str(target), writer_batch_size=2**31) as writer:
        for batch in _batches(files, columns, names, sample_by):
            arrays = [_lists(batch[name]) if is_list else _texts(batch[name]) for name, is_list in columns.items()]
            writer.write_table(pa.table(arrays, names=list(columns)))
        writer.finalize()
    return Dataset.from_file(str(target)), names


def _batches(
    files: Sequence[Path], columns: Mapping[str, bool], names: set[str], sample_by: str
) -> Iterator[dict[str, list]]:
    size = 0
    batch: dict[str, list] = {name: [] for name in columns}
    for file in files:
        for number, row in _rows(file, columns, sample_by):
            for name, value in row.items():
                names.update([f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name])
            for name, is_list in columns.items():
                value = _value(row, name)
                try:
                    parts = [*map(_encoded, value if is_list and isinstance(value, list) else [value])]
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{file}, line {number}: the column {name!r} {error}.") from None
                batch[name].append([*filter(None, parts)] if is_list else parts[0])
                size += sum(map(len, parts)) + 8
            if size > _BYTES_AT_ONCE:
                yield batch
                size, batch = 0, {name: [] for name in columns}
    if any(batch.values()):
        yield batch


def _value(row: Mapping[str, Any], name: str) -> Any:
    outer, _, inner = name.partition(".")
    return row[outer].get(inner) if name not in row and isinstance(row.get(outer), dict) else row.get(name)


def _encoded(value: Any) -> bytes | bytearray:
    if value is None:
        return b""
    if isinstance(value, bytes):
        return _encoded(value.decode())
    if isinstance(value, bytearray):
        return value
    if not isinstance(value, str):
        kind = {"list": "a list", "dict": "an object", "int": "an integer"}.get(type(value).__name__)
        raise TypeError(f"holds {kind or f'a {type(value).__name__}'} ({str(value)[:40]}) and not a text: convert it")
    return encoded(value)


def encoded(text: str) -> bytes:
    """A text in UTF-8; raises ValueError if it is none, as JSON may have it."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a surrogate pair ({error.object[error.start]!a}): repair it") from None


def _texts(texts: list[bytes | bytearray]) -> pa.Array:
    # Without a copy of a single one, which may be large.
    data = texts[0] if len(texts) == 1 else b"".join(texts)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(data))


def _lists(rows: list[list[bytes | bytearray]]) -> pa.Array:
    return pa.ListArray.from_arrays(np.cumsum([0, *map(len, rows)], dtype=np.int32), _texts([*chain(*rows)]))


def json_rows(file: Path) -> Iterator[_Row]:
    """The objects of a file of JSON lines, each with its line; what is wrong is said with the file and the line."""
    return _rows(file, (), "line", ".jsonl")


def rows(file: Path, columns: Collection[str]) -> Iterator[_Row]:
    """The rows of a file of any kind, each with its number; of Parquet the values of these columns alone."""
    return _rows(file, columns, "line")


def _rows(file: Path, columns: Collection[str], sample_by: str, kind: str | None = None) -> Iterator[_Row]:
    """The rows of a file; what it holds wrongly is said with the file and the line."""
    kind, number = kind or kind_of(file), 0
    readers = {".txt": partial(_text_rows, sample_by=sample_by), ".parquet": partial(_parquet_rows, columns=columns)}
    reader: Any = readers.get(str(kind), _csv_rows if kind in (".csv", ".tsv") else _json_rows)
    try:
        for number, row in reader(file):
            yield number, row
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8: {_undecodable(file)}: convert it, e.g. by iconv -t utf-8.") from None
    except (csv.Error, EOFError, RecursionError, gzip.BadGzipFile, zlib.error, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read behind line {number}: {' '.join(str(error).split())}.") from None


def _undecodable(file: Path) -> str:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} has the byte 0x{line[error.start]:02x} at position {error.start + 1}"
    return "it is in another encoding"


def _open(file: Path, mode: str = "rb", **options: Any) -> Any:
    return (gzip.open if file.name.lower().endswith(".gz") else open)(file, mode, **options)


def _text_rows(file: Path, sample_by: str) -> Iterator[_Row]:
    separator, document, number = _SEPARATORS[sample_by], bytearray(), 1
    with _open(file, "rt", encoding="utf-8-sig") as stream:
        for block in iter(partial(stream.read, _BLOCK), ""):
            # With the last byte before it, so that no separator is cut.
            data = bytes(document[-1:]) + block.encode()
            document[-1:], *others = data.split(separator) if separator else (data,)
            for other in others:
                yield number, {"text": document}
                number += document.count(b"\n") + len(separator or b"")
                document = bytearray(other)
    if document:
        yield number, {"text": document}


def _json_rows(file: Path) -> Iterator[_Row]:
    """JSON lines, which end with a line feed alone; a file may also be one list of objects."""
    with _open(file) as stream:
        is_list = stream.read(_BLOCK).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        stream.seek(0)
        for number, line in enumerate([stream.read()] if is_list else stream, 1):
            try:
                found = json.loads(line, object_pairs_hook=_object) if line.strip() else []
            except json.JSONDecodeError as error:
                where = f"line {number + error.lineno - 1}, column {error.colno}"
                raise ValueError(f"{file}, {where}, is no JSON: {error.msg}.") from None
            except UnicodeDecodeError:
                raise
            except ValueError as error:  # a number of too many digits
                raise ValueError(f"{file}, line {number}: {str(error).split(';')[0]}.") from None
            for row in found if isinstance(found, list) else [found]:
                if not isinstance(row, dict):
                    raise ValueError(f"{file}, line {number}: {str(row)[:40]!r} is not an object with columns.")
                yield number, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise json.JSONDecodeError(f"of the names {', '.join(name for name, _ in pairs)} one stands twice", "", 0)
    return found


def _csv_rows(file: Path) -> Iterator[_Row]:
    csv.field_size_limit(2**31 - 1)
    with _open(file, "rt", encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if kind_of(file) == ".tsv" else ",", strict=True)
        for row in reader:
            if None in row:
                raise csv.Error("the next row has more fields than the header")
            yield reader.line_num, row


def _parquet_rows(file: Path, columns: Collection[str]) -> Iterator[_Row]:
    table = ParquetFile(file)
    others = dict.fromkeys(table.schema_arrow.names)
    read = [name for name in others if name in columns or any(column.startswith(f"{name}.") for column in columns)]
    batches = table.iter_batches(batch_size=1000, columns=read)
    for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
        yield number, {**others, **row}

"""Files and folders that are whole or not there: written beside their final position and renamed."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

INCOMPLETE_SUFFIX = ".incomplete"
JOURNAL_SUFFIX = ".journal"
_PREVIOUS_SUFFIX = ".previous"


def whole_folder(folder: Path) -> Path:
    """Where the content of `folder` is: in itself, or beside it if a kill came between the renames that replace it."""
    # A root, and this folder by no name, have none beside them.
    staging, previous = _beside(folder) if folder.name else (folder, folder)
    if folder.exists() or not previous.exists():
        return folder
    # The earlier folder is moved away only once the new one is complete.
    return staging if staging.exists() else previous


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + INCOMPLETE_SUFFIX), folder.with_name(folder.name + _PREVIOUS_SUFFIX)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Write a folder beside its final position and move it there once it is complete.

    Yields the temporary folder to write into, which is removed if the block raises; an earlier `folder` is kept until
    the new one is complete. A kill at any moment leaves the content of one of the two, which `whole_folder` finds and
    the next call moves back. Raises OSError, one sentence with the cause and the remedy, if writing failed.
    """
    staging, previous = _beside(folder)
    if (found := whole_folder(folder)) != folder:
        found.rename(folder)
    for leftover in (staging, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if folder.exists():
            folder.rename(previous)
        staging.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except Exception as error:
        if not _is_failed_write(error):
            raise
        raise _failed_write(folder, error, "; what was saved before is intact") from error
    finally:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        shutil.rmtree(staging, ignore_errors=True)


def _failed_write(target: Path, error: Exception, kept: str = "") -> OSError:
    full = shutil.disk_usage(target.parent).free < 2**20 or getattr(error, "errno", None) == errno.ENOSPC
    cause = os.strerror(errno.ENOSPC) if full else str(error).strip().splitlines()[0]
    remedy = "free disk space or name another folder, and start the same command again"
    return OSError(f"{target} could not be written ({cause}){kept}: {remedy}.")


def _is_failed_write(error: Exception) -> bool:
    # torch, safetensors and tokenizers report a full disk as errors of their own kinds.
    signs = ("inline_container", "PytorchStreamWriter", os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
    is_read = isinstance(error, (FileNotFoundError, ConnectionError))
    is_own = isinstance(error, (OSError, SafetensorError)) and not is_read
    return is_own or any(sign in str(error) for sign in signs)


def check_file_name(what: str, name: str) -> None:
    """Raise ValueError if a name, which files are called by, would lead to another folder or is none."""
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise ValueError(f"{what} must be a name that a file can have, without a path, and is {name!r}.")


def write_text(file: Path, text: str) -> None:
    """Write a text file beside its final position and rename it, so that a reader never sees half of it.

    Raises OSError, one sentence with the cause and the remedy, if writing failed.
    """
    staging = file.with_name(file.name + INCOMPLETE_SUFFIX)
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(file)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise _failed_write(file, error) from error


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Add lines to a file; raises OSError, one sentence with the cause and the remedy, if writing failed."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise _failed_write(file, error, "; what was written before is kept") from error


class Journal(list[Any]):
    """Records that are written as they come, so that the same work goes on behind them after an interruption.

    Args:
        file: of the records, a line of JSON each behind the key.
        key: of the work, a hash of all that decides the records: those of other work are dropped.
    """

    def __init__(self, file: Path, key: str):
        # What a kill cut has no end of its line.
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        self.file, self._head = file, [key]
        kept = lines if lines[:1] == self._head and lines[1:] else []
        super().__init__(map(json.loads, kept[1:]))
        if file.exists():
            write_text(file, "".join(f"{line}\n" for line in kept))

    def extend(self, records: Iterable[Any]) -> None:
        """Add records, on file too."""
        self.file.parent.mkdir(exist_ok=True)
        append_lines(self.file, [*([] if self else self._head), *map(json.dumps, records := list(records))])
        super().extend(records)

"""A disk cache for prepared datasets."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from datasets import DatasetDict
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerFast

from xlm_hf.files import INCOMPLETE_SUFFIX, check_file_name, replaced_folder

Prepared = tuple[DatasetDict, PreTrainedTokenizerFast]

_MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)


def cached(
    name: str, key: Mapping[str, Any], build: Callable[[Path], Prepared], cache_dir: str | os.PathLike | None = None
) -> Prepared:
    """Load what `build` returned under the same name and key before, or build it and keep it.

    It lives in `<cache_dir>/<name>-<hash of key>/`. Of several processes that ask at once one builds and the others
    wait for it. A folder that cannot be read in full, or whose files are not those that were written, is built anew.

    Args:
        name: the readable part of the folder's name.
        key: everything that the result depends on, the version of the code that makes it included; JSON can write it.
        build: makes the splits and their tokenizer; it is given a folder for files that it needs on the way, which is
            removed once the result is written.
        cache_dir: by default the environment variable XLM_HF_CACHE, else `xlm_hf` in Hugging Face's cache folder.

    Returns:
        The splits, memory-mapped from the folder, and the tokenizer.

    Raises:
        OSError: in one sentence, if the disk is full.
        ValueError: for a name that no folder can have.
    """
    check_file_name("The name of a task", name)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(cache_dir or os.environ.get("XLM_HF_CACHE") or Path(HF_HOME, "xlm_hf"))
    folder = root / f"{name}-{digest}"
    if (prepared := _load_if_intact(folder)) is not None:
        return prepared
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        prepared = _load_if_intact(folder)
        if prepared is None:
            logger.info("Preparing %s in %s", name, folder)
            _remove_leftovers(root)
            _write(folder, key, build)
            prepared = _load(folder)
        return prepared


def _remove_leftovers(root: Path) -> None:
    """Remove what preparations that were killed left behind: nobody holds their locks."""
    for leftover in root.glob(f"*{INCOMPLETE_SUFFIX}"):
        with contextlib.suppress(Timeout), FileLock(root / f"{leftover.stem}.lock", timeout=0):
            shutil.rmtree(leftover, ignore_errors=True)


def _write(folder: Path, key: Mapping[str, Any], build: Callable[[Path], Prepared]) -> None:
    with replaced_folder(folder) as temporary:
        scratch = temporary / "scratch"
        scratch.mkdir()
        splits, tokenizer = build(scratch)
        _save(splits, temporary, scratch)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(scratch)
        # A damaged Arrow file may read as another, or a shorter one, without an error.
        digests = {str(p.relative_to(temporary)): _digest(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        (temporary / _MANIFEST).write_text(json.dumps({"key": key, "digests": digests}, indent=2))


def _save(splits: DatasetDict, folder: Path, scratch: Path) -> None:
    """`save_to_disk`, which moves a split that is one file of the scratch folder instead of copying it."""
    whole: dict[str, Path] = {}
    for name, data in splits.items():
        files = [Path(file["filename"]) for file in data.cache_files]
        if data._indices is None and [file.parent for file in files] == [scratch]:
            whole[name] = files[0]
    # One row of it, for the files beside it.
    short = {name: data.select(range(1)) if name in whole else data for name, data in splits.items()}
    DatasetDict(short).save_to_disk(folder)
    for name, file in whole.items():
        (written,) = (folder / name).glob("*.arrow")
        file.replace(written)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _load(folder: Path) -> Prepared:
    for path, digest in json.loads((folder / _MANIFEST).read_text())["digests"].items():
        if _digest(folder / path) != digest:
            raise ValueError(f"{path} is damaged")
    return DatasetDict.load_from_disk(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def _load_if_intact(folder: Path) -> Prepared | None:
    if not folder.exists():
        return None
    try:
        return _load(folder)
    except Exception as error:  # whatever is wrong with a cache, building it anew mends it
        logger.warning("%s cannot be read (%s) and is prepared anew", folder, error)
        return None

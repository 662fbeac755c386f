"""A disk cache for prepared datasets."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import WeakFileLock
from transformers import PreTrainedTokenizerFast

Prepared = tuple[DatasetDict, PreTrainedTokenizerFast]

_MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)


def cached(
    name: str, key: Mapping[str, Any], build: Callable[[Path], Prepared], cache_dir: str | os.PathLike | None = None
) -> Prepared:
    """Load what `build` returned under the same name and key before, or build it and keep it.

    It lives in `<cache_dir>/<name>-<hash of key>/`. Of several processes that ask at once one builds and the others
    wait for it. A folder that cannot be read in full is built anew.

    Args:
        name: the readable part of the folder's name.
        key: everything that the result depends on, the version of the code that makes it included; JSON can write it.
        build: makes the splits and their tokenizer; it is given a folder for files that it needs on the way, which is
            removed once the result is written.
        cache_dir: by default the environment variable XLM_HF_CACHE, else `xlm_hf` in Hugging Face's cache folder.

    Returns:
        The splits, memory-mapped from the folder, and the tokenizer.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(cache_dir or os.environ.get("XLM_HF_CACHE") or Path(HF_HOME, "xlm_hf"))
    folder = root / f"{name}-{digest}"
    if (prepared := _load_if_intact(folder)) is not None:
        return prepared
    root.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(root / f"{folder.name}.lock"):
        prepared = _load_if_intact(folder)
        if prepared is None:
            logger.info("Preparing %s in %s", name, folder)
            scratch = root / f"{folder.name}.scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                _write(folder, key, *build(scratch))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            prepared = _load(folder)
        return prepared


def _write(folder: Path, key: Mapping[str, Any], splits: DatasetDict, tokenizer: PreTrainedTokenizerFast) -> None:
    temporary = folder.with_name(f"{folder.name}.incomplete")
    for leftover in (temporary, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    splits.save_to_disk(temporary)
    tokenizer.save_pretrained(temporary)
    # An Arrow file cut between two record batches reads as a shorter one without an error: keep the sizes to compare.
    sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
    (temporary / _MANIFEST).write_text(json.dumps({"key": key, "sizes": sizes}, indent=2))
    temporary.rename(folder)


def _load(folder: Path) -> Prepared:
    sizes = json.loads((folder / _MANIFEST).read_text())["sizes"]
    for path, size in sizes.items():
        if (found := (folder / path).stat().st_size) != size:
            raise ValueError(f"{path} has {found} bytes instead of {size}")
    return DatasetDict.load_from_disk(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def _load_if_intact(folder: Path) -> Prepared | None:
    if not folder.exists():
        return None
    try:
        return _load(folder)
    except Exception as error:  # whatever is wrong with a cache, building it anew mends it
        logger.warning("%s cannot be read (%s) and is prepared anew", folder, error)
        return None

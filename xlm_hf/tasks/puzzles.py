"""Puzzles: one shape for all of them.

A puzzle is a file with a *generator* and a *checker*, and a config. The generator makes one puzzle from a random
generator and the options: the words of the prompt and of an answer. The checker scores any answer to a prompt, since
most puzzles have many right ones: `solved` is 1 or 0 and `violations` counts broken rules; the metric `puzzle` averages
them. The words of a prompt may include `[MASK]`: then the answer has a word for each of the prompt, and the task is
infilling.
"""

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from datasets.exceptions import DatasetsError

from xlm_hf.modules.checked_options import Count, PositiveInt, checked
from xlm_hf.modules.counter_random import random_bits
from xlm_hf.tasks import Task
from xlm_hf.tasks.cache import Prepared, cached
from xlm_hf.tasks.corpora import check_columns
from xlm_hf.tasks.tokenizers import NUMBER_TOKENS, symbol_tokenizer

Puzzle: TypeAlias = tuple[list[str], list[str]]
MASK = NUMBER_TOKENS["mask_token"]

# Puzzles drawn before it is looked at how many of them are new.
_ROUND = 1000
_IDS = List(Value("int32"))


def puzzle(symbols: Callable[..., Iterable[str]]) -> Callable[[Callable[..., Puzzle]], Callable[..., Task]]:
    """Make a task of a generator `generate(random, **options)`.

    Puzzle number i of a seed is a function of the seed and i alone, and no prompt occurs twice. The test split holds
    the first ones, validation the next and train the rest, so the number of training examples does not change the
    tests. The function that results takes the options and:

        name: of the task and of its cache folder.
        num_train, num_validation, num_test: examples of the splits.
        seed: of the generator.
        test_path: a file whose puzzles are the test split instead, `.jsonl`, `.csv` or `.parquet`.
        test_columns: its columns of prompts and answers: words, or characters where there are no blanks.
        cache_dir: see `xlm_hf.tasks.cache.cached`.

    Args:
        symbols: the words of the vocabulary, a function of the options.
    """

    def decorated(generate: Callable[..., Puzzle]) -> Callable[..., Task]:
        own = list(inspect.signature(generate).parameters.values())[1:]

        def build(
            name: str,
            num_train: PositiveInt = 20_000,
            num_validation: PositiveInt = 200,
            num_test: PositiveInt = 1_000,
            seed: Count = 42,
            test_path: str | None = None,
            test_columns: tuple[str, str] = ("prompt", "answer"),
            cache_dir: str | os.PathLike | None = None,
            **options: Any,
        ) -> Task:
            sizes = {"test": num_test, "validation": num_validation, "train": num_train}
            options = {**{p.name: p.default for p in own}, **options}
            test = None if test_path is None else (test_path, tuple(test_columns))
            key = {"code": _code(generate), "options": options, "sizes": sizes, "seed": seed, "test": _content(test)}
            made = partial(generate, **options)
            splits, tokenizer = cached(
                name, key, lambda _: _prepare(made, symbols(**options), sizes, seed, test), cache_dir
            )
            kind = "infill" if "input_ids" in splits["train"].column_names else "seq2seq"
            return Task(name, kind, splits, tokenizer, {} if test_path is None else {"test": [Path(test_path)]})

        shared = [p for p in inspect.signature(build).parameters.values() if p.kind is not p.VAR_KEYWORD]
        of_options = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
        build.__signature__ = inspect.Signature([*shared, *of_options])  # type: ignore[attr-defined]
        build.__doc__, build.__name__, build.__module__ = generate.__doc__, generate.__name__, generate.__module__
        build.generate = generate  # type: ignore[attr-defined]
        return checked(build)

    return decorated


def _code(generate: Callable[..., Puzzle]) -> str:
    """A hash of the code that makes the puzzles: other code, other puzzles."""
    files = [Path(inspect.getfile(function)).read_bytes() for function in (generate, puzzle)]
    return hashlib.sha256(b"".join(files)).hexdigest()


def _content(test: tuple[str, tuple[str, ...]] | None) -> Any:
    if test is None:
        return None
    path, columns = test
    if not Path(path).is_file():
        raise ValueError(f"test_path={path!r} is no file: name one with a puzzle in each row.")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest(), columns


def _prepare(
    generate: Callable[[Random], Puzzle],
    symbols: Iterable[str],
    sizes: Mapping[str, int],
    seed: int,
    test: tuple[str, tuple[str, ...]] | None,
) -> Prepared:
    tokenizer = symbol_tokenizer(symbols)
    drawn = _distinct(generate, sum(sizes.values()), seed)
    splits = {split: list(islice(drawn, size)) for split, size in sizes.items()}
    if test is not None:
        splits["test"] = _read(*test)
    return DatasetDict({split: _dataset(rows, tokenizer) for split, rows in splits.items()}), tokenizer


def _distinct(generate: Callable[[Random], Puzzle], count: int, seed: int) -> Iterator[Puzzle]:
    """The first `count` puzzles of the seed's sequence whose prompts differ."""
    known: set[tuple[str, ...]] = set()
    number = 0
    while len(known) < count:
        before = len(known)
        for number in range(number, number + _ROUND):  # noqa: B020
            prompt, answer = generate(Random(int(random_bits(seed, number))))
            if tuple(prompt) not in known:
                known.add(tuple(prompt))
                yield prompt, answer
            if len(known) == count:
                return
        number += 1
        if len(known) - before < _ROUND / 10:
            found = f"only {len(known)} different ones were found before nine in ten draws were repeats"
            raise ValueError(f"{count} puzzles are asked for, and {found}: change the options, or ask for fewer.")


def _read(path: str, columns: tuple[str, ...]) -> list[Puzzle]:
    builder = Path(path).suffix.removeprefix(".").replace("jsonl", "json")
    # As a number a row of digits would lose its zeros.
    as_text = {"converters": dict.fromkeys(columns, str)} if builder == "csv" else {}
    try:
        data = load_dataset(builder, data_files=path, split="train", keep_in_memory=True, **as_text)
    except DatasetsError as error:
        raise ValueError(f"{path} cannot be read with the columns {', '.join(columns)}: set test_columns.") from error
    check_columns(DatasetDict(test=data), columns)
    rows = zip(*(map(str, data[column]) for column in columns), strict=True)
    return [tuple(text.split() if " " in text else list(text) for text in row) for row in rows]  # type: ignore[misc]


def _dataset(rows: list[Puzzle], tokenizer: Any) -> Dataset:
    vocabulary = tokenizer.get_vocab()
    first = "input_ids" if MASK in rows[0][0] else "prompt_ids"
    columns: dict[str, list] = {
        "example_id": list(range(len(rows))),
        first: [[vocabulary[word] for word in prompt] for prompt, _ in rows],
        "target_ids": [[vocabulary[word] for word in answer] for _, answer in rows],
    }
    return Dataset.from_dict(columns, Features({"example_id": Value("int64"), first: _IDS, "target_ids": _IDS}))

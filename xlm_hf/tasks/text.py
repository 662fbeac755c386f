"""Text corpora for language modelling: local files, data sets of the Hub, or the result of a Python function.

A corpus is read, tokenised and written once, by `num_proc` processes and in little memory. The result is Arrow files,
which are memory-mapped from then on. Either each document is an example ("sentence"), or the documents follow one
another and are cut into chunks ("packed").
"""

import logging
import multiprocessing
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerFast

from xlm_hf.data import Mixture
from xlm_hf.modules.checked_options import (
    Count,
    PartialShare,
    Positive,
    PositiveInt,
    check_arguments,
    check_value,
    checked,
)
from xlm_hf.modules.messages import check_options, did_you_mean
from xlm_hf.tasks import Task, for_families
from xlm_hf.tasks.cache import Prepared, cached
from xlm_hf.tasks.corpora import check_columns, content_key, local_files, locate, read
from xlm_hf.tasks.pieces import Piece, encode, pieces_of
from xlm_hf.tasks.tokenizers import ready_tokenizer, tokenizer_key, train_tokenizer

logger = logging.getLogger(__name__)

# Part of the cache key: raise it with every change that makes other examples from the same texts and settings.
PREPARATION_VERSION = 6

# Bytes of examples that are written at a time.
_BYTES_AT_ONCE = 2**22
# What is not an option of the preparation of one corpus.
_NOT_OF_A_CORPUS = ("name", "mixture", "streaming", "num_proc", "cache_dir")
# Parts of a streamed training set whose order is shuffled.
_NUM_SHARDS = 1024
# Rows of a record batch: those of the table that is written.
_ALL = 2**31
# Batches that a process works on at a time, with one copy of the function.
_EACH = 16
# Of the One Billion Word benchmark, in this order: the rules published with arXiv 2310.16834 and 2406.07524.
_LM1B = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(https?) : / / ", r"\1://"),
        (r" '(\w+)", r"'\1"),
        (r" (\w+) \. ", r" \1. "),
        (r" (\w+) \.$", r" \1."),
        *((rf" \{mark}{end}", f"{mark}{space}") for mark in "?!" for end, space in ((" ", " "), ("$", ""))),
        *((f" {mark} ", f"{mark} ") for mark in ",:;"),
        (" / ", "/"),
        *((f"{quote} ([^{quote}]+) {quote}", rf"{quote}\1{quote}") for quote in "\"'"),
        (r"\( ([^()]+) \)", r"(\1)"),
        (r"\[ ([^\[\]]+) \]", r"[\1]"),
        (r"\$ ", "$"),
        ("£ ", "£"),
    )
]


def lm1b(text: str) -> str:
    """Running text from a sentence of the One Billion Word benchmark."""
    for pattern, replacement in _LM1B:
        text = pattern.sub(replacement, text)
    return text


# From the tokenised text of a published corpus back to running text, by the rules that the field uses.
DETOKENIZERS: dict[str, Callable[[str], str]] = {"lm1b": lm1b}


@for_families("canvas_length", "canvas_lengths")
@checked
def text_corpus(
    name: str,
    path: str,
    tokenizer: str = "word",
    vocab_size: PositiveInt = 30_000,
    text_column: str = "text",
    detokenizer: str | None = None,
    protocol: Literal["sentence", "packed"] = "sentence",
    max_length: PositiveInt = 128,
    long_documents: Literal["split", "truncate"] = "split",
    document_masks: bool = True,
    sample_by: Literal["line", "paragraph", "document"] = "line",
    splits: Mapping[str, str] | None = None,
    validation_fraction: PartialShare = 0.05,
    test_fraction: PartialShare = 0.05,
    seed: Count = 42,
    subset: str | None = None,
    revision: str | None = None,
    mixture: list[dict[str, Any]] | None = None,
    streaming: bool = False,
    num_proc: PositiveInt | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Task:
    """A text corpus as a task of language modelling; `docs/tasks.md` describes every option.

    The splits have `example_id`, `input_ids`, `continues` and `num_characters`. `continues` says whether the last
    document goes on in another example, and so has no end in this one. `num_characters` counts those of the original
    text. Chunks with `document_masks` also have `segment_ids`. A chunk without them is a piece of one text that never
    ends.

    With a `mixture` the training set is that of its entries, which are options of this function with a `weight`. The
    path itself gives the tokenizer and the evaluation data. With `streaming` the training set is read in the order of
    its files, shuffled in a buffer.

    Raises:
        ValueError: for an unknown choice, a source that is not there, or a split that cannot be made.
    """
    options = {option: value for option, value in locals().items() if option not in _NOT_OF_A_CORPUS}
    storage: dict[str, Any] = {"num_proc": num_proc, "cache_dir": cache_dir}
    prepared, made = _corpus(name, options, None, **storage)
    splits = dict(prepared)
    where, parts = "An entry of task.mixture", [{**options, **entry} for entry in mixture or []]
    weights = [part.pop("weight", 1.0) for part in parts]
    for entry, part, weight in zip(mixture or [], parts, weights, strict=True):
        check_options(where, entry, ["weight", *options])
        check_value(f"{where}: weight", weight, Positive)
        check_arguments(where, part, text_corpus, given=_NOT_OF_A_CORPUS)
    train = [_corpus(name, part, made, **storage)[0]["train"] for part in parts] or [prepared["train"]]
    if streaming:
        train = [data.to_iterable_dataset(num_shards=min(_NUM_SHARDS, len(data))) for data in train]
    splits["train"] = Mixture(train, weights) if mixture else train[0]
    return Task(name, "lm", splits, made, local_files(locate(path, text_column, options["splits"])))


def _corpus(
    name: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None, num_proc: int | None, cache_dir
) -> Prepared:
    """Prepare one corpus, or take it from the cache; without a `tokenizer` by the one that the options name."""
    if (detokenizer := options["detokenizer"]) is not None and detokenizer not in DETOKENIZERS:
        raise ValueError(f"unknown detokenizer {detokenizer!r}: {did_you_mean(detokenizer, DETOKENIZERS)}")
    source = locate(options["path"], options["text_column"], options["splits"])
    tokenizer = tokenizer or ready_tokenizer(options["tokenizer"])
    key = {
        **options,
        "version": PREPARATION_VERSION,
        "path": content_key(source),
        "tokenizer": options["tokenizer"] if tokenizer is None else tokenizer_key(tokenizer),
    }

    def build(scratch: Path) -> Prepared:
        raw = read(source, {options["text_column"]: False}, scratch, options)
        check_columns(raw, [options["text_column"]])
        detokenize = DETOKENIZERS.get(options["detokenizer"])
        pieces = {
            split: partial(pieces_of, raw[split], options["text_column"], detokenize)
            for split in ("train", "validation", "test")
            if split in raw
        }
        made = tokenizer
        if made is None:
            texts = ([piece.text for piece in batch] for batch in pieces["train"](None, []))
            made = train_tokenizer(options["tokenizer"], texts, options["vocab_size"])
        prepared: dict[str, Dataset] = {}
        known = np.zeros(0, np.int64)
        for split, make in pieces.items():
            hashes = array("q")
            data = _prepare(make(made, hashes), made, options, num_proc, scratch / f"{split}.arrow")
            if not len(data):
                raise ValueError(f"the split {split!r} of {options['path']} has no token: give it documents with text.")
            if split == "train":
                known = np.frombuffer(hashes, np.int64)
                known.sort()
            else:
                note_shared(split, data, hashes, known)
            prepared[split] = data
        return DatasetDict(prepared), made

    return cached(name, key, build, cache_dir)


def _prepare(
    batches: Iterator[list[Piece]], tokenizer: PreTrainedTokenizerFast, options: dict, num_proc: int | None, file: Path
) -> Dataset:
    """Tokenise the documents of a split and make examples of them, in an Arrow file."""
    is_packed, masks = options["protocol"] == "packed", options["document_masks"]
    end_of_text = [tokenizer.eos_token_id] if is_packed and not masks else []
    tokenize = partial(_tokenized, tokenizer, end_of_text, 0 if is_packed else options["max_length"])
    features = {
        "example_id": Value("int64"),
        "input_ids": List(Value("uint16" if len(tokenizer) <= 2**16 else "int32")),
        "continues": Value("bool"),
        "num_characters": Value("int64"),
    }
    if is_packed and masks:
        features["segment_ids"] = List(Value("uint16" if options["max_length"] <= 2**16 else "int32"))
    examples = _Examples(options)
    with ArrowWriter(features=Features(features), path=str(file), writer_batch_size=_ALL) as writer:
        waiting: list[pa.Table] = []
        for tokens in in_order(tokenize, batches, num_proc):
            waiting.append(examples(*tokens))
            # Many small record batches would take long to be looked up, and be mapped as a whole.
            if sum(table.nbytes for table in waiting) > _BYTES_AT_ONCE:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        writer.write_table(pa.concat_tables([*waiting, examples.rest()]))
        writer.finalize()
    return Dataset.from_file(str(file))


def _tokenized(
    tokenizer: PreTrainedTokenizerFast, end_of_text: list[int], whole: int, pieces: list[Piece]
) -> tuple[np.ndarray, ...]:
    """Of a batch of pieces (ids, document, characters): each token, its document's number, and its characters.

    Args:
        tokenizer: of the task.
        end_of_text: what stands behind each document.
        whole: most tokens of a document that stays whole, of which only the sum of characters counts.
        pieces: of the documents.
    """
    encoded = encode(tokenizer, [piece.text for piece in pieces])
    ids = [
        [*encoding.ids, *(end_of_text if piece.ends else [])] for encoding, piece in zip(encoded, pieces, strict=True)
    ]
    ends: list[int] = []
    for piece, tokens, encoding in zip(pieces, ids, encoded, strict=True):
        # Of a document that stays whole reading the offsets of its tokens takes time.
        is_whole = piece.ends and len(tokens) <= whole
        ends += [0] * (len(tokens) - 1) if is_whole else [end for _, end in encoding.offsets[: len(tokens) - 1]]
        ends += [len(piece.text)] * bool(tokens)
    lengths = np.array([len(tokens) for tokens in ids])
    # The characters of a token are those since the end of the token before it; the last one takes what is left.
    characters = np.diff(np.array(ends, np.int64), prepend=0)
    first = (np.cumsum(lengths) - lengths)[lengths > 0]
    characters[first] = np.array(ends, np.int64)[first]
    document = np.repeat([piece.document for piece in pieces], lengths)
    return np.fromiter(chain(*ids), np.int32), document, characters


class _Examples:
    """Makes examples of tokens that come in batches, in their order.

    An example that goes on in the next batch waits for it. The last one of a packed split is shorter. So nothing is
    dropped but documents without a token, and what `truncate` says.
    """

    def __init__(self, options: Mapping[str, Any]):
        self.is_packed = options["protocol"] == "packed"
        self.has_segments = self.is_packed and options["document_masks"]
        self.max_length = options["max_length"]
        self.truncate = options["long_documents"] == "truncate" and not self.is_packed
        self.num_examples = 0
        # Ids, numbers of documents, characters and positions of the tokens that wait for others.
        self.waiting = (np.zeros(0, np.int32), *np.zeros((3, 0), np.int64))

    def __call__(self, ids: np.ndarray, document: np.ndarray, characters: np.ndarray) -> pa.Table:
        """The examples that are complete with these tokens; the arguments are what `_tokenized` returns."""
        _, last_document, _, last_position = (values[-1:] for values in self.waiting)
        # Positions count from the start of a document, or of the split.
        group, last_group = (numbers * (not self.is_packed) for numbers in (document, last_document))
        first = np.flatnonzero(np.diff(group, prepend=-1))
        position = np.arange(len(ids)) - np.repeat(first, np.diff(first, append=len(ids)))
        position[np.isin(group, last_group)] += sum(last_position + 1)
        kept = position < self.max_length if self.truncate else slice(None)
        tokens = (values[kept] for values in (ids, document, characters, position))
        self.waiting = tuple(map(np.concatenate, zip(self.waiting, tokens, strict=True)))
        return self._made(is_end=False)

    def rest(self) -> pa.Table:
        """The last example."""
        return self._made(is_end=True)

    def _made(self, is_end: bool) -> pa.Table:
        ids, document, characters, position = self.waiting
        starts = np.flatnonzero(position % self.max_length == 0)
        end = len(ids) if is_end else sum(starts[-1:])
        next_document = np.append(document, -1)
        self.waiting = tuple(values[end:] for values in self.waiting)
        ids, document, characters, starts = ids[:end], document[:end], characters[:end], starts[starts < end]
        offsets = np.append(starts, end).astype(np.int32)
        continues = document[offsets[1:] - 1] == next_document[offsets[1:]]
        if self.is_packed and not self.has_segments:
            continues[:] = True
        columns = {
            "example_id": pa.array(self.num_examples + np.arange(len(starts))),
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
            "continues": pa.array(continues),
            "num_characters": pa.array(np.diff(np.append(0, characters.cumsum())[offsets])),
        }
        if self.has_segments:
            number = np.cumsum(np.diff(document, prepend=document[:1]) > 0).astype(np.int32)
            segments = number - np.repeat(number[starts], np.diff(offsets))
            columns["segment_ids"] = pa.ListArray.from_arrays(offsets, pa.array(segments))
        self.num_examples += len(starts)
        return pa.table(columns)


def note_shared(split: str, data: Dataset, hashes: Sequence[int], known: np.ndarray) -> None:
    """Say, and write into the description of a split, how many of its documents are training documents too.

    Args:
        split: its name.
        data: its examples.
        hashes: of its documents.
        known: the hashes of the training documents, sorted.
    """
    found = np.searchsorted(known, hashes).clip(max=len(known) - 1)
    if num_shared := int((known[found] == hashes).sum()):
        data.info.description = f"{num_shared:,} of its {len(hashes):,} documents are in the training set too."
        logger.warning("%s: %s", split, data.info.description)


def in_order(function: Callable, batches: Iterator[Any], num_proc: int | None) -> Iterator[Any]:
    """What a function makes of each batch, by several processes, with few batches in memory."""
    if num_proc is None or num_proc < 2:
        yield from map(function, batches)
        return
    with multiprocessing.Pool(num_proc) as pool:
        while group := [*islice(batches, _EACH * num_proc)]:
            yield from pool.map(function, group, _EACH)

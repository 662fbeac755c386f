"""Long documents in pieces, cut where the tokens are those of the whole, so that little text is held at a time."""

import ctypes
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

# Documents, and bytes of text, that are tokenised at a time: the library needs some 250 bytes for each token.
BATCH_SIZE, BATCH_BYTES = 10_000, 2**18
# Characters on either side of a cut through a long document whose tokens must be the same without it.
_WINDOW = 128
# Advice to `madvise` of Linux; unlike others it loses nothing of memory that lies in no file.
_PAGEOUT = 21
_SYSTEM = ctypes.CDLL(None) if sys.platform == "linux" else None


def release(buffers: Iterable[pa.Buffer | None]) -> None:
    """Let the system take back the memory of buffers that lie in a mapped file; it is read again when it is needed."""
    if _SYSTEM is None:
        return
    for address, size in {(buffer.address, buffer.size) for buffer in buffers if buffer}:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        _SYSTEM.madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(0, address + size - start)), _PAGEOUT)


def buffers_of(table: pa.Table) -> Iterator[pa.Buffer | None]:
    """The buffers of a table, with those of neighbouring rows in them."""
    return chain.from_iterable(chunk.buffers() for column in table.columns for chunk in column.chunks)


class Piece(NamedTuple):
    """Text of a document, or a piece of a long one.

    Attributes:
        document: its number.
        text: the piece, detokenised.
        ends: whether the document ends with it.
    """

    document: int
    text: str
    ends: bool


def pieces_of(
    documents: Dataset,
    column: str,
    detokenize: Callable[[str], str] | None,
    tokenizer: PreTrainedTokenizerFast | None,
    hashes: MutableSequence[int],
) -> Iterator[list[Piece]]:
    """The documents in batches of at most `BATCH_SIZE` and some `BATCH_BYTES`, long ones in pieces.

    Without a tokenizer the pieces are for training one. The hashes of the documents with text are appended to `hashes`.
    """
    batch: list[Piece] = []
    size, number = 0, 0
    for table in documents.select_columns([column]).with_format("arrow").iter(BATCH_SIZE):
        for document, buffer in _views(table[column]):
            if detokenize is not None:
                document = memoryview(detokenize(str(document, "utf-8")).encode())
            fingerprint = 0
            for text, ends in _cut_up(document, tokenizer):
                fingerprint = hash((fingerprint, text))
                batch.append(Piece(number, text, ends))
                size += len(text)
                if len(batch) == BATCH_SIZE or size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
                    release([buffer])
            if document:
                hashes.append(fingerprint)
            number += 1
        release(buffers_of(table))
    if batch:
        yield batch


def _views(column: pa.ChunkedArray) -> Iterator[tuple[memoryview, pa.Buffer | None]]:
    """The bytes of each text, and the buffer in which they lie: no copy, since a document may be large."""
    for chunk in column.chunks:
        texts = pc.fill_null(chunk, "") if chunk.null_count else chunk
        texts = texts.cast(pa.large_string())
        _, offsets, buffer = texts.buffers()
        ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1].tolist()
        for start, end in pairwise(ends):
            yield memoryview(buffer or b"")[start:end], buffer


def _cut_up(document: memoryview, tokenizer: PreTrainedTokenizerFast | None) -> Iterator[tuple[str, bool]]:
    """Pieces of a document, and whether each is the last."""
    start, length = 0, BATCH_BYTES
    while start + length < len(document):
        text = str(document[start : start + length], "utf-8", "ignore")
        if cut := _cut(text, tokenizer):
            yield text[:cut], False
            start, length = start + len(text[:cut].encode()), BATCH_BYTES
        else:
            length *= 2
    yield str(document[start:], "utf-8"), True


def _cut(text: str, tokenizer: PreTrainedTokenizerFast | None) -> int:
    """Where a text can be cut so that its pieces have the tokens of the whole, near its end; 0 if nowhere."""
    last = len(text) - _WINDOW
    blanks = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", text[:last][-4096:])]
    cuts = [max(last - 4096, 0) + start for start in blanks[:-17:-1]]
    if tokenizer is None:
        return cuts[0] if cuts else last * (len(text) > 16 * BATCH_BYTES)
    for cut in [*cuts, *range(last, last - 64, -1)]:
        before, after = text[cut - _WINDOW : cut], text[cut : cut + _WINDOW]
        whole, left, right = (encoding.ids for encoding in encode(tokenizer, [before + after, before, after]))
        if whole == left + right:
            return cut
    return 0


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Encoding]:
    """The tokens of texts as they are, without special tokens, truncation or padding."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    # A special token's name in a text is text.
    backend.encode_special_tokens = True
    return backend.encode_batch(texts, add_special_tokens=False)

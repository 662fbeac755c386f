"""Tokenizers of numbers, words, bytes, or any fast tokenizer, with the special tokens that the families need."""

from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import WordLevelTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# Of `number_tokenizer`, in the order of the published checkpoints of star graphs.
NUMBER_TOKENS = {
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "eos_token": "[EOS]",
    "bos_token": "[BOS]",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
}
# Of texts, in which nothing is separated.
SPECIAL_TOKENS = {role: token for role, token in NUMBER_TOKENS.items() if role != "sep_token"}


def number_tokenizer(num_labels: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whitespace-separated words: `NUMBER_TOKENS` in their order, then "0" .. "num_labels - 1"."""
    words = [*NUMBER_TOKENS.values(), *map(str, range(num_labels))]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = Tokenizer(WordLevel(vocabulary, unk_token=NUMBER_TOKENS["unk_token"]))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, **NUMBER_TOKENS)


def word_tokenizer(texts: Iterator[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of words and punctuation marks: the special tokens, then the most frequent words of `texts`.

    Args:
        texts: batches of texts.
        vocab_size: most entries of the vocabulary; every other word is `[UNK]`.
    """
    model = Tokenizer(WordLevel(unk_token=SPECIAL_TOKENS["unk_token"]))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = WordLevelTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False)
    model.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL_TOKENS)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of UTF-8 bytes: the special tokens, then the 256 bytes; it loses nothing and knows every text."""
    symbols = [*SPECIAL_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL_TOKENS)


def pretrained_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or Hub id, with the special tokens that it lacks added at the end.

    The end and the beginning of a text, padding, `[CLS]` and the mask must be five different tokens: one that has two
    of these roles keeps the first.

    Raises:
        ValueError: if it cannot be loaded or is not a fast tokenizer.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer {source!r} cannot be loaded ({str(error).splitlines()[0]}): choose 'word', 'byte', a "
            "folder or a Hub id."
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {source!r} has no tokenizer.json: choose a fast one.")
    taken: set[str] = set()
    missing: dict[str, str] = {}
    for role in ("eos_token", "bos_token", "pad_token", "cls_token", "mask_token"):
        token = getattr(tokenizer, role)
        if token is None or str(token) in taken:
            missing[role] = token = SPECIAL_TOKENS[role]
        taken.add(str(token))
    tokenizer.add_special_tokens(missing)
    return tokenizer

"""Tokenizers of symbols, words, characters, bytes or pieces, with the special tokens that the families need."""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordLevelTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Of `symbol_tokenizer`, in the order of the published checkpoints of star graphs.
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

# Tokenizers that are made from the training set, by the name of the option; `regex:PATTERN` beside them.
TRAINED = ("word", "whitespace", "char", "bpe", "unigram")
_REGEX = "regex:"
# A tokenizer's vocabulary of characters has no limit.
_ALL = 2**31
# Stands behind the bracket of a special token's name in a text, so that the name is a word like any other.
_AS_TEXT = "\ue000"


def number_tokenizer(num_labels: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whitespace-separated words: `NUMBER_TOKENS` in their order, then "0" .. "num_labels - 1"."""
    return symbol_tokenizer(map(str, range(num_labels)))


def symbol_tokenizer(symbols: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whitespace-separated words: `NUMBER_TOKENS` in their order, then the `symbols`."""
    vocabulary = {word: i for i, word in enumerate([*NUMBER_TOKENS.values(), *symbols])}
    model = Tokenizer(WordLevel(vocabulary, unk_token=NUMBER_TOKENS["unk_token"]))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.decoder = _words()
    return PreTrainedTokenizerFast(tokenizer_object=model, **NUMBER_TOKENS)


def ready_tokenizer(name: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer of bytes, or that of a folder or Hub id; None for a name of which `train_tokenizer` makes one."""
    if name in TRAINED or name.startswith(_REGEX):
        return None
    return byte_tokenizer() if name == "byte" else pretrained_tokenizer(name)


def train_tokenizer(name: str, texts: Iterator[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `SPECIAL_TOKENS` and then what `texts` hold.

    The name of a special token in a text is text. Every token is decoded as what it was in the text; a word is decoded
    with a blank before it, so that a prompt and its continuation join.

    Args:
        name: "word" for words and punctuation marks; "whitespace" for what stands between blanks; "char" for all
            characters; "regex:PATTERN" for the matches of a pattern and what is between them; "bpe" or "unigram" for
            pieces of words, learnt from the texts (Sennrich et al., arXiv 1508.07909; Kudo, arXiv 1804.10959), which
            together with the 256 bytes can write any text.
        texts: batches of texts.
        vocab_size: most entries of the vocabulary, but for "char". What is not among them is `[UNK]`, except in pieces.

    Raises:
        ValueError: for a pattern that is none, or a vocabulary that is too small for the special tokens and the bytes.
    """
    least = len(SPECIAL_TOKENS) + {"bpe": 256, "unigram": 256}.get(name, 1)
    if vocab_size < least and name != "char":
        raise ValueError(f"vocab_size={vocab_size} must be at least {least} for the tokenizer {name!r}: raise it.")
    if name in ("bpe", "unigram"):
        return _piece_tokenizer(name, texts, vocab_size)
    unknown, special = SPECIAL_TOKENS["unk_token"], list(SPECIAL_TOKENS.values())
    model = Tokenizer(WordLevel(unk_token=unknown))
    if name == "word":
        model.pre_tokenizer, model.decoder = pre_tokenizers.Whitespace(), _words()
    elif name == "whitespace":
        model.pre_tokenizer, model.decoder = pre_tokenizers.WhitespaceSplit(), _words()
    else:
        # A character class of everything, since the dot leaves out the end of a line.
        pattern = r"[\s\S]" if name == "char" else name.removeprefix(_REGEX)
        try:
            model.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
        except Exception as error:  # what the library raises
            raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error
        model.decoder = decoders.Fuse()
    if name == "whitespace" or name.startswith(_REGEX):
        names = "|".join(token[1:] for token in special)
        pattern = rf"\[(?={names.replace(']', re.escape(']'))})"
        model.normalizer = normalizers.Replace(Regex(pattern), f"[{_AS_TEXT}")
        model.decoder = decoders.Sequence([decoders.Replace(_AS_TEXT, ""), model.decoder])
    size = _ALL if name == "char" else vocab_size
    model.train_from_iterator(texts, WordLevelTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL_TOKENS)


def _words() -> decoders.Decoder:
    """A blank before every word."""
    return decoders.Replace(Regex(r"\A"), " ")


def _piece_tokenizer(name: str, texts: Iterator[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": list(SPECIAL_TOKENS.values()),
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    model = Tokenizer(BPE() if name == "bpe" else Unigram())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    is_bpe = name == "bpe"
    trainer = BpeTrainer(**options) if is_bpe else UnigramTrainer(unk_token=SPECIAL_TOKENS["unk_token"], **options)
    model.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL_TOKENS)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of UTF-8 bytes: the special tokens, then the 256 bytes; it loses nothing and knows every text."""
    symbols = [*SPECIAL_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL_TOKENS)


def joining_blank(tokenizer: PreTrainedTokenizerBase) -> str:
    """The blank that `decode` writes before every token of a vocabulary of words; nothing for other vocabularies."""
    return " " if str(tokenizer.decode([tokenizer.pad_token_id])).startswith(" ") else ""


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids that continue nothing: without the blank that joins words to a prompt before them."""
    return str(tokenizer.decode(ids)).removeprefix(joining_blank(tokenizer))


def with_prompt_layout(tokenizer: Any, head: Sequence[int], tail: Sequence[int]) -> Any:
    """A copy that puts special tokens around a text, as a family's prompts have them; preparation leaves them out.

    Where the tokens of a vocabulary are joined by no decoder, the copy decodes a blank before each.

    Args:
        tokenizer: of a task.
        head: ids before a prompt (see `xlm_hf.objectives.collators.Collator`).
        tail: ids after it.
    """
    copied = copy.deepcopy(tokenizer)
    for name in ("add_bos_token", "add_eos_token"):
        # What would replace the layout when the copy is loaded.
        copied.init_kwargs.pop(name, None)
    before, after = copied.convert_ids_to_tokens(list(head)), copied.convert_ids_to_tokens(list(tail))
    special = list(zip([*before, *after], [*head, *tail], strict=True))
    backend = copied.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=special)
    backend.decoder = backend.decoder or _words()
    return copied


def pretrained_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or Hub id, with the special tokens that it lacks added at the end.

    The end and the beginning of a text, padding, `[CLS]` and the mask must be five different tokens: one that has two
    of these roles keeps the first.

    Raises:
        ValueError: if it cannot be loaded or is not a fast tokenizer.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of many kinds, if a file holds something else
        raise ValueError(
            f"the tokenizer {source!r} cannot be loaded ({str(error).splitlines()[0]}): choose 'byte', "
            f"{', '.join(map(repr, TRAINED))}, 'regex:PATTERN', a folder or a Hub id."
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {source!r} has no tokenizer.json: choose a fast one.")
    ids = {*tokenizer.get_vocab().values()}
    if free := sorted({*range(max(ids))} - ids):
        # A new token gets the number of tokens for its id, which would be in use.
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        if not isinstance(content["model"]["vocab"], dict):
            raise ValueError(f"the tokenizer {source!r} leaves the id {free[0]} out: choose one without gaps.")
        content["model"]["vocab"].update({f"[unused {number}]": number for number in free})
        names = tokenizer.special_tokens_map
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)
    taken: set[str] = set()
    missing: dict[str, str] = {}
    for role in ("eos_token", "bos_token", "pad_token", "cls_token", "mask_token"):
        token = getattr(tokenizer, role)
        if token is None or str(token) in taken:
            missing[role] = token = SPECIAL_TOKENS[role]
        taken.add(str(token))
    tokenizer.add_special_tokens(missing)
    return tokenizer


def tokenizer_key(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of all that decides how a tokenizer encodes."""
    content = tokenizer.backend_tokenizer.to_str() + str(sorted(tokenizer.special_tokens_map.items()))
    return hashlib.sha256(content.encode()).hexdigest()

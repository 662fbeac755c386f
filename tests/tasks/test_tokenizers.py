import random

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from xlm_hf.tasks.tokenizers import (
    SPECIAL_TOKENS,
    byte_tokenizer,
    decode_text,
    joining_blank,
    number_tokenizer,
    pretrained_tokenizer,
    ready_tokenizer,
    symbol_tokenizer,
    train_tokenizer,
)

SMILES = r"regex:\[[^\]]+\]|Br|Cl|%\d\d|."
OF_WORDS = ("word", "whitespace")
TRAINED = (*OF_WORDS, "char", SMILES, "bpe", "unigram")
PIECES = [
    "the",
    " cat",
    ",",
    " ",
    "  ",
    "\n",
    "\t",
    "<unk>",
    "u.s.",
    "é",
    "漢字",
    "C(=O)",
    "Br",
    "[nH]",
    "12",
    "%12",
    "'s",
]
PIECES += [f"{blank}{token}" for token in SPECIAL_TOKENS.values() for blank in ("", " ")]


def texts(count, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(0, 12))) for _ in range(count)]


def trained(name, seed=0, vocab_size=400):
    return train_tokenizer(name, iter([texts(150, seed), texts(150, seed + 1)]), vocab_size)


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_encoded_is_decoded_before_and_after_saving(name, tmp_path):
    made = trained(name)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        special = set(tokenizer.all_special_ids)
        assert special == set(range(6))
        for text in texts(100, 0):
            ids = encoded(tokenizer, text)
            back = decode_text(tokenizer, ids)
            # The name of a special token in a text is text.
            assert not special & set(ids)
            assert encoded(tokenizer, back) == ids
            if name == "word":
                assert back.split() == tokenizer.convert_ids_to_tokens(ids)
                assert "".join(back.split()) == "".join(text.split())
            else:
                assert back == (" ".join(text.split()) if name == "whitespace" else text)


@pytest.mark.parametrize("name", [*TRAINED, "byte"])
def test_a_prompt_and_its_continuation_join(name):
    tokenizer = byte_tokenizer() if name == "byte" else trained(name)
    text = "the cat , u.s. the cat"
    ids = encoded(tokenizer, text)
    whole = decode_text(tokenizer, ids)
    for cut in range(1, len(ids)):
        # As the pipeline of transformers does: the text of the user, and what the new tokens are decoded as.
        assert decode_text(tokenizer, ids[:cut]) + tokenizer.decode(ids[cut:]) == whole
    assert joining_blank(tokenizer) == (" " if name in OF_WORDS else "")


def test_numbers_join_too():
    tokenizer = number_tokenizer(20)
    assert "1 2" + tokenizer.decode(tokenizer("3 19")["input_ids"]) == "1 2 3 19"
    assert decode_text(tokenizer, tokenizer("3 19")["input_ids"]) == "3 19"
    assert decode_text(symbol_tokenizer(["+", "x"]), [8, 7, 2]) == "x + [MASK]"


def test_whole_words_between_blanks_and_the_most_frequent_ones():
    tokenizer = train_tokenizer("whitespace", iter([["u.s. <unk> u.s. a", "u.s. <unk> b"]]), 8)
    assert tokenizer.convert_ids_to_tokens([6, 7]) == ["u.s.", "<unk>"]
    assert encoded(tokenizer, "<unk> a u.s.") == [7, tokenizer.unk_token_id, 6]


def test_characters_are_those_of_the_training_set():
    tokenizer = train_tokenizer("char", iter([["ab\n"], ["é"]]), 1)
    assert set(tokenizer.get_vocab()) - set(SPECIAL_TOKENS.values()) == {"a", "b", "\n", "é"}
    assert encoded(tokenizer, "axb")[1] == tokenizer.unk_token_id


def test_a_pattern_makes_the_tokens():
    tokenizer = train_tokenizer(SMILES, iter([["CCl[nH]Br%12C"]]), 100)
    assert tokenizer.convert_ids_to_tokens(encoded(tokenizer, "CBr[nH]%12Cl")) == ["C", "Br", "[nH]", "%12", "Cl"]
    # What stands between two matches is a token too.
    words = train_tokenizer(r"regex:\d", iter([["ab1c2"]]), 100)
    assert words.convert_ids_to_tokens(encoded(words, "ab2c1")) == ["ab", "2", "c", "1"]


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_pieces_are_learnt_from_the_texts_and_write_any_text(name):
    corpus = ["low lower lowest newer newest wider"] * 20
    tokenizer = train_tokenizer(name, iter([corpus]), 300)
    assert 262 < len(tokenizer) <= 300
    assert len(encoded(tokenizer, "lower newest")) <= 6
    assert decode_text(tokenizer, encoded(tokenizer, "Ünseen 漢字")) == "Ünseen 漢字"


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"^'\(' is no regular expression: "):
        train_tokenizer("regex:(", iter([["a"]]), 10)


@pytest.mark.parametrize(("name", "least"), [("word", 7), (SMILES, 7), ("bpe", 262), ("unigram", 262)])
def test_a_vocabulary_that_is_too_small_is_refused(name, least):
    with pytest.raises(ValueError, match=rf"vocab_size={least - 1} must be at least {least} for the tokenizer"):
        train_tokenizer(name, iter([["a b"]]), least - 1)
    assert len(train_tokenizer(name, iter([["a b"]]), least)) <= least


def test_which_names_are_made_from_the_training_set():
    assert [ready_tokenizer(name) for name in TRAINED] == [None] * len(TRAINED)
    assert len(ready_tokenizer("byte")) == 262
    with pytest.raises(ValueError, match=r"the tokenizer 'wrod' cannot be loaded .*: choose 'byte', 'word', .*regex"):
        ready_tokenizer("wrod")


def test_a_vocabulary_with_gaps_gets_its_special_tokens_beyond_the_largest_id(tmp_path):
    words = {"a": 0, "b": 2, "c": 9, "<unk>": 12}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    ).save_pretrained(tmp_path)
    tokenizer = pretrained_tokenizer(str(tmp_path))
    assert {name: number for name, number in tokenizer.get_vocab().items() if number <= 12 and name in words} == words
    special = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}
    assert len(special) == 4
    assert min(special) == 13
    assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1

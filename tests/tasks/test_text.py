import json
import random
import re

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xlm_hf.tasks import load_task, pieces, text
from xlm_hf.tasks.corpora import UNUSED, locate
from xlm_hf.tasks.tokenizers import byte_tokenizer, decode_text, pretrained_tokenizer

WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it"]


def documents(count, longest=30, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(documents(200)) + "\n")
    return file


def load(path, tmp_path, **options):
    return load_task("text", path=str(path), cache_dir=tmp_path / "cache", **options)


def all_ids(task, split):
    return [token for ids in task.splits[split]["input_ids"][:] for token in ids]


def reference_chunks(ids_of_documents, length):
    """Chunks token by token: ids, the number of the document within the chunk, and whether its last one is cut off."""
    stream = [(token, number) for number, ids in enumerate(ids_of_documents) for token in ids]
    chunks = []
    for start in range(0, len(stream), length):
        part, rest = stream[start : start + length], stream[start + length :]
        numbers = sorted({number for _, number in part})
        goes_on = any(number == part[-1][1] for _, number in rest)
        chunks.append(([token for token, _ in part], [numbers.index(number) for _, number in part], goes_on))
    return chunks


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".csv", ".tsv"])
def test_every_format_gives_the_same_examples(suffix, corpus, tmp_path):
    texts = corpus.read_text().splitlines()
    file = tmp_path / f"other{suffix}"
    if suffix == ".txt":
        file.write_text(corpus.read_text())
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps({"other": 1, "content": line}) + "\n" for line in texts))
    elif suffix == ".parquet":
        Dataset.from_dict({"content": texts}).to_parquet(file)
    else:
        separator = "," if suffix == ".csv" else "\t"
        file.write_text("".join(f"{row}{separator}0\n" for row in ["content", *texts]))
    column = {} if suffix == ".txt" else {"text_column": "content"}
    task, expected = load(file, tmp_path, **column), load(corpus, tmp_path)
    for split in ("train", "validation", "test"):
        assert task.splits[split][:] == expected.splits[split][:]
    decoded = {decode_text(task.tokenizer, ids) for data in task.splits.values() for ids in data["input_ids"][:]}
    assert decoded == set(texts)


def test_drawn_splits_are_disjoint_complete_and_seeded(corpus, tmp_path):
    def texts(task):
        return {name: [tuple(ids) for ids in data["input_ids"][:]] for name, data in task.splits.items()}

    corpus.write_text("\n".join(f"{number} word" for number in range(100)))
    first = texts(load(corpus, tmp_path, tokenizer="byte", validation_fraction=0.2, test_fraction=0.1))
    assert {name: len(rows) for name, rows in first.items()} == {"train": 70, "validation": 20, "test": 10}
    assert len({row for rows in first.values() for row in rows}) == 100
    other = texts(load(corpus, tmp_path, tokenizer="byte", validation_fraction=0.2, test_fraction=0.1, seed=1))
    assert set(first["test"]) != set(other["test"])
    none = texts(load(corpus, tmp_path, tokenizer="byte", validation_fraction=0, test_fraction=0))
    assert list(none) == ["train"]


def test_splits_are_read_where_they_are(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, count in (("train", 20), ("valid", 3), ("test", 4)):
        (folder / f"{name}.txt").write_text("\n".join(documents(count)))
    task = load(folder, tmp_path)
    assert {name: len(data) for name, data in task.splits.items()} == {"train": 20, "validation": 3, "test": 4}
    (folder / "train.txt").unlink()
    with pytest.raises(
        ValueError, match=r"no training set, only validation, test: .* task.splits=\{train: validation\}"
    ):
        load(folder, tmp_path)
    task = load(folder, tmp_path, splits={"train": "validation", "validation": "test[:2]", "test": "test[2:]"})
    assert {name: len(data) for name, data in task.splits.items()} == {"train": 3, "validation": 2, "test": 2}


def split_names(folder, *names, splits=None):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[]")
    found = locate(str(folder), "text", splits)
    return {split: [file.relative_to(folder).as_posix() for file in files] for split, files in found.items()}


def test_only_what_is_called_like_a_split_is_one(tmp_path):
    named = ["train.txt", "a/dev/0.txt", "test.txt"]
    others = ["latest.txt", "test_scaffolds.txt", "tests/1.txt", "training_notes.txt", "a/test.old.txt"]
    assert split_names(tmp_path / "one", *named, *others, "README.md") == {
        **{"train": ["train.txt"], "validation": ["a/dev/0.txt"], "test": ["test.txt"]},
        UNUSED: sorted(others),
    }
    chosen = split_names(tmp_path / "one", splits={"train": "train[:9]", "test": "test_scaffolds[3:]"})
    assert chosen["train"] == ["train.txt"]
    assert chosen["test_scaffolds"] == ["test_scaffolds.txt"]
    assert "test.txt" in chosen[UNUSED]
    assert set(chosen) == {"train", "test_scaffolds", UNUSED}

    shards = ["plain/train-00000-of-00002.txt", "plain/train-00001-of-00002-0af.txt"]
    assert split_names(tmp_path / "two", *shards, "ptb.valid.txt", "test_1.txt", "plain/test/train.txt") == {
        **{"train": sorted([*shards, "plain/test/train.txt"])},
        **{"validation": ["ptb.valid.txt"], "test": ["test_1.txt"]},
    }
    # Without any, all are the training set, of the format that most have.
    assert split_names(tmp_path / "three", "a.txt", "b.txt", "info.json") == {
        "train": ["a.txt", "b.txt"],
        UNUSED: ["info.json"],
    }


def test_the_files_of_a_split_are_its_examples(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, count in (("train", 20), ("test", 4), ("test_scaffolds", 3)):
        Dataset.from_dict({"text": documents(count)}).to_parquet(folder / f"{name}.parquet")
    task = load(folder, tmp_path)
    assert {name: len(data) for name, data in task.splits.items()} == {"train": 19, "validation": 1, "test": 4}
    assert task.files == {
        "test": [folder / "test.parquet"],
        "train": [folder / "train.parquet"],
        UNUSED: [folder / "test_scaffolds.parquet"],
    }
    task = load(folder, tmp_path, splits={"train": "train", "test": "test_scaffolds"})
    assert len(task.splits["test"]) == 3
    (folder / "train.txt").write_text("one\n")
    # Each file is read by its own format.
    assert len(load(folder, tmp_path).splits["train"]) == 20
    with pytest.raises(ValueError, match=r"has no data that it is asked for: choose files of \.txt, .* end with \.gz"):
        load(folder, tmp_path, splits={"train": "nothing"})


def test_a_folder_is_prepared_again_if_a_file_that_is_used_changes(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "test", "notes"):
        (folder / f"{name}.txt").write_text("one two\n" * 9)

    def prepared():
        load(folder, tmp_path)
        return len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()])

    assert prepared() == 1
    (folder / "notes.txt").write_text("other\n")
    assert prepared() == 1
    (folder / "test.txt").write_text("other\n")
    assert prepared() == 2


@pytest.mark.parametrize("batch", [7, 1000])
@pytest.mark.parametrize("document_masks", [True, False])
def test_packed_chunks_are_those_of_the_whole_stream(batch, document_masks, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "BATCH_SIZE", batch)
    whole = load(corpus, tmp_path, validation_fraction=0, test_fraction=0, max_length=10**6)
    ids = whole.splits["train"]["input_ids"][:]
    if not document_masks:
        ids = [[*row, whole.tokenizer.eos_token_id] for row in ids]
    task = load(
        corpus,
        tmp_path,
        protocol="packed",
        max_length=16,
        document_masks=document_masks,
        validation_fraction=0,
        test_fraction=0,
    )
    train = task.splits["train"]
    expected = reference_chunks(ids, 16)
    assert train["input_ids"][:] == [chunk for chunk, _, _ in expected]
    assert 0 < len(train["input_ids"][-1]) < 16
    assert train["example_id"][:] == list(range(len(expected)))
    if document_masks:
        assert train["segment_ids"][:] == [numbers for _, numbers, _ in expected]
        assert train["continues"][:] == [goes_on for _, _, goes_on in expected]
        assert len(set(train["continues"][:])) == 2
    else:
        assert "segment_ids" not in train.column_names
        assert all(train["continues"][:])


@pytest.mark.parametrize("batch", [7, 1000])
def test_long_documents_are_split_or_truncated(batch, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "BATCH_SIZE", batch)
    options = {"validation_fraction": 0, "test_fraction": 0}
    whole = load(corpus, tmp_path, **options, max_length=10**6).splits["train"]["input_ids"][:]
    split = load(corpus, tmp_path, **options, max_length=8).splits["train"]
    assert split["input_ids"][:] == [ids[at : at + 8] for ids in whole for at in range(0, len(ids), 8)]
    assert split["example_id"][:] == list(range(len(split)))
    assert split["continues"][:] == [at + 8 < len(ids) for ids in whole for at in range(0, len(ids), 8)]
    cut = load(corpus, tmp_path, **options, max_length=8, long_documents="truncate").splits["train"]
    assert cut["input_ids"][:] == [ids[:8] for ids in whole]
    assert not any(cut["continues"][:])


def characters_by_a_loop(tokenizer, texts, has_end=False):
    """Each token of the texts with its document and the characters since the token before it, one token at a time."""
    tokens = []
    for number, sample in enumerate(texts):
        before = 0
        offsets = tokenizer(sample, return_offsets_mapping=True, split_special_tokens=True)["offset_mapping"]
        offsets += [(None, None)] * has_end
        for place, (_, end) in enumerate(offsets):
            end = len(sample) if place == len(offsets) - 1 else end
            tokens.append((number, end - before))
            before = end
    return tokens


@pytest.mark.parametrize("tokenizer", ["word", "byte"])
def test_characters_are_those_of_the_original_text(tokenizer, tmp_path, monkeypatch):
    """Spaces, unknown words, letters of several bytes and the ends of lines count as what they are in the text."""
    monkeypatch.setattr(pieces, "BATCH_SIZE", 7)
    rng, words = random.Random(0), ["the", "of ", " the  ", "Zürich", "漢字", ",", " unseen-word "]
    texts = ["".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(40)]
    data = DatasetDict(train=Dataset.from_dict({"text": texts}))
    data["train"].to_parquet(tmp_path / "texts.parquet")
    options = {"tokenizer": tokenizer, "validation_fraction": 0, "test_fraction": 0, "vocab_size": 10}

    def examples(**more):
        task = load(tmp_path / "texts.parquet", tmp_path, **options, **more)
        return task.tokenizer, task.splits["train"]

    made, whole = examples(max_length=1000)
    assert whole["num_characters"][:] == list(map(len, texts))
    if tokenizer == "word":
        # The text that the tokens give back is shorter.
        decoded = [len(made.decode(ids, skip_special_tokens=True)) for ids in whole["input_ids"][:]]
        assert sum(decoded) < 0.9 * sum(map(len, texts))
    tokens = characters_by_a_loop(made, texts)
    by_document = [[n for number, n in tokens if number == document] for document in range(40)]
    split = [sum(row[at : at + 5]) for row in by_document for at in range(0, len(row), 5)]
    assert examples(max_length=5)[1]["num_characters"][:] == split
    cut = [sum(row[:5]) for row in by_document]
    assert examples(max_length=5, long_documents="truncate")[1]["num_characters"][:] == cut
    for document_masks in (True, False):
        tokens = characters_by_a_loop(made, texts, has_end=not document_masks)
        packed = [sum(n for _, n in tokens[at : at + 16]) for at in range(0, len(tokens), 16)]
        made_of = examples(max_length=16, protocol="packed", document_masks=document_masks)[1]
        assert made_of["num_characters"][:] == packed


def test_documents_of_a_text_file(tmp_path):
    file = tmp_path / "poem.txt"
    file.write_text("one\ntwo\n\nthree\n\nfour\n")
    options = {"validation_fraction": 0, "test_fraction": 0, "tokenizer": "byte"}

    def texts(**more):
        task = load(file, tmp_path, **options, **more)
        return [decode_text(task.tokenizer, ids) for ids in task.splits["train"]["input_ids"][:]]

    assert texts() == ["one", "two", "three", "four"]
    assert [line.strip() for line in texts(sample_by="paragraph")] == ["one\ntwo", "three", "four"]
    assert texts(sample_by="document") == [file.read_text()]


def test_the_byte_tokenizer_loses_nothing(tmp_path):
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 262
    for sample in ("Ünïcode 漢字 \t two  spaces\n", "[MASK] is text"):
        ids = tokenizer(sample, split_special_tokens=True)["input_ids"]
        assert len(ids) == len(sample.encode())
        assert tokenizer.decode(ids) == sample
    tokenizer.save_pretrained(tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).decode(ids) == sample


def test_special_tokens_in_a_text_are_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("a [MASK] b [EOS]\n" * 10)
    for kind in ("word", "byte"):
        task = load(file, tmp_path, tokenizer=kind)
        assert not set(all_ids(task, "train")) & set(task.tokenizer.all_special_ids)


def test_the_word_vocabulary_is_of_the_training_set_by_frequency(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.txt").write_text("b a, a\n")
    (folder / "test.txt").write_text("c a\n")
    task = load(folder, tmp_path, vocab_size=8, validation_fraction=0)
    tokenizer = task.tokenizer
    assert tokenizer.convert_ids_to_tokens([6, 7]) == ["a", ","]
    assert task.splits["train"]["input_ids"][:] == [[tokenizer.unk_token_id, 6, 7, 6]]
    assert task.splits["test"]["input_ids"][:] == [[tokenizer.unk_token_id, 6]]


def save_tokenizer(folder, **special):
    """A stand-in for a published tokenizer: byte-level pieces, with the special tokens of its kind."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = Tokenizer(models.BPE(vocabulary, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("special", "added"),
    [
        (dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"), "[BOS] [PAD] [CLS] [MASK]"),
        (
            {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
            | {"mask_token": "[MASK]"},
            "[EOS] [BOS]",
        ),
        ({}, "[EOS] [BOS] [PAD] [CLS] [MASK]"),
    ],
)
def test_missing_special_tokens_are_added_and_differ(special, added, corpus, tmp_path):
    folder = save_tokenizer(tmp_path / "tokenizer", **special)
    before = len(PreTrainedTokenizerFast.from_pretrained(folder))
    tokenizer = pretrained_tokenizer(folder)
    assert set(tokenizer.convert_ids_to_tokens(range(before, len(tokenizer)))) == set(added.split())
    roles = [getattr(tokenizer, f"{role}_token_id") for role in ("eos", "bos", "pad", "cls", "mask")]
    assert len(set(roles)) == 5
    task = load(corpus, tmp_path, tokenizer=folder)
    assert task.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert task.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert decode_text(task.tokenizer, task.splits["train"][0]["input_ids"]) in corpus.read_text().splitlines()


def published_lm1b(x):
    """The published rules, as they are published: one replacement after the other (SEDD's and MDLM's data.py)."""
    for old, new in (("http : / / ", "http://"), ("https : / / ", "https://")):
        x = x.replace(old, new)
    for old, new in ((r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1.")):
        x = re.sub(old, new, x)
    for mark in "?!":
        x = x.replace(f" {mark} ", f"{mark} ")
        x = re.sub(rf" \{mark}$", mark, x)
    for old, new in ((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")):
        x = x.replace(old, new)
    for old in (r'" ([^"]+) "', r"' ([^']+) '", r"\( ([^\(\)]+) \)", r"\[ ([^\[\]]+) \]"):
        x = re.sub(old, lambda match: match[0][0] + match[1] + match[0][-1], x)
    return x.replace("$ ", "$").replace("£ ", "£")


def test_the_lm1b_rules():
    assert text.lm1b('He said , " it \'s 5 % of $ 3 ( or so ) . "') == 'He said, "it\'s 5 % of $3 (or so) ."'
    assert text.lm1b("See http : / / a.b / c ! Why ?") == "See http://a.b/c! Why?"
    rng = random.Random(0)
    pieces = ["it", "'s", "the", *".?!,:;/\"'()[]$£5\n", "http", "https"]
    for _ in range(3000):
        sample = " ".join(rng.choices(pieces, k=rng.randint(1, 14)))
        assert text.lm1b(sample) == published_lm1b(sample)


def test_a_published_corpus_from_a_folder_in_its_place(tmp_path):
    """The layout of the Parquet conversion on the Hub, which cannot be reached here."""
    for split, count in (("train", 40), ("test", 60)):
        (tmp_path / "lm1b" / "plain_text" / split).mkdir(parents=True)
        texts = [f"{line} , he said ." for line in documents(count, longest=200)]
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "lm1b" / "plain_text" / split / "0000.parquet")
    special = {"mask_token": "[MASK]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    task = load_task(
        "lm1b",
        path=str(tmp_path / "lm1b"),
        tokenizer=save_tokenizer(tmp_path / "tokenizer", **special),
        cache_dir=tmp_path / "cache",
    )
    assert {name: len(data) for name, data in task.splits.items()} == {"train": 40, "validation": 2, "test": 60}
    lengths = [len(ids) for ids in task.splits["test"]["input_ids"][:]]
    assert max(lengths) == 128
    short = min(task.splits["test"]["input_ids"][:], key=len)
    assert re.search(r"\w, he said\.$", decode_text(task.tokenizer, short))


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        """
from datasets import Dataset, DatasetDict

def texts():
    return [f"text {number}" for number in range(50)]

def dataset():
    return Dataset.from_dict({"text": texts()})

def splits():
    return DatasetDict(train=dataset(), validation=Dataset.from_dict({"text": ["a", "b"]}), test=dataset())

def lists():
    return {"train": texts(), "validation": ["a", "b"], "test": texts()}

def number():
    return 3

def nothing_at_all():
    return {}
"""
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_python_function(own_data, tmp_path):
    by_list, by_dataset = (load(f"own_data:{name}", tmp_path, tokenizer="byte") for name in ("texts", "dataset"))
    assert by_list.splits["train"][:] == by_dataset.splits["train"][:]
    assert len(by_list.splits["train"]) == 46
    by_splits, by_lists = (load(f"own_data:{name}", tmp_path, tokenizer="byte") for name in ("splits", "lists"))
    assert by_splits.splits["validation"][:] == by_lists.splits["validation"][:]
    assert decode_text(by_splits.tokenizer, by_splits.splits["validation"][1]["input_ids"]) == "b"


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("missing.txt", {}, r"there is no file or folder 'missing.txt': name one .* a Hub id .* or a Python function"),
        ("own_data:nothing", {}, r"the function 'own_data:nothing' cannot be imported"),
        ("own_data:nothing_at_all", {}, r"own_data:nothing_at_all has no training set, only nothing: say which"),
        ("own_data:number", {}, r"own_data:number returned a int: a data function returns"),
        ("own_data:texts", {"protocol": "pakced"}, r"protocol must be one of sentence, packed and is 'pakced'"),
        ("own_data:texts", {"detokenizer": "lm1"}, r"unknown detokenizer 'lm1': did you mean 'lm1b'\?"),
        ("own_data:texts", {"text_column": "txt"}, r"the tokenizer '/no/such' cannot be loaded"),
        ("own_data:dataset", {"text_column": "txt"}, r"split 'train' has no column 'txt': did you mean 'text'\?"),
        (
            "own_data:texts",
            {"test_fraction": 0.99},
            r"50 documents with text are too few to draw the sets validation, test from",
        ),
        ("own_data:texts", {"max_length": 0}, r"max_length must be at least 1 and is 0"),
    ],
)
def test_mistakes_end_in_one_sentence(path, options, message, own_data, tmp_path):
    if "tokenizer" in message:
        options = {**options, "tokenizer": "/no/such"}
    with pytest.raises(ValueError, match=message) as error:
        load(path, tmp_path, **options)
    assert "\n" not in str(error.value)


def test_a_mixture_shares_the_tokenizer_and_leaves_the_evaluation_alone(corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"content": f"the of {number}"}) + "\n" for number in range(40)))
    plain = load(corpus, tmp_path)
    entries = [{"path": str(corpus), "weight": 3}, {"path": str(other), "text_column": "content"}]
    task = load(corpus, tmp_path, mixture=entries)
    mixture = task.splits["train"]
    assert mixture.weights == [3, 1.0]
    assert mixture.sets[0][:] == plain.splits["train"][:]
    assert {decode_text(task.tokenizer, ids) for ids in mixture.sets[1]["input_ids"][:]} == {"the of [UNK]"}
    assert all(task.splits[name][:] == plain.splits[name][:] for name in ("validation", "test"))
    with pytest.raises(ValueError, match=r"entry of task.mixture has no option 'wieght': did you mean 'weight'\?"):
        load(corpus, tmp_path, mixture=[{"path": str(corpus), "wieght": 3}])


def test_a_stream_holds_the_prepared_examples(corpus, tmp_path):
    for options in ({}, {"protocol": "packed", "max_length": 16}):
        plain = load(corpus, tmp_path, **options).splits["train"]
        task = load(corpus, tmp_path, streaming=True, **options)
        assert isinstance(task.splits["train"], IterableDataset)
        assert list(task.splits["train"]) == list(plain)
        assert isinstance(task.splits["validation"], Dataset)
    entries = [{"path": str(corpus), "weight": 2}, {"path": str(corpus), "seed": 1}]
    mixture = load(corpus, tmp_path, streaming=True, mixture=entries).splits["train"]
    assert all(isinstance(one, IterableDataset) for one in mixture.sets)


def test_what_the_cache_depends_on(corpus, tmp_path, monkeypatch):
    """The same again is a hit that does not tokenise; any change of an option, a tokenizer or the file is not."""
    folder = save_tokenizer(tmp_path / "tokenizer")
    prepared = []
    prepare = text._prepare
    monkeypatch.setattr(text, "_prepare", lambda *args: prepared.append(1) or prepare(*args))

    def is_hit(**options):
        prepared.clear()
        load(corpus, tmp_path, **{"tokenizer": folder, **options})
        return not prepared

    assert not is_hit()
    assert is_hit()
    assert is_hit(num_proc=2)
    for options in ({"max_length": 64}, {"protocol": "packed"}, {"seed": 1}, {"detokenizer": "lm1b"}):
        assert not is_hit(**options)
        assert is_hit(**options)
    assert not is_hit(protocol="packed", document_masks=False)
    assert not is_hit(tokenizer="word")
    assert not is_hit(tokenizer="word", vocab_size=9)
    corpus.rename(tmp_path / "moved.txt")
    (tmp_path / "moved.txt").rename(corpus)
    assert is_hit()
    corpus.write_text(corpus.read_text().replace("the", "teh", 1))
    assert not is_hit()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["the of"])
    tokenizer.save_pretrained(folder)
    assert not is_hit()
    assert not list((tmp_path / "cache").glob("*.scratch"))


def test_several_processes_make_the_same_examples(corpus, tmp_path):
    one = load(corpus, tmp_path, protocol="packed", max_length=16)
    many = load_task(
        "text", path=str(corpus), cache_dir=tmp_path / "many", protocol="packed", max_length=16, num_proc=2
    )
    for name, data in one.splits.items():
        assert many.splits[name][:] == data[:]
        assert data.cache_files


def test_empty_and_missing_texts_are_left_out(tmp_path):
    data = DatasetDict(train=Dataset.from_dict({"text": ["a b", "", None, "   ", "c"] * 4}))
    data["train"].to_parquet(tmp_path / "holes.parquet")
    for protocol, expected in (("sentence", 8), ("packed", 1)):
        task = load(tmp_path / "holes.parquet", tmp_path, protocol=protocol, validation_fraction=0, test_fraction=0)
        assert len(task.splits["train"]) == expected
    assert task.splits["train"][0]["segment_ids"] == list(np.repeat(range(8), [2, 1] * 4))

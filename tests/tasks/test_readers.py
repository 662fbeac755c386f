"""Local files of texts: what is hashed is what is read, and what cannot be read is said with file, line and cause."""

import gzip
import json
import re

import pytest
from datasets import Dataset, Features, List, Value

from xlm_hf.tasks import load_task, pieces
from xlm_hf.tasks.readers import read_files
from xlm_hf.tasks.tokenizers import decode_text

ROWS = [f"row {number}" for number in range(40)]
LINES = "".join(f"{row}\n" for row in ROWS).encode()
OBJECTS = [json.dumps({"text": row}) for row in ROWS]


def jsonl(*rows):
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()


def load(path, tmp_path, **options):
    options = {"tokenizer": "byte", "max_length": 64, "validation_fraction": 0, "test_fraction": 0, **options}
    return load_task("text", path=str(path), cache_dir=tmp_path / "cache", **options)


def texts_of(task, split="train"):
    return [decode_text(task.tokenizer, ids) for ids in task.splits[split]["input_ids"][:]]


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("all")


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("files", "path", "expected"),
    [
        ({"data.csv": b"text\n" + LINES.replace(b"row", b"apple")}, ".", ["apple 0", "apple 1"]),
        ({"data.csv": b"text\n" + LINES.replace(b"row", b"banana")}, ".", ["banana 0", "banana 1"]),
        ({"DATA.TXT": LINES.replace(b"row", b"upper")}, ".", ["upper 0", "upper 1"]),
        ({"a.txt.gz": gzip.compress(LINES.replace(b"row", b"zipped"))}, "a.txt.gz", ["zipped 0", "zipped 1"]),
        ({"[ab].txt": b"class\n" * 3, "a.txt": LINES}, "[ab].txt", ["class", "class", "class"]),
        ({"a[1] b=c,d.txt": b"odd name\n" * 2}, "a[1] b=c,d.txt", ["odd name", "odd name"]),
        (
            {"test_of_time.txt": b"time\n", "train_to_pakistan.txt": b"train\n", "z.txt": b"z"},
            ".",
            ["time", "train", "z"],
        ),
        ({"nulls.jsonl": jsonl({"text": None}, {"x": 1}, {"text": "a"}, {"text": ""})}, "nulls.jsonl", ["a"]),
        ({"dates.jsonl": jsonl({"text": "2024-01-01T00:00:00"})}, "dates.jsonl", ["2024-01-01T00:00:00"]),
        (
            {"bom.jsonl": b"\xef\xbb\xbf" + jsonl({"text": "a"}, "", {"text": "b\u2028c"})},
            "bom.jsonl",
            ["a", "b\u2028c"],
        ),
        ({"list.json": json.dumps([{"text": "a"}, {"text": "b"}], indent=1).encode()}, "list.json", ["a", "b"]),
        ({"seps.txt": "a\u2028b\x85c\x1cd\r\ne\n".encode()}, "seps.txt", ["a\u2028b\x85c\x1cd", "e"]),
        ({"0.jsonl": jsonl({"text": "a", "id": 1}), "1.jsonl": jsonl({"text": "b", "id": "x"})}, ".", ["a", "b"]),
        ({"train/a.txt": b"a\n", "train/b.jsonl": jsonl({"text": "b"})}, ".", ["a", "b"]),
        ({"a.txt": b"a\n", ".hidden.txt": b"no\n", ".git/b.txt": b"no\n"}, ".", ["a"]),
        ({"quoted.csv": b'text,n\n"a, ""b""\nc",1\nNA,2\n7,3\n'}, "quoted.csv", ['a, "b"\nc', "NA", "7"]),
    ],
)
def test_each_source_gives_its_own_texts(files, path, expected, one_cache, tmp_path):
    put(tmp_path, files)
    # One cache for all of them, in which a wrong key would find the texts of another.
    task = load(tmp_path / path, one_cache)
    assert texts_of(task)[: len(expected)] == expected


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"README.md": b"#"}, "has no data that it is asked for: choose files of .txt, .jsonl,"),
        ({"zero.txt": b""}, "zero.txt has no text: the split 'train' would be empty."),
        ({"empties.txt": b"\n" * 40}, "0 documents with text are too few"),
        ({"n.jsonl": jsonl({"text": 0})}, "n.jsonl, line 1: the column 'text' holds an integer (0) and not a text"),
        ({"l.jsonl": jsonl({"text": ["a", "b"]})}, "l.jsonl, line 1: the column 'text' holds a list (['a', 'b'])"),
        ({"latin1.txt": LINES + "é\n".encode("latin1")}, "latin1.txt is not UTF-8: line 41 has the byte 0xe9 at"),
        ({"utf16.txt": "ab\n".encode("utf-16")}, "utf16.txt is not UTF-8: line 1 has the byte 0xff at position 1"),
        ({"t.jsonl": jsonl(*OBJECTS) + b'{"text": "cut'}, "t.jsonl, line 41, column 10, is no JSON: Unterminated"),
        ({"d.jsonl": b'{"text": "a", "text": "b"}\n'}, "line 1, column 1, is no JSON: of the names text, text one"),
        ({"s.jsonl": b'{"text": "row \\ud83d"}\n'}, "the column 'text' holds half of a surrogate pair ('\\ud83d')"),
        ({"a.jsonl": b"3\n"}, "a.jsonl, line 1: '3' is not an object with columns."),
        ({"a.csv": b"text\none\ntwo,three\n"}, "a.csv cannot be read behind line 2: the next row has more"),
        ({"a.parquet": b"PAR1 no"}, "a.parquet cannot be read behind line 0"),
        ({"a.txt.gz": b"no"}, "a.txt.gz cannot be read behind line 0: Not a gzipped file"),
        ({"a.jsonl": jsonl({"txt": "a"})}, "split 'train' has no column 'text': did you mean 'txt'?"),
        ({"a.txt": b"a\n", "b.jsonl": jsonl({"text": "b"})}, "has files of several formats (.jsonl, .txt) and none is"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_ends_in_one_sentence(files, sentence, tmp_path):
    put(tmp_path / "folder", files)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        load(tmp_path / "folder", tmp_path, test_fraction=0.1)
    assert "\n" not in str(error.value)


def test_documents_without_text_are_in_no_drawn_split(tmp_path):
    put(tmp_path, {"half.jsonl": jsonl(*({"text": row if number % 2 else None} for number, row in enumerate(ROWS)))})
    task = load(tmp_path / "half.jsonl", tmp_path, validation_fraction=0.1, test_fraction=0.1)
    assert {name: len(data) for name, data in task.splits.items()} == {"train": 16, "validation": 2, "test": 2}


def test_documents_of_the_training_set_in_others_are_counted(tmp_path, caplog):
    put(tmp_path / "folder", {"train.txt": LINES, "test.txt": b"row 3\nrow 7\nnew\nrow 3\n"})
    for _ in range(2):
        task = load(tmp_path / "folder", tmp_path)
        # From the cache too.
        assert task.splits["test"].info.description == "3 of its 4 documents are in the training set too."
    assert "test: 3 of its 4 documents" in caplog.text


def test_lists_of_texts_and_columns_of_columns(tmp_path):
    rows = [{"pair": {"en": "a", "de": ["b", "", "c"]}}, {"pair": {"en": None, "de": "d"}}, {"other": 1}]
    put(tmp_path, {"a.jsonl": jsonl(*rows)})
    kinds = Features({"pair": {"en": Value("string"), "de": List(Value("string"))}})
    Dataset.from_list([{"pair": {"en": "e", "de": ["f"]}}], features=kinds).to_parquet(tmp_path / "b.parquet")
    data, names = read_files(
        [tmp_path / "a.jsonl", tmp_path / "b.parquet"], {"pair.en": False, "pair.de": True}, tmp_path / "out.arrow"
    )
    assert data["pair.en"][:] == ["a", "", "", "e"]
    assert data["pair.de"][:] == [["b", "c"], ["d"], [], ["f"]]
    assert names == {"pair.en", "pair.de", "other"}


@pytest.mark.parametrize("tokenizer", ["byte", "word", "bpe"])
@pytest.mark.parametrize("options", [{"protocol": "packed"}, {"max_length": 7}, {"long_documents": "truncate"}])
def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(tokenizer, options, tmp_path, monkeypatch):
    long = " ".join(f"wörd{number} and, {number % 7}  漢字" for number in range(300))
    put(tmp_path, {"a.txt": f"short\n{long}\n\nlast one\n{'x' * 1500}\n".encode()})

    def examples(folder):
        task = load(tmp_path / "a.txt", tmp_path / folder, tokenizer=tokenizer, vocab_size=400, **options)
        return task.splits["train"][:]

    whole = examples("whole")
    monkeypatch.setattr(pieces, "BATCH_BYTES", 1000)
    made = []
    make = pieces.Piece
    monkeypatch.setattr(pieces, "Piece", lambda *args: made.append(args) or make(*args))
    assert examples("pieces") == whole
    assert sum(not ends for _, _, ends in made) > 5

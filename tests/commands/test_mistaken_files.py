"""Files and folders that a command names: what cannot be read ends in a sentence and a status, the rest is read.

The kinds of files are those that people have: other encodings, exports of other tools, what a download left.
"""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from tests.commands import call
from xlm_hf.building import compose
from xlm_hf.cli import _one_sentence
from xlm_hf.commands import generate, prepare_data
from xlm_hf.families import families
from xlm_hf.modules.backbone_config import token_options
from xlm_hf.tasks.tokenizers import byte_tokenizer

PREPARE = ["family=mlm", "task=text", "task.tokenizer=byte", "task.max_length=64", "size=tiny", "job=prepare_data"]
ROWS = [f"row {number}" for number in range(40)]
LINES = "".join(f"{row}\n" for row in ROWS)


def objects(*values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


def parquet(values, kind=None):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.array(values, kind)}), sink)
    return sink.getvalue().to_pybytes()


def compressed(text, cut=0):
    content = gzip.compress(text.encode())
    return content[: len(content) - cut]


def folder_of(**files):
    """Files by name, in which `__` stands for a dot."""
    return {name.replace("__", "."): content for name, content in files.items()}


UNREADABLE = [
    ("missing.txt", None, "there is no file or folder 'missing.txt'"),
    ("a.txt", b"", "a.txt has no text: the split 'train' would be empty"),
    ("a.txt", b"\n" * 40, "0 documents with text are too few"),
    ("a.txt", b" \t \n" * 40, "0 documents with text are too few"),
    ("a.txt", b"one\n", "1 documents with text are too few"),
    ("a.txt", (LINES + "é").encode("latin1"), "a.txt is not UTF-8: line 41 has the byte 0xe9 at position 1"),
    ("a.txt", LINES.encode("utf-16"), "a.txt is not UTF-8: line 1 has the byte 0xff at position 1"),
    ("a.txt", LINES.encode("utf-32"), "a.txt is not UTF-8: line 1 has the byte 0xff"),
    ("a.txt", b"\xed\xa0\x80\n" * 40, "a.txt is not UTF-8: line 1 has the byte 0xed"),
    ("a.txt.gz", compressed(LINES, cut=9), "a.txt.gz cannot be read behind line"),
    ("a.txt.gz", LINES.encode(), "a.txt.gz cannot be read behind line 0: Not a gzipped file"),
    ("a.txt.zip", b"PK\3\4", "a.txt.zip is of no kind that can be read"),
    ("a.pdf", b"%PDF", "a.pdf is of no kind that can be read"),
    ("a.jsonl", objects(*range(40)), "a.jsonl, line 1: the column 'text' holds an integer (0) and not a text"),
    ("a.jsonl", objects("a", ["b", "c"]), "a.jsonl, line 2: the column 'text' holds a list (['b', 'c'])"),
    ("a.jsonl", objects({"b": 1}), "line 1: the column 'text' holds an object ({'b': 1})"),
    ("a.jsonl", objects(True), "line 1: the column 'text' holds a bool (True)"),
    ("a.jsonl", objects(1e400), "line 1: the column 'text' holds a float (inf)"),
    ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: Exceeds the limit (4300 digits)"),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000, "a.jsonl cannot be read behind line 0: maximum recursion"),
    ("a.jsonl", objects(*ROWS) + b'{"text": "cut', "a.jsonl, line 41, column 10, is no JSON: Unterminated string"),
    ("a.jsonl", b'{"text": "a", "text": "b"}\n', "a.jsonl, line 1, column 1, is no JSON: of the names text, text one"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl, line 1: the column 'text' holds half of a surrogate pair"),
    ("a.jsonl", objects("a").decode().encode("utf-16"), "a.jsonl"),
    ("a.jsonl", b"row 0\n", "a.jsonl, line 1, column 1, is no JSON"),
    ("a.jsonl", objects(*ROWS).replace(b"text", b"txet"), "has no column 'text': did you mean 'txet'?"),
    ("a.csv", b"text,n\na,1\nb,2,3\n", "a.csv cannot be read behind line 2: the next row has more fields"),
    ("a.csv", b'text\n"open\n' + b"x\n" * 9, "a.csv cannot be read behind line"),
    ("a.csv", b"a,b\n1,2\n", "has no column 'text'"),
    ("a.csv", b"text\na\0b\n" * 3, None),
    ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read behind line 0"),
    ("a.parquet", parquet([1, 2, 3]), "a.parquet, line 1: the column 'text' holds an integer (1)"),
    ("a.parquet", parquet([1.5, 2.5]), "a.parquet, line 1: the column 'text' holds a float (1.5)"),
    ("a.parquet", parquet([["a"], ["b"]]), "a.parquet, line 1: the column 'text' holds a list"),
    ("a.parquet", parquet([b"a", b"\xff"], pa.binary()), "a.parquet, line 2: the column 'text'"),
    ("folder", {}, "folder has no data that it is asked for: choose files of .txt, .jsonl"),
    ("folder", folder_of(README__md=b"#", script__py=b""), "folder has no data that it is asked for"),
    ("folder", folder_of(a__txt=b"a\n", b__jsonl=objects("b")), "has files of several formats (.jsonl, .txt)"),
    ("folder", folder_of(test__txt=LINES.encode()), "has no training set, only test"),
    ("folder", folder_of(train__txt=LINES.encode(), test__txt=b""), "test.txt has no text: the split 'test' would"),
    ("loop.txt", "link:loop.txt", "there is no file or folder 'loop.txt'"),
    ("link.txt", "link:nowhere.txt", "there is no file or folder 'link.txt'"),
    ("pipe.txt", "pipe", "pipe.txt"),
    ("a.txt", {"b.md": b""}, "a.txt has no data that it is asked for"),
]


def put(path, content):
    if isinstance(content, dict):
        path.mkdir()
        for name, inner in content.items():
            put(path / name, inner)
    elif content == "pipe":
        os.mkfifo(path)
    elif isinstance(content, str):
        path.symlink_to(content.removeprefix("link:"))
    elif content is not None:
        path.write_bytes(content)


def ended(capsys, folder, monkeypatch, job):
    """The same of a job whose config was composed before, which a command line takes longer to do than all the rest."""
    monkeypatch.chdir(folder)
    status = 0
    try:
        with _one_sentence():
            job()
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture
def prepared(monkeypatch, tmp_path):
    monkeypatch.setenv("XLM_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(("name", "content", "words"), UNREADABLE)
def test_files_that_cannot_be_read(name, content, words, prepared, monkeypatch, capsys):
    put(prepared / name, content)
    status, out, err = call(monkeypatch, capsys, prepared, *PREPARE, f"task.path='{name}'")
    if words is None:
        assert status == 0, err
        return
    assert (status, words in err) == (2, True), err + out
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert not list(prepared.glob("cache/*.incomplete"))


@pytest.fixture(scope="module")
def composed():
    return compose(
        "config", [*PREPARE, "experiment=files", "task.path=none", "task.validation_fraction=0", "task.test_fraction=0"]
    )


READABLE = [
    ("[ab].txt", {"[ab].txt": LINES.replace("row", "class").encode(), "a.txt": LINES.encode()}, "class 0"),
    ("a[1] b=c,d.txt", {"a[1] b=c,d.txt": LINES.replace("row", "odd").encode()}, "odd 0"),
    ("c.csv", {"c.csv": ("text,n\n" + "".join(f'"{row}, it said",1\n' for row in ROWS)).encode()}, "row 0, it said"),
    ("upper", {"upper": {"DATA.TXT": LINES.replace("row", "upper").encode()}}, "upper 0"),
    ("hidden", {"hidden": {"a.txt": LINES.encode(), ".b.txt": b"no\n", "README.md": b"# x"}}, "row 0"),
    ("mixed", {"mixed": {f"{n}.jsonl": objects(*ROWS[20 * n :][:20]) for n in range(2)}}, "row 0"),
    ("nulls.jsonl", {"nulls.jsonl": objects(*[None] * 40, *ROWS)}, ""),
    ("bom.txt", {"bom.txt": b"\xef\xbb\xbf" + LINES.encode()}, "row 0"),
    ("crlf.txt", {"crlf.txt": LINES.replace("\n", "\r\n").encode()}, "row 0"),
    ("nul.txt", {"nul.txt": LINES.replace("row", "r\0w").encode()}, "r\0w 0"),
    ("special.txt", {"special.txt": LINES.replace("row", "[MASK] <s> [EOS]").encode()}, "[MASK] <s> [EOS] 0"),
    ("uniseps.txt", {"uniseps.txt": LINES.replace("row", "a\u2028b\x85c").encode()}, "a\u2028b\x85c 0"),
    ("日本語 #1~.txt", {"日本語 #1~.txt": LINES.encode()}, "row 0"),
    ("linked", {"real": {"a.txt": LINES.encode()}, "linked": "link:real"}, "row 0"),
    ("ring", {"ring": {"a.txt": LINES.encode(), "again": "link:../ring"}}, "row 0"),
    ("a.parquet", {"a.parquet": parquet(ROWS, pa.dictionary(pa.int32(), pa.string()))}, "row 0"),
    ("b.parquet", {"b.parquet": parquet(ROWS, pa.large_string())}, "row 0"),
    ("c.parquet", {"c.parquet": parquet([row.encode() for row in ROWS], pa.binary())}, "row 0"),
    ("a.txt.gz", {"a.txt.gz": compressed(LINES)}, "row 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "text"), READABLE)
def test_files_of_odd_kinds_are_read(name, files, text, composed, prepared, monkeypatch, capsys):
    for file, content in files.items():
        put(prepared / file, content)
    cfg = OmegaConf.merge(composed, {"task": {"path": name}})
    status, out, err = ended(capsys, prepared, monkeypatch, lambda: prepare_data.run(cfg))
    assert status == 0, err
    assert f"\n  input: {text}" in out


TOKENIZERS = [
    ({}, "the tokenizer 'tok' cannot be loaded"),
    ({"tokenizer.json": b"{"}, "the tokenizer 'tok' cannot be loaded"),
    ({"tokenizer.json": b"[]"}, "the tokenizer 'tok' cannot be loaded"),
    ({"tokenizer.json": b"\x80\x02}q\x00."}, "the tokenizer 'tok' cannot be loaded"),
]


@pytest.mark.parametrize(("files", "words"), TOKENIZERS)
def test_tokenizers_that_cannot_be_loaded(files, words, prepared, monkeypatch, capsys):
    put(prepared / "tok", files)
    put(prepared / "a.txt", LINES.encode())
    status, _, err = call(monkeypatch, capsys, prepared, *PREPARE, "task.path=a.txt", "task.tokenizer=tok")
    assert (status, words in err) == (2, True), err
    assert err.count("\n") == 1


PROMPTS = [
    (b"", 2, "is empty: write one JSON object"),
    (b"\n\n \n", 2, "is empty: write one JSON object"),
    (b'[{"prompt": "ab"}]', 0, None),
    (b'"just a string"', 2, "line 1: 'just a string' is not an object"),
    (b'{"prompt": "line 1"}\n\n{"prompt": "x"}\n', 0, None),
    (b'\xef\xbb\xbf{"prompt": "line 1"}\r\n{"prompt": "ab"}', 0, None),
    ('{"prompt": "😀 é שלום"}'.encode(), 0, None),
    ('{"prompt": "a\u2028b"}\n{"prompt": "c\x85d"}'.encode(), 0, None),
    (b'{"prompt": ""}\n{"prompt": "ab"}', 0, None),
    (b'{"prompt": "a", "id": 7, "example_id": 1}', 0, None),
    (b'{"prompt": "a\\u0000b [PAD] [EOS] [CLS]"}', 0, None),
    (b'{"prompt": "a[MASK]b[MASK]"}', 0, None),
    (b'{"prompt": "a[MASK]b"}\n{"prompt": "no blank"}', 2, "blank"),
    (b'{"prompt": "a\\ud83d"}', 2, "line 1: prompt holds half of a surrogate pair ('\\ud83d'): repair it."),
    (b'{"prompt": ["a", "b"]}', 2, "line 1: prompt must be a string and is ['a', 'b']"),
    (b'{"prompt": [{"role": "user", "content": "a"}]}', 2, "line 1: prompt must be a string"),
    (b'{"prompt": "caf\xe9"}', 2, "is not UTF-8: line 1 has the byte 0xe9"),
    (b'{"prompt_ids": [99999]}', 2, "line 1: prompt_ids must be in [0, 262)"),
    (b'{"prompt_ids": [7.5, 8]}', 2, "line 1: prompt_ids must be a list of integers"),
    (b'{"prompt_ids": [1e999]}', 2, "line 1: prompt_ids must be a list of integers"),
    (b'{"prompt_ids": [' + b"9" * 5000 + b"]}", 2, "prompts.jsonl, line 1: Exceeds"),
    (b'{"prompt_ids": []}', 0, None),
    (b'{"prompt": "' + b"x" * 500 + b'"}', 2, "and the model has 64 positions"),
    (b'{"prompt_ids": ' + b"[" * 100_000, 2, "cannot be read behind line 0"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, tokenizer, family = tmp_path_factory.mktemp("model"), byte_tokenizer(), families()["mlm"]
    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64}
    config = family.config_class(**options, **token_options(tokenizer))
    family.model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("content", "status", "words"), PROMPTS)
def test_prompts(content, status, words, model, composed, prepared, monkeypatch, capsys):
    put(prepared / "prompts.jsonl", content)
    job = {"job": "generate", "checkpoint": str(model), "output_dir": "out", "prompts": "prompts.jsonl"}
    cfg = OmegaConf.merge(composed, job, {"generation": {"max_new_tokens": 2}})
    found, _, err = ended(capsys, prepared, monkeypatch, lambda: generate.run(cfg))
    assert (found, words is None or words in err) == (status, True), err
    if status:
        assert err.splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in err

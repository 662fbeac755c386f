import json

import pytest
from datasets import Dataset, DatasetDict

from xlm_hf.evaluation import EvaluationSet, run_evaluation_set
from xlm_hf.metrics import load_metric
from xlm_hf.tasks import load_task
from xlm_hf.tasks.tokenizers import decode_text
from xlm_hf.testing import FamilyCase

NUMBERS = ["one", "two", "three", "four", "five", "six"]


def rows(count):
    """Sums in words; the answer of a sum is written in two ways."""
    made = []
    for number in range(count):
        a, b = number % 3, number // 3 % 3
        made += [
            {"source": f"{NUMBERS[a]} and {NUMBERS[b]}, is?", "target": f"{NUMBERS[a + b + 1]}."},
            {"source": f"{NUMBERS[a]} and {NUMBERS[b]}, is?", "target": f"it is {NUMBERS[a + b + 1]}."},
        ]
    return made


@pytest.fixture
def folder(tmp_path):
    """Files of pairs; in the evaluation sets every source twice."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, count in (("train", 9), ("validation", 3), ("test", 4)):
        Dataset.from_list(rows(count)).to_parquet(folder / f"{split}.parquet")
    return folder


def load(path, tmp_path, name="pairs", **options):
    return load_task(name, path=str(path), cache_dir=tmp_path / "cache", **options)


@pytest.mark.parametrize("tokenizer", ["word", "bpe", "char"])
def test_a_pair_is_an_example_and_a_source_one_of_the_evaluation(tokenizer, folder, tmp_path):
    task = load(folder, tmp_path, tokenizer=tokenizer)
    assert task.kind == "seq2seq"
    assert {split: len(data) for split, data in task.splits.items()} == {"train": 18, "validation": 3, "test": 4}
    train, test = task.splits["train"], task.splits["test"]
    texts = [[decode_text(task.tokenizer, ids) for ids in train[f"{side}_ids"]] for side in ("prompt", "target")]
    assert [list(map(squeezed, column)) for column in texts] == [
        [squeezed(row[side]) for row in rows(9)] for side in ("source", "target")
    ]
    assert "references" not in train.column_names
    assert test["references"][:] == [[row["target"] for row in rows(4)][at : at + 2] for at in (0, 2, 4, 6)]
    assert [squeezed(decode_text(task.tokenizer, ids)) for ids in test["target_ids"]] == [
        squeezed(several[0]) for several in test["references"]
    ]
    assert test["example_id"][:] == list(range(4))
    assert not any(test["continues"][:])
    assert train["num_characters"][:] == [len(row["target"]) for row in rows(9)]
    assert list(task.files) == ["train", "validation", "test"]


def squeezed(text):
    return "".join(text.split())


def test_what_is_too_long_is_cut_off(folder, tmp_path):
    whole = load(folder, tmp_path, tokenizer="char")
    cut = load(folder, tmp_path, tokenizer="char", max_length=16, max_target_length=6)
    for split in ("train", "test"):
        long, short = whole.splits[split][:], cut.splits[split][:]
        assert short["prompt_ids"] == [ids[:10] for ids in long["prompt_ids"]]
        assert short["target_ids"] == [ids[:6] for ids in long["target_ids"]]
        # What is cut off has no end.
        assert short["continues"] == [len(ids) > 6 for ids in long["target_ids"]]
        # Of the original text: here a token is a character.
        assert long["num_characters"] == [len(ids) for ids in long["target_ids"]]
        assert short["num_characters"] == [min(6, len(ids)) for ids in long["target_ids"]]
    assert cut.splits["test"]["references"][:] == whole.splits["test"]["references"][:]
    assert 0 < sum(cut.splits["train"]["continues"]) < 18


def test_columns_of_columns_several_targets_and_missing_ones(tmp_path):
    lines = [
        {"q": "who?", "answers": {"text": ["a", "b"]}, "n": 1},
        {"q": "none?", "answers": {"text": []}, "n": 2},
        {"q": "where?", "answers": {"text": ["c"]}, "n": 3},
    ]
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines * 8))
    options = {"source_column": "q", "target_column": "answers.text", "tokenizer": "byte", "test_fraction": 0.25}
    task = load(file, tmp_path, **options)
    assert {tuple(several) for several in task.splits["test"]["references"]} <= {("a", "b"), ("c",)}
    train = task.splits["train"]
    pairs = {(task.tokenizer.decode(r["prompt_ids"]), task.tokenizer.decode(r["target_ids"])) for r in train}
    assert pairs == {("who?", "a"), ("who?", "b"), ("where?", "c")}
    with pytest.raises(ValueError, match=r"split 'train' has no column 'answer.text': did you mean 'answers.text'\?"):
        load(file, tmp_path, **{**options, "target_column": "answer.text"})


@pytest.mark.parametrize("name", ["e2e", "multi30k", "gsm8k"])
def test_a_named_set_takes_a_folder_in_its_place(name, folder, tmp_path):
    """With the columns of the Hub, or with `source` and `target`."""
    task = load(folder, tmp_path, name=name, vocab_size=300)
    config = {"e2e": ("meaning_representation", "human_reference"), "multi30k": ("en", "de")}
    source, target = config.get(name, ("question", "answer"))
    for split in ("train", "validation", "test"):
        data = Dataset.from_parquet(str(folder / f"{split}.parquet"))
        data.rename_columns({"source": source, "target": target}).to_parquet(folder / f"{split}.parquet")
    again = load(folder, tmp_path, name=name, vocab_size=300)
    for split, data in task.splits.items():
        assert again.splits[split][:] == data[:]


def test_blanks_make_it_infilling(folder, tmp_path):
    task, whole = (load(folder, tmp_path, tokenizer="word", blank_rate=rate) for rate in (0.4, None))
    assert task.kind == "infill"
    assert task.files == whole.files
    mask = task.tokenizer.mask_token_id
    for row, pair in zip(task.splits["test"], whole.splits["test"], strict=True):
        assert row["target_ids"] == pair["prompt_ids"] + pair["target_ids"]
        assert row["input_ids"][: len(pair["prompt_ids"])] == pair["prompt_ids"]
        blanks = [given == mask for given in row["input_ids"]]
        assert any(blanks)
        assert all(blank or g == t for blank, g, t in zip(blanks, row["input_ids"], row["target_ids"], strict=True))
    with pytest.raises(ValueError, match=r"blank_rate must be in \(0, 1\] and is 1.5"):
        load(folder, tmp_path, blank_rate=1.5)


@pytest.mark.parametrize("longest", [(10, 10), (10, 0)])
def test_lengths_that_leave_nothing_are_refused(longest, folder, tmp_path):
    with pytest.raises(ValueError, match=r"max_target_length.* must be at least 1"):
        load(folder, tmp_path, max_length=longest[0], max_target_length=longest[1])


def test_the_cache_knows_the_options(folder, tmp_path):
    def folders():
        return len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()])

    load(folder, tmp_path, tokenizer="word")
    load(folder, tmp_path, tokenizer="word", blank_rate=0.5)
    assert folders() == 1
    load(folder, tmp_path, tokenizer="whitespace")
    load(folder, tmp_path, tokenizer="word", vocab_size=9)
    assert folders() == 3


def test_every_reference_is_scored(tmp_path):
    """A decode is right if it is any of the references of its example, whatever `target_ids` are."""
    case = FamilyCase("mlm", "generation.max_new_tokens=8")
    model = case.model()
    data = case.task.splits["test"].select(range(4))

    def measured(dataset):
        collator = case.collator("seq2seq_prediction", model)
        metrics = [load_metric("answer_match")]
        one = EvaluationSet("test", dataset, collator, ["test"], generate=True, metrics=metrics)
        return run_evaluation_set(model, one, case.task.tokenizer, 4, seed=0)

    metrics, records = measured(data)
    assert metrics["answer_match"] == 0
    assert "references" not in records[0]
    several = [["nothing", record["prediction"]] if n < 3 else ["nothing"] for n, record in enumerate(records)]
    metrics, records = measured(DatasetDict(test=data)["test"].add_column("references", several))
    assert metrics["answer_match"] == 0.75
    assert [record["answer_match"] for record in records] == [1, 1, 1, 0]
    assert [record["references"] for record in records] == several

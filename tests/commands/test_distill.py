"""job=distill: a teacher's texts in place of the targets of a training set."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from xlm_hf.cli import main
from xlm_hf.commands import distill
from xlm_hf.tasks import load_task
from xlm_hf.tasks.tokenizers import decode_text

TINY = ["size=tiny", "task=pairs", "task.tokenizer=word", "task.max_length=16", "task.max_target_length=6"]
TINY += ["model.hidden_size=16", "model.num_hidden_layers=1", "trainer.max_steps=2"]
SOURCES = ["one two", "two three", "one two", "three", "four one"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of pairs, of which two in the training set have the same source."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"source": source, "target": f"so {source} {number}"} for number, source in enumerate(SOURCES)]
    for split, chosen in (("train", rows), ("validation", rows[:3]), ("test", rows[1:])):
        Dataset.from_list(chosen).to_parquet(folder / f"{split}.parquet")
    return folder


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["xlm-hf", *map(str, arguments)])
    main()


@pytest.fixture(scope="module")
def teacher(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    given = [*TINY, f"task.path={pairs}", f"task.cache_dir={folder}/cache"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        command(monkeypatch, "family=arlm", *given, f"output_dir={folder}/run")
    return folder / "run"


def test_a_student_learns_what_the_teacher_writes(pairs, teacher, tmp_path, monkeypatch):
    given = [*TINY, f"task.path={pairs}", f"task.cache_dir={tmp_path}/cache"]
    written = tmp_path / "written"
    command(monkeypatch, "job=distill", f"checkpoint={teacher}", "generation.num_beams=2", f"output_dir={written}")
    file = written / "predictions" / "distilled.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(record["prompt"] for record in records) == sorted(set(SOURCES))
    # One of the texts had no position left for its end.
    records[0]["finish_reason"], records[1]["finish_reason"] = "length", "stop"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"path": str(pairs), "cache_dir": tmp_path / "cache", "tokenizer": "word", "max_length": 16}
    before, after = (load_task("pairs", max_target_length=6, **options, distilled=given) for given in (None, str(file)))
    texts = {record["prompt"]: record["prediction_ids"] for record in records}
    train = after.splits["train"]
    assert train["target_ids"][:] == [texts[source] for source in SOURCES]
    assert train["target_ids"][:] != before.splits["train"]["target_ids"][:]
    assert train["num_characters"][:] == [len(decode_text(after.tokenizer, ids)) for ids in train["target_ids"]]
    assert train["continues"][:] == [
        next(record for record in records if record["prompt"] == source)["finish_reason"] == "length"
        for source in SOURCES
    ]
    assert train.features == before.splits["train"].features
    assert after.splits["test"][:] == before.splits["test"][:]
    command(monkeypatch, "family=ilm", *given, f"task.distilled={file}", f"output_dir={tmp_path}/student")
    assert (tmp_path / "student" / "metrics.json").exists()


def test_a_rank_decodes_on_its_own_device_and_the_main_one_alone_writes(teacher, tmp_path, monkeypatch):
    state, devices = SimpleNamespace(device=torch.device("meta"), is_main_process=False), []

    def decode(model, *args, **options):
        devices.append(model.device)
        return {}, []

    monkeypatch.setattr(distill, "PartialState", lambda: state)
    monkeypatch.setattr(distill, "run_evaluation_set", decode)
    command(monkeypatch, "job=distill", f"checkpoint={teacher}", f"output_dir={tmp_path}/rank")
    assert devices == [state.device]
    assert not (tmp_path / "rank" / "predictions").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt_ids": [9]}, r"line 1: prediction_ids must be a list of integers and is None"),
        (
            {"prompt_ids": [9, 9, 9], "prediction_ids": [9], "prediction": "x", "finish_reason": "stop"},
            "has no text for 5 of the 5 prompts of the training set: run job=distill on this task",
        ),
    ],
)
def test_a_file_of_another_set_is_refused(row, words, pairs, tmp_path):
    file = tmp_path / "distilled.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=words):
        load_task("pairs", path=str(pairs), cache_dir=tmp_path / "cache", tokenizer="word", distilled=str(file))
    with pytest.raises(ValueError, match="There is no file"):
        load_task("pairs", path=str(pairs), cache_dir=tmp_path / "cache", tokenizer="word", distilled="gone.jsonl")


def test_texts_of_another_tokenizer_are_refused_though_the_prompts_are_the_same(pairs, tmp_path):
    options = {"path": str(pairs), "cache_dir": tmp_path / "cache", "tokenizer": "word"}
    task, file = load_task("pairs", **options), tmp_path / "distilled.jsonl"
    ids = task.tokenizer.encode("so one", add_special_tokens=False)
    for change in ([], [len(task.tokenizer)]):
        written = {"prediction_ids": [*ids, *change], "prediction": f"so one{' more' * len(change)}"}
        rows = [{"prompt_ids": row, "finish_reason": "stop", **written} for row in task.splits["train"]["prompt_ids"]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if change:
            with pytest.raises(ValueError, match=r"4 of the 4 texts in .* are other texts by this tokenizer"):
                load_task("pairs", **options, distilled=str(file))
        else:
            assert load_task("pairs", **options, distilled=str(file)).splits["train"]["target_ids"][:] == [ids] * 5


def test_a_task_without_prompts_has_no_teacher(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("one two\n" * 40)
    arguments = ["job=distill", "family=arlm", "task=text", f"task.path={tmp_path}/text.txt", "checkpoint=none"]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments, "task.tokenizer=byte", f"task.cache_dir={tmp_path}/cache")
    assert stop.value.code == 2
    assert "rewrites the targets of prompts, and text is a task of lm" in capsys.readouterr().err


def test_a_task_that_takes_no_texts_is_refused_before_anything_is_decoded(tmp_path, monkeypatch, capsys):
    small = ["task.num_train=4", "task.num_validation=2", "task.num_test=2", f"task.cache_dir={tmp_path}/cache"]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "job=distill", "family=arlm", "task=star_easy", *small, "checkpoint=none")
    assert stop.value.code == 2
    assert "star_easy takes no teacher's texts, having no option distilled" in capsys.readouterr().err

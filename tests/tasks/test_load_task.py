import importlib.resources
import inspect
import logging
import pkgutil

import pytest
from datasets import Dataset, DatasetDict
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from xlm_hf.building import evaluation_entries
from xlm_hf.data import Mixture
from xlm_hf.evaluation import default_evaluation
from xlm_hf.metrics import load_metric
from xlm_hf.tasks import _FOR_OTHERS, Task, _resolve, _shipped_config, load_task
from xlm_hf.tasks.tokenizers import number_tokenizer

SHIPPED = sorted(
    file.name.removesuffix(".yaml")
    for file in importlib.resources.files("xlm_hf.configs").joinpath("task").iterdir()
    if file.name.endswith(".yaml") and not file.name.startswith("_")
)
FEW = {"num_train": 7, "num_validation": 3, "num_test": 4}


def composed(*overrides):
    with initialize_config_module("xlm_hf.configs", version_base="1.3"):
        return compose(overrides=list(overrides)).task


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A user's module, with a dataset of their own."""
    (tmp_path / "own_module.py").write_text(
        """
from datasets import Dataset, DatasetDict
from xlm_hf.tasks import Task
from xlm_hf.tasks.tokenizers import number_tokenizer

calls = []

def own_task(words, repeat=1):
    calls.append(words)
    ids = [[7 + word for word in words]] * repeat
    data = Dataset.from_dict({"example_id": range(repeat), "input_ids": ids})
    return Task("own", "lm", DatasetDict(train=data), number_tokenizer(9))

def counted(metrics, num_samples=2):
    calls.append((metrics, num_samples))
    return own_task([1])

def open_task(**anything):
    calls.append(anything)
    return own_task([1])

def no_task():
    return 3
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_module

    own_module.calls.clear()
    return own_module


def small(columns=("example_id", "prompt_ids", "target_ids")):
    return DatasetDict(train=Dataset.from_dict({column: [1] for column in columns}))


def test_a_shipped_task_with_overrides(tmp_path):
    task = load_task("star_medium", **FEW, seed=1, cache_dir=tmp_path)
    assert (task.name, task.kind) == ("star_medium", "seq2seq")
    assert {split: len(data) for split, data in task.splits.items()} == {"train": 7, "validation": 3, "test": 4}
    assert len(task.tokenizer) == 27
    other = load_task("star_medium", **FEW, seed=2, cache_dir=tmp_path)
    assert task.splits["test"][:] != other.splits["test"][:]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_read_as_hydra_composes_them(name):
    config = composed(f"+task={name}")
    target = pkgutil.resolve_name(config._target_)
    ignored = {*_FOR_OTHERS, *getattr(target, "for_families", ())}
    assert _resolve(_shipped_config(name), ignored) == _resolve(config, ignored)
    # Hydra overrides only the keys that are there, so every parameter must be.
    others = {"_target_", *ignored}
    assert set(config) - others == set(inspect.signature(target).parameters)
    assert config.name == name


@pytest.mark.parametrize("name", ["star_easy", "star_medium", "star_hard"])
@pytest.mark.parametrize("path_format", ["edges", "nodes"])
def test_a_composed_task_and_its_evaluation(name, path_format, tmp_path):
    few = [f"task.{option}={value}" for option, value in FEW.items()]
    config = composed(f"+task={name}", f"task.path_format={path_format}", f"task.cache_dir={tmp_path}", *few)
    task = load_task(config)
    by_name = load_task(name, path_format=path_format, **FEW, cache_dir=tmp_path)
    assert task.splits["train"][:] == by_name.splits["train"][:]
    entries = evaluation_entries(config, task.kind)
    scored = [entry for entry in entries if "metrics" in entry]
    assert [entry["stages"] for entry in scored] == [["validation"], ["test"]]
    assert [entry["split"] for entry in entries if entry.get("loss")] == ["validation", "test"]
    for entry in scored:
        inputs = {"prompts": task.splits[entry["split"]]["prompt_ids"][:]}
        inputs["predictions"] = inputs["references"] = task.splits[entry["split"]]["target_ids"][:]
        for spec in entry["metrics"]:
            metric = load_metric(spec)
            assert list(metric.compute(**{n: inputs[n] for n in metric.features}).values()) == [1.0]


STAR = ["exact_match", "token_accuracy", {"name": "star_path", "path_format": "edges"}]
SAMPLES = ["sample_entropy", "distinct_n", {"name": "generative_perplexity", "eval_model": None}]


def of_prompts(kind, metrics):
    """What the configs of tasks with prompts or blanks listed before there was a default."""
    return [
        {"name": "validation", "split": "validation", "collator": kind, "loss": True, "stages": ["validation"]},
        {
            **{"name": "validation", "split": "validation", "collator": f"{kind}_prediction", "generate": True},
            **{"metrics": metrics, "stages": ["validation"]},
        },
        {"name": "test", "split": "test", "collator": kind, "loss": True, "stages": ["test"]},
        {
            **{"name": "test", "split": "test", "collator": f"{kind}_prediction", "generate": True},
            **{"metrics": metrics, "stages": ["test"]},
        },
    ]


OF_TEXT = [
    {"name": "validation", "split": "validation", "collator": "lm", "loss": True, "stages": ["validation"]},
    {"name": "test", "split": "test", "collator": "lm", "loss": True, "stages": ["test"]},
    {
        **{"name": "samples", "num_samples": 64, "collator": "lm_prediction", "generate": True},
        **{"metrics": SAMPLES, "stages": ["test"]},
    },
]
LISTED = {
    **dict.fromkeys(("star_easy", "star_medium", "star_hard"), of_prompts("seq2seq", STAR)),
    "star_infill": of_prompts("infill", ["exact_match", "token_accuracy"]),
    **dict.fromkeys(("text", "lm1b", "owt", "owt_packed"), OF_TEXT),
}


@pytest.mark.parametrize("name", LISTED)
def test_the_evaluation_that_a_config_once_listed_is_that_of_its_kind(name):
    kind = LISTED[name][0]["collator"]
    with initialize_config_module("xlm_hf.configs", version_base="1.3"):
        task = compose(overrides=[f"+task={name}", "+eval_model=null"]).task
        assert evaluation_entries(task, kind) == LISTED[name]
        listed = [{**LISTED[name][0], "num_draws": 3}]
        assert evaluation_entries(OmegaConf.merge(task, {"evaluation": listed}), kind) == listed
        assert evaluation_entries(OmegaConf.merge(task, {"evaluation": []}), kind) == []


def test_a_task_that_says_nothing_of_its_evaluation_has_its_losses_measured():
    assert evaluation_entries(OmegaConf.create({"path": "???"}), "lm") == OF_TEXT[:2] == default_evaluation("lm")
    assert [entry.get("metrics") for entry in default_evaluation("infill")] == [None, [], None, []]
    # Only plain text is written from nothing.
    assert default_evaluation("seq2seq", num_samples=3) == default_evaluation("seq2seq")


def test_load_task_within_a_hydra_application(tmp_path):
    with initialize_config_module("xlm_hf.configs", version_base="1.3"):
        load_task("star_medium", **FEW, cache_dir=tmp_path)
        assert compose(overrides=["+task=star_hard"]).task.num_labels == 56


def test_a_callable_of_the_users_own(own_module):
    task = load_task({"_target_": "own_module.own_task", "words": [1, 2], "evaluation": ["${nowhere}"]}, repeat=3)
    assert task.splits["train"]["input_ids"][:] == [[8, 9]] * 3
    config = OmegaConf.create({"top": [4, 5], "task": {"_target_": "own_module.own_task", "words": "${top}"}})
    assert load_task(config.task).splits["train"]["input_ids"][:] == [[11, 12]]
    assert [type(words) for words in own_module.calls] == [list, list]
    load_task({"_target_": "own_module.open_task", "whatever": 1, "metrics": ["exact_match"]})
    assert {"whatever": 1} in own_module.calls
    # Its own argument, though the evaluation reads a key of that name.
    load_task({"_target_": "own_module.counted", "metrics": 4, "num_samples": 3, "max_new_tokens": 5})
    assert (4, 3) in own_module.calls


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ("star_meduim", {}, r"unknown task 'star_meduim': did you mean 'star_medium'\?"),
        ("star_easy", {"num_trian": 3}, r"Task 'star_easy' has no option 'num_trian': did you mean 'num_train'\?"),
        ("star_easy", {"evaluation": []}, r"Task 'star_easy' has no option 'evaluation'"),
        ({"_target_": "own_module.own_task", "word": [1]}, {}, r"Task .* has no option 'word': did you mean 'words'\?"),
        ({"_target_": "own_module.own_task"}, {}, r"Task 'own_module.own_task' needs a value for 'words'"),
        ({"_target_": "own_module.own_task", "words": "???"}, {}, r"needs a value for 'words'"),
        ({"words": [1]}, {}, r"a task given as a mapping needs `_target_`.* only the keys \['words'\]"),
        ({"_target_": "own_module.missing"}, {}, r"target 'own_module.missing' cannot be imported"),
        ({"_target_": "no_such_module.f"}, {}, r"target 'no_such_module.f' cannot be imported"),
        (
            {"_target_": "own_module.no_task"},
            {},
            r"own_module.no_task returned a int: a task target must return a Task",
        ),
        ("star_easy", {"num_labels": 3}, r"^num_labels=3 is too few"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(task, overrides, message, own_module, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XLM_HF_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=message) as error:
        load_task(task, **overrides)
    assert "\n" not in str(error.value)
    assert not own_module.calls
    assert not (tmp_path / "cache").exists()
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("seq2sq", ("example_id",), r"unknown kind 'seq2sq' of task 't': did you mean 'seq2seq'\?"),
        ("lm", ("input_ids",), r"split 'train' of the lm task 't' lacks the column 'example_id' \(it has input_ids\)"),
        ("seq2seq", ("example_id", "prompt_ids"), r"lacks the column 'target_ids'"),
    ],
)
def test_a_task_that_cannot_be_trained_on_is_refused(kind, columns, message):
    with pytest.raises(ValueError, match=message):
        Task("t", kind, small(columns), number_tokenizer(3))


def test_streams_and_mixtures_are_checked_too():
    stream = small().get("train").to_iterable_dataset()
    unknown = stream.map(lambda example: example)
    assert unknown.column_names is None
    for train in (stream, unknown, Mixture([stream, unknown], [1, 2])):
        assert Task("t", "seq2seq", {"train": train}, number_tokenizer(3)).splits["train"] is train
        with pytest.raises(ValueError, match="lacks the column 'prompt_ids'"):
            Task("t", "seq2seq", {"train": Mixture([small(["example_id"])["train"]], [1])}, number_tokenizer(3))
    with pytest.raises(ValueError, match=r"lacks the column 'example_id' \(it has input_ids\)"):
        Task("t", "lm", {"train": small(["input_ids"])["train"].to_iterable_dataset()}, number_tokenizer(3))


def test_further_columns_are_allowed():
    task = Task("t", "seq2seq", small(("example_id", "prompt_ids", "target_ids", "answer")), number_tokenizer(3))
    assert "answer" in task.splits["train"].column_names

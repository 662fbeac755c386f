"""What an evaluation set measures: likelihoods, samples from nothing, filled blanks, a user's own metrics."""

import json
import math
import statistics
import sys

import datasets
import numpy as np
import pytest
from omegaconf import OmegaConf

from tests.metrics.test_metrics import save_judge, slow_entropy, slow_generative_perplexity
from xlm_hf.building import build_evaluation_sets, build_trainer, evaluation_entries
from xlm_hf.cli import main
from xlm_hf.evaluation import RECORD_FIELDS, EvaluationSet, run_evaluation_set
from xlm_hf.families import families
from xlm_hf.likelihoods import likelihood_metrics
from xlm_hf.modeling.mdlm import MDLMLoss
from xlm_hf.tasks import Task, load_task
from xlm_hf.testing import FamilyCase


def without(metrics, *names):
    return {name: value for name, value in metrics.items() if name.split("/")[-1] not in {"seconds", *names}}


def text_set(case, model, with_characters=True, **options):
    rows = [{"example_id": e["example_id"], "input_ids": e["input_ids"]} for e in case.examples(6)]
    if with_characters:
        rows = [{**row, "num_characters": 5 * len(row["input_ids"])} for row in rows]
    return EvaluationSet(
        "test", datasets.Dataset.from_list(rows), case.collator("lm", model), ["test"], kind="lm", **options
    )


LIKELIHOODS = {"arlm", "bd3lm", "edit_flow", "flexmdm", "gidd", "ilm", "mdlm", "plaid", "sedd", "udlm"}


@pytest.mark.parametrize("family", sorted(LIKELIHOODS))
def test_likelihoods_against_a_loop_whatever_the_batch_size(family, tmp_path):
    case = FamilyCase(family)
    model, loss = case.model(), case.trainer(tmp_path).loss
    evaluation_set = text_set(case, model, loss=loss, num_draws=3)
    nats, tokens, num_characters, trained = [], [], 0, [0.0, 0]
    for position, example in enumerate(evaluation_set.dataset):
        nats.append([])
        for draw in range(3):
            output = loss(model, evaluation_set.collator([{**example, "epoch": draw, "position": position}]))
            nats[-1].append(float(output.sequence_nats.detach()))
            trained = [trained[0] + float(output.loss_sum.detach()), trained[1] + int(output.num_items)]
        tokens.append(len(example["input_ids"]) + 1)
        num_characters += 5 * len(example["input_ids"])
    average = [sum(row) / 3 for row in nats]
    per_token = sum(average) / sum(tokens)
    squares = sum((x - per_token * t) ** 2 for x, t in zip(average, tokens, strict=True)) / 5
    error = math.sqrt(6 * squares) / sum(tokens)
    draws = math.sqrt(sum(statistics.variance(row) / 3 for row in nats)) / sum(tokens)
    expected = {
        "loss": trained[0] / trained[1],
        "nats_per_token": per_token,
        "nats_per_token_standard_error": error,
        "nats_per_token_monte_carlo_standard_error": draws,
        "perplexity": math.exp(per_token),
        "perplexity_standard_error": math.exp(per_token) * error,
        "bits_per_character": sum(average) / math.log(2) / num_characters,
        "samples": 6,
    }
    if family == "arlm":
        assert draws == pytest.approx(0, abs=1e-6)
        assert expected["loss"] == pytest.approx(per_token)
    for batch_size in (1, 4, 6):
        metrics, records = run_evaluation_set(model, evaluation_set, case.task.tokenizer, batch_size, seed=0)
        assert records == []
        assert "unknown_rate" not in metrics
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("family", families())
def test_what_is_no_likelihood_claims_no_perplexity(family, tmp_path):
    case = FamilyCase(family)
    model, loss = case.model(), case.trainer(tmp_path).loss
    claimed = {"perplexity", "nats_per_token", "nats_per_token_standard_error"}
    for with_characters in (True, False):
        evaluation_set = text_set(case, model, with_characters, loss=loss)
        metrics, _ = run_evaluation_set(model, evaluation_set, case.task.tokenizer, 4, seed=0)
        assert claimed & metrics.keys() == (claimed if family in LIKELIHOODS else set())
        # Without the characters of the original text there are no bits per character.
        assert ("bits_per_character" in metrics) == (family in LIKELIHOODS and with_characters)
        assert "nats_per_token_monte_carlo_standard_error" not in metrics


def test_the_standard_errors_are_those_of_repeated_measurements():
    """Simulated sequences of random lengths and estimates of their nats: the errors say how much a repeat differs."""
    rng = np.random.default_rng(0)
    losses, errors, draw_errors, same = [], [], [], []
    tokens = rng.integers(5, 50, 300)
    true = tokens * rng.normal(2.0, 0.3, 300)
    for _ in range(400):
        again = rng.integers(5, 50, 300)
        nats = again[:, None] * (rng.normal(2.0, 0.3, (300, 1)) + rng.normal(0, 0.4, (300, 2)))
        metrics = likelihood_metrics(nats, again, num_characters=1000)
        losses.append(nats.mean(axis=1).sum() / again.sum())
        errors.append(metrics["nats_per_token_standard_error"])
        nats = true[:, None] + tokens[:, None] * rng.normal(0, 0.4, (300, 2))
        same.append(nats.mean(axis=1).sum() / tokens.sum())
        draw_errors.append(likelihood_metrics(nats, tokens)["nats_per_token_monte_carlo_standard_error"])
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.12)
    assert np.mean(draw_errors) == pytest.approx(np.std(same), rel=0.12)
    assert np.std(np.exp(losses)) == pytest.approx(np.mean(np.exp(losses)) * np.mean(errors), rel=0.12)


def case_with(family, *entries, overrides=()):
    case = FamilyCase(family, "generation.max_new_tokens=8", *overrides)
    case.cfg.task.evaluation = OmegaConf.create(list(entries))
    return case


def evaluation_sets(case):
    entries = evaluation_entries(case.cfg.task, case.task.kind)
    return build_evaluation_sets(entries, case.task, lambda kind: case.collator(kind, case.model()), None)


def evaluated(case, model, tmp_path, stage="test", **arguments):
    trainer = build_trainer(case.cfg, case.task, model, tmp_path)
    for name, value in arguments.items():
        setattr(trainer.args, name, value)
    return trainer.evaluate(metric_key_prefix=stage), trainer.predictions


@pytest.mark.parametrize("family", families())
def test_samples_from_nothing(family, tmp_path):
    """Written, scored by ids and by text, alike in any batch; generative perplexity is that of the written texts."""
    case = case_with(
        family,
        {
            "name": "samples",
            "num_samples": 5,
            "collator": "lm_prediction",
            "generate": True,
            "metrics": [
                "sample_entropy",
                "distinct_n",
                {"name": "generative_perplexity", "eval_model": save_judge(tmp_path / "judge")},
            ],
            "stages": ["test"],
        },
        overrides=["++generation.do_sample=true", "++generation.temperature=2.0"],
    )
    model = case.model()
    if family == "ilm":
        # An untrained stopping head ends at once.
        model.generation_config.stopping_threshold = None
    if family == "flexmdm":
        # Nor does an untrained head of the gaps let enough come.
        model.gap_head.classifier.bias.data.add_(5.0)
    metrics, predictions = evaluated(case, model, tmp_path)
    records = predictions["samples"]
    assert [record["example_id"] for record in records] == list(range(5))
    assert len({record["prediction"] for record in records}) > 1
    for record in records:
        # Several references are a column of the data.
        assert set(RECORD_FIELDS) - {"references"} < set(record)
        assert record["prompt"] == record["reference"] == ""
        assert len(record["steps"]) == len(record["prediction_ids"])
        assert record["sample_entropy"] == pytest.approx(slow_entropy(record["prediction_ids"]))
    expected = slow_generative_perplexity(tmp_path / "judge", [r["prediction"] for r in records], "unscored", 12)
    for name, value in expected.items():
        assert metrics[f"samples/{name}"] == pytest.approx(value, rel=1e-4), name
    entropies = [record["sample_entropy"] for record in records]
    assert metrics["samples/sample_entropy"] == pytest.approx(np.mean(entropies))
    assert metrics["samples/sample_entropy_standard_error"] == pytest.approx(np.std(entropies, ddof=1) / 5**0.5)
    assert "samples/distinct_2" in metrics
    nfe = [record["nfe"] for record in records]
    assert metrics["samples/nfe"] == np.mean(nfe)
    written = sum(record["tokens_per_forward"] * record["nfe"] for record in records)
    assert metrics["samples/tokens_per_forward"] == pytest.approx(written / sum(nfe))
    again, others = evaluated(case, model, tmp_path, per_device_eval_batch_size=2)
    assert others["samples"] == records
    assert without(again) == pytest.approx(without(metrics))


@pytest.mark.parametrize("is_given", [True, False])
def test_what_is_decoded_under_a_given_length_says_so(is_given, tmp_path):
    entry = {"split": "test", "name": "test", "collator": "seq2seq_prediction", "generate": True, "stages": ["test"]}
    overrides = ["++collator.canvas_length=null"] if is_given else []
    case = case_with("mlm", {**entry, "metrics": ["exact_match"]}, overrides=overrides)
    metrics, _ = evaluated(case, case.model(), tmp_path)
    name = "test/exact_match_given_length" if is_given else "test/exact_match"
    others = {"test/nfe", "test/tokens_per_forward", "test/samples", "test/seconds", "epoch"}
    assert set(metrics) - others == {name, f"{name}_standard_error"}


USERS_METRIC = """
import datasets
import evaluate


class WordCounter(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, times=1):
        assert all(isinstance(text, str) for text in predictions)
        return {"words": times * sum(len(text.split()) for text in predictions)}
"""


def test_a_users_own_metric_by_path_and_by_target_and_stage(tmp_path, monkeypatch):
    (tmp_path / "word_counter.py").write_text(USERS_METRIC)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = {"split": "test", "collator": "seq2seq_prediction", "generate": True}
    case = case_with(
        "mlm",
        {**entry, "name": "by_path", "metrics": [str(tmp_path / "word_counter.py")], "stages": ["test"]},
        {
            **entry,
            "name": "by_target",
            "metrics": [{"_target_": "word_counter.WordCounter", "times": 2}],
            "stages": ["validation"],
        },
    )
    model = case.model()
    metrics, predictions = evaluated(case, model, tmp_path)
    assert not [name for name in metrics if name.startswith("by_target")]
    words = sum(len(record["prediction"].split()) for record in predictions["by_path"])
    assert metrics["by_path/words"] == words > 0
    assert evaluated(case, model, tmp_path, "validation")[0]["by_target/words"] == 2 * words


def test_records_have_the_fields_asked_for_and_the_metrics_of_the_example(tmp_path):
    entry = {"name": "test", "split": "test", "collator": "seq2seq_prediction", "generate": True, "stages": ["test"]}
    entry.update(metrics=["exact_match", "token_accuracy"], prediction_fields=["prediction", "steps"])
    case = case_with("mlm", entry)
    metrics, predictions = evaluated(case, case.model(), tmp_path)
    assert set(predictions["test"][0]) == {"example_id", "prediction", "steps", "exact_match", "token_accuracy"}
    assert metrics["test/token_accuracy"] == np.mean([record["token_accuracy"] for record in predictions["test"]])
    case.cfg.task.evaluation[0].metrics = ["exact_match", "exact_match"]
    with pytest.raises(ValueError, match="Two metrics of the set 'test' report 'exact_match'"):
        evaluated(case, case.model(), tmp_path)


def test_a_share_has_a_binomial_standard_error(tmp_path):
    entry = {"name": "test", "split": "test", "collator": "seq2seq_prediction", "generate": True, "stages": ["test"]}
    case = case_with("mlm", {**entry, "metrics": ["exact_match"]})
    # A model that is right three times in eight: its references are what it writes.
    model = case.model()
    _, predictions = evaluated(case, model, tmp_path)
    written = [record["prediction_ids"] for record in predictions["test"]]
    rows = [
        {**row, "target_ids": ids if number < 3 else [*ids, 9]}
        for number, (row, ids) in enumerate(zip(case.task.splits["test"], written, strict=True))
    ]
    case.task.splits["test"] = datasets.Dataset.from_list([{**row, "canvas": 8} for row in rows])
    metrics, _ = evaluated(case, model, tmp_path)
    assert metrics["test/exact_match"] == 3 / 8
    assert metrics["test/exact_match_standard_error"] == pytest.approx(math.sqrt(3 / 8 * 5 / 8 / 7))


SAMPLES = {"name": "samples", "num_samples": 4, "collator": "lm_prediction", "generate": True, "stages": ["test"]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {**SAMPLES, "metrics": ["generative_perplexity"]},
            "'generative_perplexity' of 'samples' needs the option eval_m",
        ),
        (
            {**SAMPLES, "metrics": [{"name": "generative_perplexity", "eval_model": "no/such"}]},
            "eval_model 'no/such' is not a folder or Hub id with a model and its tokenizer",
        ),
        (
            {**SAMPLES, "metrics": ["exact_match"]},
            "needs references and gets predictions, prompts: add a split for references",
        ),
        ({**SAMPLES, "prediction_fields": ["stepps"]}, "prediction_fields has no 'stepps': did you mean 'steps'?"),
        ({**SAMPLES, "num_sample": 4}, "has no option 'num_sample': did you mean 'num_samples'?"),
        ({**SAMPLES, "split": "text"}, "has no split 'text': did you mean 'test'?"),
        ({"name": "a", "collator": "lm_prediction", "generate": True, "stages": []}, "has no split None"),
        ({**SAMPLES, "split": "test", "num_samples": 9}, "wants 9 samples .* 'test' has 8 examples: lower num_samples"),
    ],
)
def test_a_mistaken_entry_is_refused_in_one_sentence(entry, message):
    case = case_with("mlm", entry)
    with pytest.raises(ValueError, match=message):
        evaluation_sets(case)


def test_a_metric_whose_required_option_is_null_is_left_out():
    entry = {**SAMPLES, "metrics": ["sample_entropy", {"name": "generative_perplexity", "eval_model": None}]}
    case = case_with("mlm", entry)
    (evaluation_set,) = evaluation_sets(case)
    assert [metric.name for metric in evaluation_set.metrics] == ["sample_entropy"]


def run_job(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    few = ["size=tiny", "trainer.max_steps=2", "task.num_train=40", "task.num_validation=4", "task.num_test=8"]
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", *few, "trainer.per_device_eval_batch_size=3", *arguments])
    main()


def read_records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("family", ["mlm", "mdlm"])
def test_infilling_from_training_to_a_file_of_prompts(family, monkeypatch, tmp_path, capsys):
    names = [f"family={family}", "task=star_infill"]
    run_job(monkeypatch, tmp_path, *names, "output_dir=run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    records = read_records(tmp_path / "run" / "predictions" / "test.jsonl")
    assert [record["example_id"] for record in records] == list(range(8))
    accuracies, exact = [], 0
    for record in records:
        prompt, prediction, reference = (
            record["prompt"].split(),
            record["prediction"].split(),
            record["reference"].split(),
        )
        blank = [place for place, word in enumerate(prompt) if word == "[MASK]"]
        assert 1 <= len(blank) <= 5
        for place in range(len(prompt)):
            assert prompt[place] in (reference[place], "[MASK]")
            assert place in blank or prediction[place] == prompt[place]
            assert (record["steps"][place] >= 0) == (place in blank)
        assert len(prediction) == len(reference) == len(prompt) == 31
        assert "[MASK]" not in prediction
        accuracies.append(sum(prediction[place] == reference[place] for place in blank) / len(blank))
        exact += prediction == reference
        assert record["nfe"] * record["tokens_per_forward"] == pytest.approx(len(blank))
    assert metrics["test/token_accuracy"] == pytest.approx(np.mean(accuracies))
    assert metrics["test/exact_match"] == exact / 8

    generate = [*names, "job=generate", "checkpoint=run"]
    run_job(monkeypatch, tmp_path, *generate, "num_samples=4", "output_dir=again")
    again = read_records(tmp_path / "again" / "predictions" / "generate.jsonl")
    assert [record["prediction"] for record in again] == [record["prediction"] for record in records[:4]]
    prompts = [{"prompt": records[0]["prompt"]}, {"input_ids": records[1]["prompt_ids"]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    capsys.readouterr()
    run_job(monkeypatch, tmp_path, *generate, "prompts=prompts.jsonl", "output_dir=own")
    own = read_records(tmp_path / "own" / "predictions" / "generate.jsonl")
    assert [record["prediction"] for record in own] == [record["prediction"] for record in records[:2]]
    shown = capsys.readouterr().out
    blanks = records[0]["prompt"].split().count("[MASK]")
    first = next(line for line in shown.splitlines() if line.startswith("step "))
    assert first.count("[") >= 1
    assert first.count(" _") == blanks - first.count("[")
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompts[0]) + '\n{"prompt": "1 2"}\n')
    with pytest.raises(SystemExit):
        run_job(monkeypatch, tmp_path, *generate, "prompts=prompts.jsonl", "output_dir=own")
    assert "Example 1 has no blank to fill in: put [MASK] for each token" in capsys.readouterr().err


def words_task(name):
    """Texts of numbers, a language modelling task."""
    few = {"num_train": 40, "num_validation": 4, "num_test": 8}
    task = load_task("star_easy", **few)
    splits = {
        split: datasets.Dataset.from_dict(
            {"example_id": list(range(len(rows))), "input_ids": [ids[:6] for ids in rows["target_ids"]]}
        )
        for split, rows in task.splits.items()
    }
    return Task(name=name, kind="lm", splits=datasets.DatasetDict(splits), tokenizer=task.tokenizer)


@pytest.mark.parametrize("family", families())
def test_language_modelling_from_training_to_samples(family, monkeypatch, tmp_path):
    """job=generate of a task without prompts writes from nothing, as many as are asked for."""
    (tmp_path / "words.yaml").write_text(
        "_target_: tests.test_evaluation.words_task\nname: words\nmax_new_tokens: 8\nevaluation:\n"
        "  - {name: validation, split: validation, collator: lm, loss: true, stages: [validation]}\n"
        "  - {name: test, split: test, collator: lm, loss: true, num_draws: 2, stages: [test]}\n"
        "  - {name: samples, num_samples: 3, split: test, collator: lm_prediction, generate: true, stages: [test],\n"
        "     metrics: [sample_entropy]}\n"
    )
    (tmp_path / "task").mkdir()
    (tmp_path / "words.yaml").rename(tmp_path / "task" / "words.yaml")
    monkeypatch.chdir(tmp_path)
    arguments = [f"hydra.searchpath=[file://{tmp_path}]", f"family={family}", "task=words", "size=tiny"]
    arguments += ["trainer.max_steps=2", "trainer.eval_steps=2", "trainer.per_device_eval_batch_size=3"]
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", *arguments, "output_dir=run"])
    main()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (
        ("test/perplexity" in metrics)
        == ("test/nats_per_token_monte_carlo_standard_error" in metrics)
        == (family in LIKELIHOODS)
    )
    assert len(read_records(tmp_path / "run" / "predictions" / "samples.jsonl")) == 3
    samples = [*arguments, "job=generate", "checkpoint=run", "output_dir=out", "num_samples=11"]
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", *samples])
    main()
    records = read_records(tmp_path / "out" / "predictions" / "generate.jsonl")
    assert [record["example_id"] for record in records] == list(range(11))
    assert all(record["prompt"] == "" for record in records)


def test_more_draws_say_more_about_the_same_bound(tmp_path):
    """With the masks of a draw alone changing, the mean over draws settles at the rate its standard error says."""
    case = FamilyCase("mdlm")
    model = case.model()
    few, many = (
        run_evaluation_set(model, text_set(case, model, loss=MDLMLoss(), num_draws=n), case.task.tokenizer, 6, seed=0)[
            0
        ]
        for n in (8, 128)
    )
    error = "nats_per_token_monte_carlo_standard_error"
    assert many[error] < 0.4 * few[error]
    assert abs(few["nats_per_token"] - many["nats_per_token"]) < 4 * few[error]

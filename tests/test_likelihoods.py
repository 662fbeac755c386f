"""What likelihoods are per: the same tokens and characters of the same data in every family. Their names."""

import itertools
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from tests.test_evaluation import LIKELIHOODS
from xlm_hf.building import build_model, build_task, build_trainer, compose, positions_of
from xlm_hf.evaluation import EvaluationSet, run_evaluation_set
from xlm_hf.likelihoods import likelihood_metrics, text_counts
from xlm_hf.tasks import load_task
from xlm_hf.testing import FamilyCase

LINES = ["a first  line", "Zürich", "one that is longer than the others by far", "so it is", "b, c d", "漢字"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text("\n".join(f"{number} {line}" for number in range(6) for line in LINES), encoding="utf-8")
    return file


def measured(family, corpus, *overrides):
    """The metrics of a text task's validation set under an untrained model, and the set."""
    options = [f"task.path={corpus}", "task.max_length=16", f"task.cache_dir={corpus.parent / 'cache'}"]
    options += ["task.validation_fraction=0.5", "size=tiny", *overrides]
    cfg = compose("config", [f"family={family}", "task=text", *options])
    task = build_task(cfg.task)
    model = build_model(cfg.model, task.tokenizer, num_positions=positions_of(cfg.task, cfg.collator))
    trainer = build_trainer(cfg, task, model, corpus.parent / "run")
    validation = next(each for each in trainer.evaluation_sets if each.name == "validation")
    return run_evaluation_set(model, validation, task.tokenizer, 8, seed=0)[0], task.splits["validation"]


def names_of(metrics, start):
    return [name for name in metrics if name.startswith(start) and not name.endswith("standard_error")]


GROWING = ("edit_flow", "flexmdm", "ilm")


@pytest.mark.parametrize("family", GROWING)
def test_a_text_with_ends_inside_is_refused_by_a_family_without_such_a_token(family, corpus):
    with pytest.raises(ValueError, match=r"holds the (end-of-sequence|special) token.* by task.document_masks=true"):
        measured(family, corpus, "task.tokenizer=byte", "task.protocol=packed", "task.document_masks=false")


PROTOCOLS = {
    "sentence": [],
    "packed": ["task.protocol=packed"],
    "endless": ["task.protocol=packed", "task.document_masks=false"],
}


@pytest.mark.parametrize(
    ("family", "protocol"),
    [
        (family, protocol)
        for family, protocol in itertools.product(sorted(LIKELIHOODS), PROTOCOLS)
        if family not in GROWING or protocol != "endless"
    ],
)
def test_every_family_counts_the_tokens_of_the_text_and_its_end(family, protocol, corpus):
    """Not the positions of a canvas: an untrained model is as uncertain as its vocabulary is large, padding or not."""
    metrics, rows = measured(family, corpus, "task.tokenizer=byte", *PROTOCOLS[protocol])
    num_tokens, num_characters = 0, sum(rows["num_characters"])
    for row in rows:
        num_documents = len(set(row.get("segment_ids") or [0]))
        num_tokens += len(row["input_ids"]) + num_documents - row["continues"]
    assert 0 < sum(rows["continues"]) < len(rows) or protocol == "endless"
    # In chunks with documents of their own, a canvas of a document's length tells it.
    given = "_given_length" if family in ("gidd", "mdlm", "plaid", "udlm", "sedd") and protocol == "packed" else ""
    assert names_of(metrics, "perplexity") == [f"perplexity{given}"]
    assert names_of(metrics, "nats_per_token") == [f"nats_per_token{given}"]
    assert names_of(metrics, "bits_per_character") == [f"bits_per_character{given}"]
    bits, perplexity = metrics[f"bits_per_character{given}"], metrics[f"perplexity{given}"]
    assert math.exp(bits * math.log(2) * num_characters / num_tokens) == pytest.approx(perplexity, rel=1e-6)
    # There are 256 bytes; slots and orders add to their number, as the padding of a canvas does.
    # The estimate of a few chunks has more variance where tokens are absent too, or the rate depends on the time.
    assert (100 if family in ("flexmdm", "plaid", "udlm") else 200) < perplexity < math.inf


def test_a_canvas_without_padding_is_measured_under_another_name(corpus):
    padded, _ = measured("mdlm", corpus, "task.tokenizer=byte")
    given, _ = measured("mdlm", corpus, "task.tokenizer=byte", "collator.canvas_length=null")
    assert given["perplexity_given_length"] < padded["perplexity"]
    assert names_of(given, "perplexity") != names_of(padded, "perplexity")
    assert given["loss"] == pytest.approx(given["nats_per_token_given_length"])
    assert compose("paper/mdlm_lm1b").collator.canvas_length is None


@pytest.mark.parametrize("family", sorted(LIKELIHOODS))
def test_unknown_words_are_counted_beside_a_likelihood(family, corpus):
    metrics, rows = measured(family, corpus, "task.tokenizer=word", "task.vocab_size=12")
    unknown = [token == 5 for ids in rows["input_ids"] for token in ids]
    assert 0.1 < metrics["unknown_rate"] == sum(unknown) / len(unknown) < 1
    assert "unknown_rate" not in measured(family, corpus, "task.tokenizer=byte")[0]


@pytest.mark.parametrize("family", sorted(LIKELIHOODS))
def test_given_a_prompt_it_is_the_target_and_its_end(family, tmp_path):
    case = FamilyCase(family)
    examples = case.examples(6)
    rows = [{name: row[name] for name in ("example_id", "prompt_ids", "target_ids")} for row in examples]
    model, loss = case.model(), case.trainer(tmp_path).loss
    collator, data = case.collator("seq2seq", model), datasets.Dataset.from_list(rows)
    metrics, _ = run_evaluation_set(
        model, EvaluationSet("test", data, collator, ["test"], loss=loss), case.task.tokenizer, 4, seed=0
    )
    nats = sum(
        float(loss(model, collator([{**row, "epoch": 0, "position": i}])).sequence_nats.detach())
        for i, row in enumerate(rows)
    )
    num_tokens = sum(len(row["target_ids"]) + 1 for row in rows)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-4)
    assert "bits_per_character" not in metrics


def test_in_infilling_it_is_the_hidden_tokens(tmp_path):
    case = FamilyCase("mdlm")
    task = load_task("star_infill", num_train=8, num_validation=4, num_test=4)
    model, loss = case.model(), case.trainer(tmp_path).loss
    collator = case.collator("infill", model)
    examples = [{**row, "epoch": 0, "position": i} for i, row in enumerate(task.splits["train"])]
    output = loss(model, collator(examples))
    hidden = [row["input_ids"].count(task.tokenizer.mask_token_id) for row in examples]
    assert output.sequence_tokens.tolist() == hidden
    assert not output.sequence_given["length"].any()
    assert text_counts(task.splits["train"], task.tokenizer, "infill") == (None, 0, sum(hidden))
    unknown = task.splits["train"].map(
        lambda row: {"target_ids": [task.tokenizer.unk_token_id] * len(row["target_ids"])}
    )
    assert text_counts(unknown, task.tokenizer, "infill") == (None, sum(hidden), sum(hidden))


def test_an_end_of_text_that_also_stands_for_the_unknown_is_not_unknown():
    """As GPT-2's tokenizer names it."""
    rows = datasets.Dataset.from_list([{"input_ids": [3, 4, 3], "num_characters": 7}])
    for unk_token_id, num_unknown in ((3, 0), (4, 1)):
        tokenizer = SimpleNamespace(eos_token_id=3, unk_token_id=unk_token_id)
        assert text_counts(rows, tokenizer, "lm") == (7, num_unknown, 3)


def test_conditions_are_in_every_name_but_that_of_the_rate():
    metrics = likelihood_metrics(np.ones((3, 2)), np.array([1, 2, 3]), 5, {"source", "length"})
    given = "_given_length_given_source"
    assert set(metrics) == {
        f"nats_per_token{given}",
        f"nats_per_token{given}_standard_error",
        f"nats_per_token{given}_monte_carlo_standard_error",
        f"perplexity{given}",
        f"perplexity{given}_standard_error",
        f"bits_per_character{given}",
    }

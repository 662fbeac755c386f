import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from tests.modeling.naive import BOS, CLS, PAD, SpecialIds, make_examples
from tests.modeling.naive_edit_flow import applied
from xlm_hf.modeling.edit_flow import EditFlowCollator

V = 40
NOISE = 5


def with_sources(examples, seed=0):
    """Sources of all lengths, most of them like their target."""
    made = []
    for example in examples:
        rng = np.random.default_rng([seed, example["example_id"]])
        source = [token for token in example["target_ids"] if rng.random() < 0.7]
        for _ in range(rng.integers(0, 4)):
            source.insert(rng.integers(0, len(source) + 1), int(rng.integers(7, V)))
        made.append({**example, "source_ids": source})
    return made


def collated(examples, coupling, **options):
    options = {"max_length": 40, "kind": "seq2seq", "coupling": coupling, "noise_length": NOISE} | options
    return EditFlowCollator(SpecialIds(V), **options)(examples)


def documents_of(batch):
    """Of each document: its prompt, its text, the insertions into each slot, deletions and substitutions by token."""
    L, lists = batch["input_ids"].shape[1], {name: x.tolist() for name, x in batch.items()}
    inserted = [[] for _ in lists["slot_index"]]
    for row, token in zip(lists["target_rows"], lists["target_ids"], strict=True):
        inserted[lists["filled_slots"][row]].append(token)
    assert list(map(len, inserted)) == lists["insertion_counts"]
    changes = dict(zip(lists.get("changed_slots", []), lists.get("substitute_ids", []), strict=True))
    ends = [*lists["first_slots"][1:], len(lists["slot_index"])]
    for document, (first, end) in enumerate(zip(lists["first_slots"], ends, strict=True)):
        assert set(lists["slot_documents"][first:end]) == {document}
        row = lists["slot_index"][first] // L
        ids = [t for t, is_there in zip(lists["input_ids"][row], lists["attention_mask"][row], strict=True) if is_there]
        start = ids.index(BOS)
        assert lists["slot_index"][first:end] == list(range(row * L + start, row * L + len(ids)))
        kinds = lists["token_edits"][first:end] if "token_edits" in lists else [-1] + [0] * (end - first - 1)
        assert kinds[0] == -1
        deleted = {i - 1 for i, kind in enumerate(kinds) if kind == 1}
        substitutes = {i - 1: changes[first + i] for i, kind in enumerate(kinds) if kind == 2}
        yield ids[: start + 1], ids[start + 1 :], inserted[first:end], deleted, substitutes
    assert len(changes) == lists.get("token_edits", []).count(2)


def finished(text, inserted, deleted, substitutes):
    """The text after all remaining edits."""
    words = list(inserted[0])
    for i, token in enumerate(text):
        words += [] if i in deleted else [substitutes.get(i, token)]
        words += inserted[i + 1]
    return words


@pytest.mark.parametrize("coupling", ["empty", "uniform", "source"])
def test_the_remaining_edits_lead_to_the_target(coupling):
    examples = with_sources(make_examples(64, V))
    batch = collated(examples, coupling)
    kinds = Counter()
    for example, (prompt, text, *edits) in zip(examples, documents_of(batch), strict=True):
        assert prompt == [CLS, *example["prompt_ids"], BOS]
        assert finished(text, *edits) == example["target_ids"]
        assert all(text[i] != token for i, token in edits[2].items())
        kinds.update(insert=sum(map(len, edits[0])), delete=len(edits[1]), substitute=len(edits[2]))
    assert set(batch["input_ids"][~batch["attention_mask"]].tolist()) <= {PAD}
    assert batch["example_id"].tolist() == [example["example_id"] for example in examples]
    assert batch["sequence_tokens"].tolist() == [len(example["target_ids"]) + 1 for example in examples]
    assert (min(kinds.values()) > 10) == (coupling != "empty")
    # One edit at a time or all at once: the same.
    assert applied((7, 8), {0: 9}, {1}, {0: 10}, 9) == (9, 10)


@pytest.mark.parametrize("coupling", ["empty", "uniform", "source"])
def test_corruption_depends_on_the_example_alone(coupling):
    """The same example meets the same noise in any batch, and other noise in another epoch or with another seed."""
    examples = with_sources(make_examples(32, V, min_target=6))
    whole, options = collated(examples, coupling), {"condition_dropout": 0.3}
    for row in (0, 7, 31):
        alone = collated([examples[row]], coupling)
        width = alone["input_ids"].shape[1]
        assert alone["input_ids"][0].tolist() == whole["input_ids"][row, :width].tolist()
        assert alone["time_left"][0] == whole["time_left"][row]
    for other in (
        collated([{**example, "epoch": 1} for example in examples], coupling),
        collated(examples, coupling, seed=1),
    ):
        assert other["time_left"].tolist() != whole["time_left"].tolist()
    dropped = collated(examples, coupling, **options)
    pairs = zip(examples, documents_of(dropped), strict=True)
    lost = sum(prompt == [CLS, BOS] and example["prompt_ids"] != [] for example, (prompt, *_) in pairs)
    assert 2 < lost < 17
    for (_, text, *edits), (_, other, *of_other) in zip(documents_of(dropped), documents_of(whole), strict=True):
        assert text == other
        assert edits == of_other


def copies(target, num, **columns):
    example = {"prompt_ids": [], "target_ids": target, **columns}
    return [{**example, "example_id": i, "epoch": 0, "position": i} for i in range(num)]


@pytest.mark.parametrize("drop_beta", [1.0, 2.0])
def test_the_number_of_remaining_edits_and_the_time_left(drop_beta):
    """n has the law that drop_beta says, and the time left given n is Beta(n, K - n + 1), or 1 - u^(1 / (K + 1))."""
    length, num = 4, 20_000
    batch = collated(copies([9] * length, num), "empty", drop_beta=drop_beta)
    n = torch.zeros(num, dtype=torch.long).index_add(0, batch["slot_documents"], batch["insertion_counts"])
    expected = [((k + 1) ** drop_beta - k**drop_beta) / (length + 1) ** drop_beta for k in range(length + 1)]
    # Low discrepancy: far closer than independent draws.
    assert (torch.bincount(n) - num * torch.tensor(expected)).abs().max() <= 8
    for k in range(length + 1):
        law = (max(k, 1), length - k + 1) if k else (1, length + 1)
        assert kstest(batch["time_left"][n == k].numpy(), "beta", args=law).pvalue > 1e-4
    probabilities = torch.tensor(expected)[n]
    shares = torch.where(n > 0, n, (length + 1) * batch["time_left"])
    torch.testing.assert_close(batch["weights"], 1 / (probabilities * shares), rtol=1e-4, atol=0)
    if drop_beta == 1:
        assert "loss_weights" not in batch
    else:
        torch.testing.assert_close(batch["loss_weights"], (length + 1) / shares, rtol=1e-4, atol=0)


def test_every_subset_of_a_size_remains_alike():
    batch = collated(copies([10, 11, 12, 13], 30_000), "empty", seed=5)
    kept = [tuple(t for t in row if t >= 10) for row in batch["input_ids"].tolist()]
    for size in range(1, 4):
        counts = Counter(k for k in kept if len(k) == 4 - size)
        assert len(counts) == math.comb(4, size)
        assert chisquare(list(counts.values())).pvalue > 1e-4


def test_noise_has_the_law_of_its_coupling():
    """Of 3 random tokens 1 is substituted by a token of the target, drawn evenly; the others are deleted between."""
    batch = collated(copies([10, 11], 20_000), "uniform", noise_length=3, seed=2)
    alphas, starts = Counter(), Counter()
    for _, text, inserted, deleted, substitutes in documents_of(batch):
        if len(deleted) == 2 and len(substitutes) == 1 and sum(map(len, inserted)) == 1:
            # Nothing has been done yet.
            alphas[tuple(deleted), tuple(substitutes.items()), tuple(map(tuple, inserted))] += 1
            starts.update(text)
    # Where 2 of 4 columns are deletions, and which of the two tokens takes the place of another.
    assert len(alphas) == math.comb(4, 2) * 2
    assert chisquare(list(alphas.values())).pvalue > 1e-4
    # All ids that a tokenizer may write, the unknown one among them. A substitution by the same id is none.
    assert set(starts) == set(range(6, V))
    assert chisquare([starts[i] for i in range(12, V)]).pvalue > 1e-4


def test_an_alignment_that_is_given_is_taken():
    example = copies([10, 11], 1, source_ids=[10, 11], alignment=[1, 1, 2, 2])[0]
    rows = [{**example, "example_id": i, "position": i} for i in range(40)]
    deleted = [edits[1] for _, _, *edits in documents_of(collated(rows, "source"))]
    assert any(deleted)
    for row in rows:
        del row["alignment"]
    batch = collated(rows, "source")
    assert not any(edits[1] for _, _, *edits in documents_of(batch))
    assert (batch["weights"] * batch["time_left"]).tolist() == pytest.approx([1.0] * 40)


@pytest.mark.parametrize("coupling", ["empty", "source"])
def test_prompts_and_what_is_to_be_edited(coupling):
    examples = with_sources(make_examples(9, V))
    batch = collated(examples, coupling, prediction=True)
    for row, example in enumerate(examples):
        ids = [CLS, *example["prompt_ids"], BOS]
        assert batch["input_ids"][row, -len(ids) :].tolist() == ids
        assert int(batch["attention_mask"][row].sum()) == len(ids)
        if coupling == "source":
            assert batch["source_ids"][row, batch["source_mask"][row]].tolist() == example["source_ids"]
    assert ("source_ids" in batch) == (coupling == "source")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"target_ids": [V]}, {}, f"Token id {V} is outside the vocabulary of {V}"),
        ({"target_ids": [BOS]}, {}, f"A text holds the special token {BOS}, which this model never writes"),
        ({"source_ids": [BOS]}, {"coupling": "source"}, f"A text holds the special token {BOS}"),
        ({"prompt_ids": [8] * 40}, {}, "has 48 tokens with .* the model has 40 positions"),
        ({}, {"coupling": "uniform", "noise_length": 50}, "has 5[0-9] tokens with .* the model has 40 positions"),
        ({}, {"coupling": "source"}, "Edits of given texts need a column source_ids"),
        ({}, {"coupling": "noise"}, "coupling must be one of empty, uniform, source and is 'noise'"),
        ({}, {"drop_beta": 0}, "drop_beta must be greater than 0 and is 0"),
        ({}, {"condition_dropout": 1.0}, r"condition_dropout must be in \[0, 1\) and is 1.0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(change, options, message):
    example = {**make_examples(1, V)[0], **change}
    with pytest.raises(ValueError, match=message):
        collated([example], **({"coupling": "empty"} | options))

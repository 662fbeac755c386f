import random
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.modeling.naive import BOS, EOS, MASK, SpecialIds, make_examples
from tests.modeling.naive_insertion_transformer import slow_targets
from xlm_hf.modeling.insertion_transformer import InsertionTransformerCollator
from xlm_hf.modeling.insertion_transformer.collator_insertion_transformer import slot_targets, tree_weights

V = 40
PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published" / "insertion_transformer.safetensors"


@pytest.mark.parametrize("temperature", [None, 0.5, 1.0, 3.0, 1e-4])
def test_targets_and_weights_equal_those_of_a_loop(temperature):
    rng = random.Random(1)
    texts = [[rng.randrange(7, 11) for _ in range(rng.randrange(9))] for _ in range(60)]
    shares = [rng.choice([0, 0.3, 0.8, 1]) for _ in texts]
    drops = [[rng.random() < share for _ in text] for text, share in zip(texts, shares, strict=True)]
    ends = [rng.random() < 0.6 for _ in texts]
    lengths = np.array([len(text) for text in texts])
    flat = [np.array(list(chain(*x)), dtype=t) for x, t in ((texts, np.int64), (drops, bool))]
    slots, ids, weights, with_targets = slot_targets(flat[0], lengths, flat[1], np.array(ends), EOS, temperature)
    expected, first = [], 0
    for text, dropped, end, num in zip(texts, drops, ends, with_targets, strict=True):
        of_text = slow_targets(text, dropped, temperature, goes_on=not end)
        assert num == sum(map(bool, of_text))
        expected += [(first + slot, token, weight) for slot, lacks in enumerate(of_text) for token, weight in lacks]
        first += len(of_text)
    assert [(slot, token) for slot, token, _ in expected] == list(zip(slots.tolist(), ids.tolist(), strict=True))
    np.testing.assert_allclose(weights, [weight for _, _, weight in expected], rtol=1e-12)


def test_a_token_that_is_missing_twice_counts_twice():
    slots, ids, weights, _ = slot_targets(
        np.array([9, 9]), np.array([2]), np.array([True, True]), np.array([True]), EOS, 1.0
    )
    assert (slots.tolist(), ids.tolist(), weights.tolist()) == ([0, 0], [9, 9], [0.5, 0.5])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, None])
def test_targets_are_those_of_the_published_code_where_these_are_right(temperature):
    """Recorded from fairseq, which keeps one weight of a token that is missing several times in a slot."""
    recorded, pad = load_file(PUBLISHED), 1
    if f"slot_weights.{temperature}" in recorded:
        for number, row in enumerate(recorded[f"slot_weights.{temperature}"], 1):
            np.testing.assert_allclose(tree_weights(np.array([number]), temperature), row[:number], rtol=1e-7)
    num_compared = 0
    for text, kept, target in zip(recorded["texts"], recorded["kept"], recorded[f"targets.{temperature}"], strict=True):
        text, kept = text[(text > 2)], list(kept[kept > 2])
        # What is kept is the leftmost that fits.
        dropped = np.array([not (kept and kept[0] == token and kept.pop(0)) for token in text])
        slots, ids, weights, _ = slot_targets(text, np.array([len(text)]), dropped, np.array([True]), pad, temperature)
        grid = np.zeros_like(target)
        np.add.at(grid, (slots, ids), weights)
        pairs = Counter(zip(slots.tolist(), ids.tolist(), strict=True))
        for slot in range(slots.max() + 1):
            if max(n for (s, _), n in pairs.items() if s == slot) == 1:
                np.testing.assert_allclose(grid[slot], target[slot], rtol=1e-6, atol=1e-7)
                num_compared += 1
            else:
                assert target[slot].sum() < 0.99 < grid[slot].sum() < 1.0001
    assert num_compared == 26


@pytest.mark.parametrize("kind", ["seq2seq", "lm"])
def test_a_batch_holds_what_is_kept_and_what_each_slot_lacks(kind):
    examples = [{**e, "input_ids": e["target_ids"]} for e in make_examples(40, V, seed=2)]
    batch = InsertionTransformerCollator(SpecialIds(V), 32, kind, tree_temperature=1.0)(examples)
    L = batch["input_ids"].shape[1]
    targets: dict = {}
    for slot, token, weight in zip(
        batch["slot_index"][batch["target_slots"]].tolist(),
        batch["target_ids"].tolist(),
        batch["target_weights"].tolist(),
        strict=True,
    ):
        targets.setdefault(slot, []).append((token, weight))
    assert sorted(targets) == batch["slot_index"].tolist()
    for row, example in enumerate(examples):
        ids = batch["input_ids"][row, batch["attention_mask"][row]].tolist()
        start = ids.index(BOS)
        assert ids[:start] == (example["prompt_ids"] if kind == "seq2seq" else [])
        restored, drops, total = [], [], 0.0
        for position in range(start, len(ids)):
            kept = [] if position == start else [ids[position]]
            missing = [token for token, _ in targets[row * L + position] if token != EOS]
            restored += kept + missing
            drops += [False] * len(kept) + [True] * len(missing)
            total += sum(weight for _, weight in targets[row * L + position])
        assert restored == example["target_ids"]
        assert sum(drops) == batch["num_dropped"][row]
        assert total == pytest.approx(1, abs=1e-6)
        expected = slow_targets(restored, drops, 1.0)
        for slot, lacks in enumerate(expected):
            assert targets[row * L + start + slot] == [
                (t, pytest.approx(w / len(expected), abs=1e-6)) for t, w in lacks
            ]


def test_the_last_slot_of_a_text_that_goes_on_has_no_end():
    collator = InsertionTransformerCollator(SpecialIds(V), 32, "lm")
    example = {"input_ids": [9, 10, 11], "epoch": 0}
    seen = set()
    for position in range(40):
        batch = collator([{**example, "example_id": position, "position": position, "continues": True}])
        last = len(batch["slot_index"]) - 1
        of_last = batch["target_ids"][batch["target_slots"] == last].tolist()
        assert EOS not in of_last
        seen.add(tuple(of_last))
        if len(batch["target_ids"]):
            assert float(batch["target_weights"].sum()) == pytest.approx(1, abs=1e-6)
    assert seen == {(), (11,), (10, 11), (9, 10, 11)}
    batch = collator([{**example, "input_ids": [], "example_id": 0, "position": 0, "continues": True}])
    assert (len(batch["num_dropped"]), len(batch["target_ids"])) == (1, 0)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_number_of_dropped_tokens_and_which_they_are(beta):
    length, num = 4, 5000
    examples = [
        {"input_ids": [10, 11, 12, 13], "example_id": i, "epoch": 0, "position": i, "prompt_ids": []}
        for i in range(num)
    ]
    batch = InsertionTransformerCollator(SpecialIds(V), 32, "lm", drop_beta=beta)(examples)
    counts = np.bincount(batch["num_dropped"], minlength=length + 1)
    # Low discrepancy: far closer than independent draws.
    expected = [((n + 1) ** beta - n**beta) / (length + 1) ** beta * num for n in range(length + 1)]
    assert np.abs(counts - expected).max() <= 6
    kept = Counter(tuple(t for t in row if t >= 10) for row in batch["input_ids"].tolist())
    pairs = [n for text, n in kept.items() if len(text) == 2]
    assert len(pairs) == 6
    assert max(abs(n - counts[2] / 6) for n in pairs) < 4 * (counts[2] / 6) ** 0.5


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"tree_temperature": 0.0}, {}, "tree_temperature must be greater than 0 and is 0"),
        ({"drop_beta": -1.0}, {}, "drop_beta must be greater than 0 and is -1"),
        ({}, {"target_ids": [9, EOS]}, f"A text holds the special token {EOS}, which this model never writes"),
        ({}, {"target_ids": [MASK]}, f"A text holds the special token {MASK}"),
        ({}, {"prompt_ids": [8] * 40}, "has 41 tokens with .BOS., and the model has 32 positions"),
    ],
)
def test_bad_options_and_examples_are_refused_in_one_sentence(options, change, message):
    example = {**make_examples(1, V)[0], "target_ids": [], **change}
    with pytest.raises(ValueError, match=message):
        InsertionTransformerCollator(SpecialIds(V), 32, "seq2seq", **options)([example])

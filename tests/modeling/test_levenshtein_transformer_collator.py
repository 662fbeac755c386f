import random
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.modeling.naive import BOS, EOS, MASK, PAD, SpecialIds, make_examples
from tests.modeling.naive_levenshtein_transformer import gap_counts, num_common, oracle
from xlm_hf.modeling.levenshtein_transformer import LevenshteinTransformerCollator
from xlm_hf.modeling.levenshtein_transformer.collator_levenshtein_transformer import common_tokens, missing_tokens
from xlm_hf.modules.edits import EditBuffer, slots_of_counts

V = 40
PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published" / "levenshtein_transformer.safetensors"


def flat(texts):
    return np.array(list(chain(*texts)), dtype=np.int64), np.array([len(text) for text in texts])


def with_sources(examples, seed=5):
    """Examples and wrong versions of their targets."""
    rng = random.Random(seed)
    sources = [[t for t in e["target_ids"] if rng.random() < 0.6] for e in examples]
    for source in sources:
        for _ in range(rng.randint(0, 3)):
            source.insert(rng.randint(0, len(source)), rng.randrange(7, V))
    return [{**e, "source_ids": source} for e, source in zip(examples, sources, strict=True)]


def test_the_oracle_makes_the_fewest_deletions_and_insertions():
    """Against a recursion, and in number against all subsequences."""
    rng = random.Random(3)
    pairs = [[[rng.randrange(3) for _ in range(rng.randrange(8))] for _ in range(2)] for _ in range(150)]
    stays, is_there = common_tokens(*flat([source for source, _ in pairs]), *flat([target for _, target in pairs]))
    expected = [oracle(source, target) for source, target in pairs]
    assert stays.tolist() == list(chain(*(first for first, _ in expected)))
    assert is_there.tolist() == list(chain(*(second for _, second in expected)))
    assert all(sum(first) == num_common(*pair) for pair, (first, _) in zip(pairs, expected, strict=True))


def test_oracle_edits_are_those_of_the_published_code():
    """Recorded from fairseq, sentence ends cut off: what is deleted, what is missing, and how much of it where."""
    recorded, rows = load_file(PUBLISHED), range(6)

    def texts(name):
        return [row[row > 2].tolist() for row in recorded[name]]

    sources, targets, kept = texts("sources"), texts("targets"), texts("kept")
    stays, _ = common_tokens(*flat(sources), *flat(targets))
    deleted = [recorded["deleted"][i, 1 : 1 + len(sources[i])] for i in rows]
    assert (~stays).astype(int).tolist() == list(chain(*deleted))
    _, is_there = common_tokens(*flat(kept), *flat(targets))
    missing = [recorded["missing"][i, 1 : 1 + len(targets[i])] for i in rows]
    assert (~is_there).tolist() == list(chain(*missing))
    counts = missing_tokens(~is_there, flat(targets)[1])
    assert counts.tolist() == list(chain(*(recorded["counts"][i, : len(kept[i]) + 1] for i in rows)))


def test_placeholders_and_deletions_are_made_as_in_the_published_code():
    recorded, rows = load_file(PUBLISHED), torch.arange(6)

    def buffer(name):
        texts = [row[row > 2].tolist() for row in recorded[name]]
        lengths = torch.tensor(flat(texts)[1])
        start = torch.tensor([text + [PAD] * (14 - len(text)) for text in texts])
        mask = torch.ones(6, 1, dtype=torch.bool)
        return EditBuffer(torch.full((6, 1), BOS), mask, torch.full((6,), 20), PAD, start=start, start_lengths=lengths)

    state = buffer("kept")
    counts = torch.from_numpy(recorded["given_counts"]) * (torch.arange(8) <= state.lengths[:, None])
    slots, inserted = slots_of_counts(counts, 20)
    state.apply(rows, 0, slots, torch.full_like(slots, 3), inserted)
    written = [row[:length].tolist() for row, length in zip(state.tokens, state.lengths, strict=True)]
    assert written == [row[row > 2].tolist() for row in recorded["with_placeholders"]]
    state = buffer("sources")
    deleted = torch.zeros(6, 20, dtype=torch.bool)
    deleted[:, :13] = torch.from_numpy(recorded["given_deletions"][:, 1:])
    nothing = torch.zeros(6, 0, dtype=torch.int64)
    state.apply(rows, 0, nothing, nothing, nothing.bool(), deleted=deleted)
    written = [row[:length].tolist() for row, length in zip(state.tokens, state.lengths, strict=True)]
    assert written == [row[row > 2].tolist() for row in recorded["without_deleted"]]


def rows_of(batch, ids, mask):
    return [row[there].tolist() for row, there in zip(batch[ids], batch[mask].bool(), strict=True)]


@pytest.mark.parametrize("kind", ["seq2seq", "lm"])
@pytest.mark.parametrize("initial_text", ["empty", "source"])
def test_the_views_of_a_batch_and_what_they_lack(kind, initial_text):
    examples = with_sources([{**e, "input_ids": e["target_ids"]} for e in make_examples(60, V, seed=2)])
    examples[3]["continues"] = True
    batch = LevenshteinTransformerCollator(SpecialIds(V), 40, kind, initial_text=initial_text)(examples)
    L, kinds = batch["input_ids"].shape[1], Counter()
    gaps = dict(zip(batch["gap_index"].tolist(), batch["gap_counts"].tolist(), strict=True))
    targets = dict(zip(batch["logits_index"].tolist(), batch["target_ids"].tolist(), strict=True))
    third = ("edited_ids", "edited_mask") if initial_text == "source" else ("input_ids", "attention_mask")
    assert ("edited_ids" in batch) == (initial_text == "source")
    views = (rows_of(batch, *names) for names in (("kept_ids", "kept_mask"), ("input_ids", "attention_mask"), third))
    for number, (example, kept, filled, edited) in enumerate(zip(examples, *views, strict=True)):
        target, source = example["target_ids"], example["source_ids"]
        prompt = [*(example["prompt_ids"] if kind == "seq2seq" else []), BOS]
        n = len(prompt)
        assert kept[:n] == filled[:n] == edited[:n] == prompt
        is_missing = [token == MASK for token in filled[n:]]
        assert kept[n:] == [t for t, missing in zip(target, is_missing, strict=True) if not missing]
        at = [number * L + n + i for i, missing in enumerate(is_missing) if missing]
        assert [t if t != MASK else targets[number * L + n + i] for i, t in enumerate(filled[n:])] == target
        assert [position for position in targets if position // L == number] == at
        counts = gap_counts(is_missing)
        counts[-1] = -100 if example.get("continues") else counts[-1]
        assert [count for position, count in gaps.items() if position // L == number] == counts
        assert [p - number * L for p in gaps if p // L == number] == list(range(n - 1, len(kept)))
        own = batch["token_documents"] == number
        assert (batch["token_index"][own] - number * L).tolist() == list(range(n, len(edited)))
        assert batch["text_ids"][batch["text_documents"] == number].tolist() == target
        assert batch["sequence_tokens"][number] == len(target) + 1 - example.get("continues", False)
        is_source = edited[n:] == source
        assert is_source or edited == filled
        kinds["deletion"] += is_source
        kinds["insertion"] += is_missing == [not there for there in oracle(source, target)[1]]
    if initial_text == "source":
        # Half of them, and some by chance.
        assert all(22 <= kinds[name] <= 45 for name in ("deletion", "insertion"))
    else:
        assert kinds["insertion"] < 20


def test_the_two_choices_of_a_source_are_independent():
    example = {"prompt_ids": [], "target_ids": [9, 10, 11, 12], "source_ids": [12, 20], "epoch": 0}
    collator = LevenshteinTransformerCollator(SpecialIds(V), 40, "seq2seq", initial_text="source", drop_beta=1e-6)
    batch = collator([{**example, "example_id": i, "position": i} for i in range(2000)])
    # With so small a beta nothing is dropped at random.
    begins = (batch["input_ids"][:, 1:] == MASK).any(dim=-1)
    edits = batch["edited_ids"][:, 2] == 20
    for one in (begins, edits, begins == edits):
        assert abs(int(one.sum()) - 1000) < 4 * 500**0.5


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_number_of_missing_tokens_and_which_they_are(beta):
    num = 4000
    examples = [{"input_ids": [10, 11, 12, 13], "example_id": i, "epoch": 0, "position": i} for i in range(num)]
    batch = LevenshteinTransformerCollator(SpecialIds(V), 32, "lm", drop_beta=beta)(examples)
    texts = Counter(tuple(row) for row in rows_of(batch, "kept_ids", "kept_mask"))
    counts = np.zeros(5)
    for text, n in texts.items():
        counts[5 - len(text)] += n
    expected = [((n + 1) ** beta - n**beta) / 5**beta * num for n in range(5)]
    assert np.abs(counts - expected).max() <= 6
    pairs = [n for text, n in texts.items() if len(text) == 3]
    assert len(pairs) == 6
    assert max(abs(n - counts[2] / 6) for n in pairs) < 4 * (counts[2] / 6) ** 0.5


def test_prompts_for_generation_come_with_the_sources():
    examples = with_sources(make_examples(6, V, seed=1))
    options = {"prediction": True, "initial_text": "source"}
    batch = LevenshteinTransformerCollator(SpecialIds(V), 40, "seq2seq", **options)(examples)
    assert rows_of(batch, "source_ids", "source_mask") == [e["source_ids"] for e in examples]
    assert rows_of(batch, "input_ids", "attention_mask") == [[*e["prompt_ids"], BOS] for e in examples]


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"initial_text": "sources"}, {}, "initial_text must be one of empty, source and is 'sources'"),
        ({"initial_text": "source"}, {}, "need a column source_ids: choose a task that has it"),
        ({"initial_text": "source"}, {"source_ids": [EOS]}, f"A text holds the special token {EOS}"),
        ({"initial_text": "source"}, {"source_ids": [9] * 40}, "has 4[0-9] tokens with .BOS., and the model has 40"),
        ({}, {"target_ids": [MASK]}, f"A text holds the special token {MASK}"),
        ({}, {"prompt_ids": [8] * 48}, "has 49 tokens with .BOS., and the model has 40 positions"),
    ],
)
def test_bad_options_and_examples_are_refused_in_one_sentence(options, change, message):
    example = {**make_examples(1, V)[0], "target_ids": [], **change}
    with pytest.raises(ValueError, match=message):
        LevenshteinTransformerCollator(SpecialIds(V), 40, "seq2seq", **options)([example])

"""Block diffusion sampled: laws against enumeration, the cache against none, rows against batches."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from tests.host_reads import as_on_an_accelerator
from tests.modeling.naive_bd3lm import (
    BOS,
    EOS,
    FIRST_WORD,
    MASK,
    PAD,
    WORDS,
    TableModel,
    make_model,
    one_by_one_law,
    random_joint,
    reverse_law,
)
from xlm_hf.modeling.bd3lm import BD3LMGenerationConfig

PROMPTS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17, 18]]
SEEDS = [3, 1, 4]


def batch_of(prompts, side="left"):
    rows = [[*prompt, BOS] for prompt in prompts]
    width = max(map(len, rows))
    return torch.tensor(
        [[PAD] * (width - len(r)) + r if side == "left" else r + [PAD] * (width - len(r)) for r in rows]
    )


def check_law(model, law, length, num=5000, **options):
    """Whole decodes against an enumerated law; cells with few expected draws are pooled, as the test asks."""
    assert sum(law.values()) == pytest.approx(1.0)
    output = model.generate(
        torch.full((num, 1), BOS), seed=11, do_sample=True, max_new_tokens=length, return_history=True, **options
    )
    counts = Counter(tuple(row) for row in output.sequences[:, 1:].tolist())
    assert set(counts) <= {x for x, p in law.items() if p > 0}
    common = [x for x, p in law.items() if p * num >= 8]
    observed = [counts[x] for x in common] + [num - sum(counts[x] for x in common)]
    expected = [law[x] * num for x in common] + [num * (1 - sum(law[x] for x in common))]
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-4
    return output


@pytest.mark.parametrize(("length", "block_length"), [(3, 1), (3, 2), (4, 2), (3, 3)])
def test_samples_follow_the_law_of_three_steps_a_block(length, block_length):
    model = TableModel(block_length)
    num_blocks = -(-length // block_length)
    law = reverse_law(model, length, block_length, 3)
    output = check_law(model, law, length, num_steps=3 * num_blocks)
    # One call for each step in which something was written.
    assert output.nfe.tolist() == [len(set(row)) for row in output.history[:, 1:].tolist()]
    # No token of a block is written before the blocks in front of it are.
    for block in range(1, num_blocks):
        before, own = output.history[:, 1:].split((block * block_length, length - block * block_length), dim=1)
        assert (own.amin(dim=-1) > before.amax(dim=-1)).all()


def test_remasking_follows_its_law():
    model = TableModel(2)
    law = reverse_law(model, 3, 2, 3, eta=0.5)
    output = check_law(model, law, 3, sampler="remdm", num_steps=6, eta=0.5)
    assert output.nfe.max() > 3


@pytest.mark.parametrize("block_length", [1, 2, 3])
def test_first_hitting_and_the_surest_first_take_a_step_for_each_token(block_length):
    model = TableModel(block_length)
    for options, order in (({"sampler": "first_hitting"}, "random"), ({"sampler": "confidence"}, "confidence")):
        output = check_law(model, one_by_one_law(model, 3, block_length, order), 3, **options)
        assert set(output.nfe.tolist()) == {3}


@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_at_the_exact_conditionals_one_token_at_a_time_has_the_law_of_the_data(block_length):
    joint = random_joint(4, seed=2, num_words=2)
    check_law(TableModel(block_length, joint), joint, 4, sampler="first_hitting")


OPTIONS = {
    "ancestral": {"num_steps": 5},
    "one step a position": {},
    "first_hitting": {"sampler": "first_hitting"},
    "remdm": {"sampler": "remdm", "num_steps": 12, "eta": 0.3},
    "remdm, conf": {"sampler": "remdm", "remasking": "conf", "eta": 1.0},
    "other blocks": {"block_length": 5, "num_steps": 8},
    "confidence": {"sampler": "confidence", "order": "entropy", "num_steps": 6},
    "threshold": {"sampler": "confidence", "confidence_threshold": 0.3},
    "bound": {"sampler": "confidence", "order": "margin", "entropy_bound": 2.0},
}
MODELS = {
    "blocks of 3": {},
    "convolution": {"conv_kernel_size": 5, "block_length": 2},
    "one by one": {"block_length": 1, "conv_kernel_size": 3, "learned_positions": True},
    "time": {"conditioning": "adaln"},
}


def scores_of(model, prompts, seeds, options):
    """The output, and the logits of every call for each row."""
    seen = {}

    def record(ids, scores, cur_step):
        for row, score in zip(ids.tolist(), scores, strict=True):
            seen.setdefault(tuple(t for t in row if t != PAD), []).append(score)
        return scores

    output = model.generate(batch_of(prompts), seed=seeds, logits_processor=record, **options)
    return output, seen


CASES = [
    *(("blocks of 3", name) for name in OPTIONS),
    *(("convolution", name) for name in ("ancestral", "first_hitting", "threshold")),
    *(("one by one", name) for name in ("one step a position", "threshold")),
    ("time", "ancestral"),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_cache_changes_nothing_and_a_row_decodes_alike_in_any_batch(kind, name):
    model = make_model(**MODELS[kind])
    # Without max_new_tokens every row has a canvas of its own length; nothing ends a text early but its end.
    for limit in ({"max_new_tokens": 10}, {"max_length": 14}):
        options = {"do_sample": True, "return_history": True, **OPTIONS[name], **limit}
        together, scores = scores_of(model, PROMPTS, SEEDS, options)
        plain, plain_scores = scores_of(model, PROMPTS, SEEDS, {**options, "use_cache": False})
        assert scores.keys() == plain_scores.keys()
        for ids, values in scores.items():
            for value, other in zip(values, plain_scores[ids], strict=True):
                torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
        right = model.generate(batch_of(PROMPTS, side="right"), seed=SEEDS, **options)
        with as_on_an_accelerator():
            rounded = [model.generate(batch_of(PROMPTS), seed=SEEDS, use_cache=c, **options) for c in (True, False)]
        for other in (plain, right, *rounded):
            for field in ("sequences", "history", "nfe"):
                torch.testing.assert_close(getattr(other, field), getattr(together, field))
            assert other.finish_reason == together.finish_reason
        width = batch_of(PROMPTS).shape[1]
        assert torch.equal(together.sequences[:, :width], batch_of(PROMPTS))
        written = together.sequences[:, width:]
        assert set(written.unique().tolist()) <= {PAD, EOS, *range(FIRST_WORD, 20)}
        for row, prompt in enumerate(PROMPTS):
            alone = model.generate(batch_of([prompt]), seed=SEEDS[row : row + 1], **options)
            own = alone.sequences[0, len(prompt) + 1 :].tolist()
            assert own == written[row, : len(own)].tolist()
            assert (written[row, len(own) :] == PAD).all()
            assert alone.history[0, len(prompt) + 1 :].tolist() == together.history[row, width:][: len(own)].tolist()
            assert alone.nfe[0] == together.nfe[row]
            assert alone.finish_reason[0] == together.finish_reason[row]


@pytest.mark.parametrize("size", [1, 4])
def test_a_finished_block_costs_no_pass_of_its_own(size):
    model, calls = make_model(size), []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(args[0].shape[1]), with_kwargs=True
    )
    options = {"sampler": "first_hitting", "max_new_tokens": 8, "suppress_tokens": [EOS]}
    output = model.generate(batch_of(PROMPTS), seed=0, **options)
    handle.remove()
    assert output.nfe.tolist() == [8] * 3
    # The prompt and the first block; then a block, and at its beginning the one before.
    assert calls == [8 + size, *[size] * (size - 1), *(2 * size, *[size] * (size - 1)) * (8 // size - 1)]


def test_with_a_cache_an_accelerator_sees_two_lengths():
    model, lengths = make_model(2), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0].shape[1], kwargs["attention_mask"].shape[1])),
        with_kwargs=True,
    )
    with as_on_an_accelerator():
        model.generate(batch_of(PROMPTS), seed=0, do_sample=True, num_steps=7, max_new_tokens=9)
    # The prompts and the first block; then two blocks behind the widest cache.
    assert len(lengths) > 4
    assert set(lengths) == {(10, 10), (4, 18)}


def test_nothing_is_written_after_the_block_that_holds_the_end():
    model = TableModel(2)
    model.config.eos_token_id = WORDS[0]
    output = model.generate(torch.full((300, 1), BOS), seed=0, do_sample=True, max_new_tokens=8, num_steps=8)
    ended = 0
    for row, nfe, reason in zip(
        output.sequences[:, 1:].tolist(), output.nfe.tolist(), output.finish_reason, strict=True
    ):
        end = row.index(WORDS[0]) if WORDS[0] in row else None
        assert (reason == "stop") == (end is not None)
        if end is not None:
            assert set(row[end + 1 :]) <= {PAD}
            assert nfe <= (end // 2 + 1) * 2
            ended += end < 6
    assert ended > 100


@pytest.mark.parametrize("name", OPTIONS)
def test_blanks_are_filled_in_as_one_block(name):
    model = make_model(2)
    rows = [[8, MASK, 10, MASK, MASK, MASK], [MASK, MASK, 11], [12, MASK]]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    output = model.generate(ids, seed=SEEDS, do_sample=True, return_history=True, **OPTIONS[name])
    assert output.sequences.shape == ids.shape
    assert torch.equal(output.sequences[ids != MASK], ids[ids != MASK])
    assert MASK not in output.sequences
    assert torch.equal(output.history >= 0, ids == MASK)
    for row, alone in enumerate(rows):
        own = model.generate(torch.tensor([alone]), seed=SEEDS[row : row + 1], do_sample=True, **OPTIONS[name])
        assert own.sequences[0].tolist() == output.sequences[row, width - len(alone) :].tolist()


def test_rows_that_are_filled_in_and_rows_that_go_on_may_share_a_batch():
    model, options = make_model(2), {"sampler": "first_hitting", "do_sample": True, "max_new_tokens": 6}
    ids = torch.tensor([[8, MASK, 10, MASK], [PAD, 9, 11, BOS]])
    output = model.generate(ids, seed=[3, 1], **options)
    alone = [model.generate(ids[i : i + 1], seed=[s], **options).sequences[0].tolist() for i, s in enumerate((3, 1))]
    assert output.sequences[0, :4].tolist() == alone[0][:4]
    written = output.sequences[1, 4:].tolist()
    assert [t for t in written if t != PAD] == [t for t in alone[1][3:] if t != PAD]


def test_the_first_mask_is_seen_in_both_directions_when_it_is_filled_in():
    model = make_model(1)
    logits = [model.generate(torch.tensor([[8, MASK, last]]), seed=0).sequences[0, 1] for last in range(7, 20)]
    assert len({int(token) for token in logits}) > 1


def test_options_are_those_of_the_sampler():
    with pytest.raises(ValueError, match="use_cach"):
        BD3LMGenerationConfig(use_cach=True)
    with pytest.raises(ValueError, match="The sampler 'first_hitting' has no option 'eta'"):
        BD3LMGenerationConfig(sampler="first_hitting", eta=0.5)

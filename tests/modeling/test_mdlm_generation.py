import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.host_reads import as_on_an_accelerator
from tests.modeling.naive import BOS, EOS, FIRST_WORD, MASK, PAD, batch_of, check_histogram
from tests.modeling.naive_mdlm import (
    WORDS,
    TableModel,
    fill,
    gauss,
    make_model,
    process_law,
    random_joint,
    random_order_law,
    rule_law,
)
from xlm_hf.modeling.mdlm import MDLMConfig, MDLMForMaskedDiffusion, MDLMGenerationConfig
from xlm_hf.modules.edits import EDIT_KINDS

PROMPTS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17], []]


def check_law(model, law, length, num=6000, **options):
    """Whole decodes against an enumerated law."""
    output = model.generate(
        torch.full((num, 1), BOS), seed=11, do_sample=True, max_new_tokens=length, return_history=True, **options
    )
    check_histogram(list(map(tuple, output.sequences[:, 1:].tolist())), law)
    return output


@pytest.mark.parametrize("uses_time", [False, True])
@pytest.mark.parametrize(
    ("num_steps", "schedule"), [(1, "log_linear"), (2, "cosine"), (3, "log_linear"), (9, "cosine")]
)
def test_ancestral_samples_follow_the_law_of_their_steps(num_steps, schedule, uses_time):
    model = TableModel(uses_time=uses_time)
    law = process_law(model, 3, num_steps, schedule)
    output = check_law(model, law, 3, num_steps=num_steps, noise_schedule=schedule)
    steps = torch.where(output.history >= 0, output.history, 0)[:, 1:]
    assert steps.max() == num_steps - 1
    if uses_time:
        # One call a step, from the first until the last mask is gone.
        assert torch.equal(output.nfe, steps.amax(dim=-1) + 1)
    else:
        # One call for each step in which something was written.
        assert output.nfe.tolist() == [len(set(row)) for row in steps.tolist()]


def test_steps_are_those_of_the_schedule_that_the_model_was_trained_with():
    model, prompts = TableModel(), torch.full((50, 1), BOS)

    def history(**options):
        options = {"num_steps": 3, "seed": 5, "max_new_tokens": 3, "do_sample": True, "return_history": True} | options
        return model.generate(prompts, **options).history

    asked, even = history(noise_schedule="cosine"), history()
    model.config.noise_schedule = "cosine"
    assert torch.equal(history(), asked)
    assert torch.equal(history(noise_schedule="log_linear"), even)
    assert not torch.equal(asked, even)


def test_several_end_tokens_are_an_option_as_the_trainer_of_transformers_writes_them():
    assert MDLMGenerationConfig(eos_token_id=[EOS]).eos_token_id == [EOS]


def test_remasking_leaves_no_mask_wherever_its_schedule_ends():
    schedule = {"name": "clipped", "low": 0.3, "high": 0.8}
    output = TableModel().generate(
        torch.full((50, 1), BOS), seed=3, sampler="remdm", noise_schedule=schedule, max_new_tokens=3, do_sample=True
    )
    assert not (output.sequences == MASK).any()


@pytest.mark.parametrize("uses_time", [False, True])
def test_blocks_are_finished_one_after_the_other(uses_time):
    model = TableModel(uses_time=uses_time)
    law = process_law(model, 3, 2, blocks=[(0, 1), (2,)])
    output = check_law(model, law, 3, num_steps=4, block_length=2)
    assert (output.history[:, 3:] > output.history[:, 1:3].amax(dim=-1, keepdim=True)).all()


REMASKING = {
    "cap": lambda s, t, eta: min(eta, (1 - s) / t if t > 0 else 1.0, 1.0),
    "rescale": lambda s, t, eta: eta * min((1 - s) / t if t > 0 else 1.0, 1.0),
}


@pytest.mark.parametrize("remasking", REMASKING)
@pytest.mark.parametrize("uses_time", [False, True])
def test_remasking_follows_its_law(remasking, uses_time):
    model, eta = TableModel(uses_time=uses_time), 0.5
    law = process_law(model, 2, 4, sigma=lambda s, t: REMASKING[remasking](s, t, eta))
    output = check_law(model, law, 2, sampler="remdm", num_steps=4, remasking=remasking, eta=eta)
    assert len({tuple(law.items()), tuple(process_law(model, 2, 4).items())}) == 2
    assert output.nfe.max() > 2


@pytest.mark.parametrize("remasking", REMASKING)
def test_remasking_keeps_the_share_of_masks_and_the_joint_law_at_the_exact_conditionals(remasking):
    """At every step the masks are Bernoulli(1 - alpha_s) and what is written has the law of the data."""
    joint, num, num_steps = random_joint(1, seed=4), 8000, 5
    joint = {(a, b): p * q for ((a,), p), ((b,), q) in itertools.product(joint.items(), repeat=2)}
    drafts = []

    class Streamer:
        put = end = staticmethod(lambda *value: None)
        put_draft = staticmethod(lambda value: drafts.append(value.clone()))

    options = {"sampler": "remdm", "remasking": remasking, "eta": 0.4, "num_steps": num_steps, "do_sample": True}
    TableModel(joint).generate(torch.full((num, 1), BOS), seed=3, streamer=Streamer(), max_new_tokens=2, **options)
    back = 0
    for step, (before, draft) in enumerate(itertools.pairwise([torch.full((num, 2), MASK), *drafts])):
        m = 1 - (step + 1) / num_steps
        back += ((before != MASK) & (draft == MASK)).sum()
        counts = Counter(tuple(row) for row in draft.tolist())
        marginal = {w: (1 - m) * sum(p for x, p in joint.items() if x[0] == w) for w in WORDS}
        marginal[MASK] = m
        cells = [c for c in itertools.product(marginal, repeat=2) if marginal[c[0]] * marginal[c[1]] > 0]
        expected = [marginal[a] * marginal[b] * num for a, b in cells]
        assert chisquare([counts[c] for c in cells], expected, sum_check=False).pvalue > 1e-4
    assert back > num / 10


def test_confidence_remasking_takes_back_what_was_least_probable():
    """Of two written tokens sigma_l = eta sigma_max exp(-p_l) / sum of exp(-p), p being what each had when written."""

    class Sure(TableModel):
        def table(self, canvas, alpha=None):
            return np.array([[0.9, 0.05, 0.05], [0.3, 0.4, 0.3]])

    drafts, num, eta = [], 12_000, 0.9

    class Streamer:
        put = end = staticmethod(lambda *value: None)
        put_draft = staticmethod(lambda value: drafts.append(value.clone()))

    options = {"sampler": "remdm", "remasking": "conf", "eta": eta, "num_steps": 4, "do_sample": True}
    output = Sure().generate(torch.full((num, 1), BOS), seed=3, streamer=Streamer(), max_new_tokens=2, **options)
    assert set(output.sequences[:, 1:].unique().tolist()) == set(WORDS)
    table = Sure().table(())
    for words in itertools.product(range(3), repeat=2):
        rows = (drafts[0] == torch.tensor([WORDS[i] for i in words])).all(dim=-1)
        p = [table[position, word] for position, word in enumerate(words)]
        for position in range(2):
            # t = 3/4 and s = 1/2, so sigma_max is 1.
            sigma = eta * math.exp(-p[position]) / sum(math.exp(-q) for q in p)
            observed, n = int((drafts[1][rows, position] == MASK).sum()), int(rows.sum())
            assert abs(observed - sigma * n) < 4 * math.sqrt(n * sigma * (1 - sigma))
    # From one written token sigma is eta, and an empty position next to it is filled as without remasking.
    rows = (drafts[0][:, 0] != MASK) & (drafts[0][:, 1] == MASK)
    n = int(rows.sum())
    for position, probability in ((0, eta), (1, 2 / 3)):
        observed = int((drafts[1][rows, position] == MASK).sum())
        assert abs(observed - probability * n) < 4 * math.sqrt(n * probability * (1 - probability))


def test_first_hitting_is_the_limit_of_infinitely_many_steps():
    model = TableModel()
    law = random_order_law(model, 3)
    fine = process_law(model, 3, 400)
    assert sum(abs(law[x] - fine[x]) for x in law) < 0.02
    output = check_law(model, law, 3, sampler="first_hitting")
    assert set(output.nfe.tolist()) == {3}
    assert set(map(tuple, output.history[:, 1:].tolist())) == set(itertools.permutations(range(3)))


def test_first_hitting_tells_the_network_the_times_of_the_hits():
    """The two masks go at times r1 > r2, the order statistics of two uniforms: density 2 on r1 > r2."""
    model, law = TableModel(uses_time=True), {}
    for r1, w1 in zip(*gauss(24), strict=True):
        for r2, w2 in zip(*gauss(24, 0.0, r1), strict=True):
            for first, second in ((0, 1), (1, 0)):
                for canvas, p in fill((MASK, MASK), [first], model.table((MASK, MASK), 1 - r1)):
                    for x, q in fill(canvas, [second], model.table(canvas, 1 - r2)):
                        law[x] = law.get(x, 0.0) + w1 * w2 * p * q
    check_law(model, law, 2, sampler="first_hitting")
    fine = process_law(model, 2, 1000)
    assert sum(abs(law[x] - fine[x]) for x in law) < 0.02


def test_first_hitting_starts_anew_in_every_block():
    model, law = TableModel(uses_time=True), {}
    for (r1, w1), (r2, w2) in itertools.product(zip(*gauss(24), strict=True), repeat=2):
        for canvas, p in fill((MASK, MASK), [0], model.table((MASK, MASK), 1 - (r1 + 1) / 2)):
            for x, q in fill(canvas, [1], model.table(canvas, 1 - r2 / 2)):
                law[x] = law.get(x, 0.0) + w1 * w2 * p * q
    check_law(model, law, 2, num=20_000, sampler="first_hitting", block_length=1)


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("uses_time", [False, True])
def test_rules_follow_their_law_on_a_budget_of_steps_and_in_blocks(order, uses_time):
    model, options = TableModel(uses_time=uses_time), {"sampler": "confidence", "order": order}
    whole = (0, 1, 2)
    check_law(model, rule_law(model, 3, [(whole, 1)] * 3, order), 3, **options)
    check_law(model, rule_law(model, 3, [(whole, 2), (whole, 1)], order), 3, num_steps=2, **options)
    blocks = [((0, 1), 2), ((2,), 1)]
    check_law(model, rule_law(model, 3, blocks, order), 3, num_steps=2, block_length=2, **options)


@pytest.mark.parametrize(("num_steps", "block_length"), [(1, None), (5, None), (9, None), (6, 3)])
@pytest.mark.parametrize("schedule", ["cosine", "linear", {"name": "clipped", "low": 0.1}, {"name": "polynomial"}])
def test_a_mask_schedule_says_how_many_tokens_a_step_commits(schedule, num_steps, block_length):
    model, sizes = make_model(), [7, 4]
    prompts = [[8, BOS] + [MASK] * size for size in sizes]
    options = {"num_steps": num_steps, "block_length": block_length, "mask_schedule": schedule}
    output = model.generate(prompts, sampler="confidence", return_history=True, **options)
    share = {
        "cosine": lambda t: math.sin(math.pi * t / 2),
        "linear": lambda t: t,
        "clipped": lambda t: 0.1 + 0.9 * t,
        "polynomial": lambda t: t**2,
    }[schedule if isinstance(schedule, str) else schedule["name"]]
    for history, size in zip(output.history.tolist(), sizes, strict=True):
        expected, first = [], 0
        blocks = [min(block_length or size, size - start) for start in range(0, size, block_length or size)]
        for left in blocks:
            steps = -(-num_steps // len(blocks)) if block_length else num_steps
            for step in range(steps):
                t, s = (steps - step) / steps, (steps - step - 1) / steps
                num = left if step == steps - 1 else math.floor(left * (1 - share(s) / share(t)) + 1e-6)
                expected += [first] * num
                left, first = left - num, first + 1
                if left == 0:
                    break
        assert sorted(step for step in history if step >= 0) == expected


def test_sampling_filters_apply_to_the_tokens():
    model = TableModel()
    law = process_law(model, 2, 2)
    assert len([p for p in law.values() if p > 0]) == 9
    output = model.generate(torch.full((500, 1), BOS), seed=1, do_sample=True, top_k=1, max_new_tokens=2, num_steps=1)
    best = [WORDS[i] for i in model.table((MASK, MASK)).argmax(-1)]
    assert output.sequences[:, 1:].unique(dim=0).tolist() == [best]
    greedy = model.generate(torch.full((500, 1), BOS), seed=1, max_new_tokens=2, num_steps=1)
    assert torch.equal(greedy.sequences, output.sequences)


def test_many_steps_cost_no_more_than_one_call_a_token():
    model = TableModel()
    output = model.generate(torch.tensor([[BOS]] * 3), seed=0, do_sample=True, max_new_tokens=4, num_steps=5000)
    assert (output.nfe <= 4).all()
    # The rows are called together, each at its own next step in which something is written.
    assert model.calls == output.nfe.max()
    timed = TableModel(uses_time=True)
    output = timed.generate(torch.tensor([[BOS]]), seed=0, max_new_tokens=4, num_steps=50, return_history=True)
    assert timed.calls == int(output.nfe) == int(output.history.max()) + 1


@pytest.mark.parametrize("schedule", ["log_linear", "cosine"])
@pytest.mark.parametrize(("num_steps", "block_length"), [(3, None), (40, None), (40, 4), (7, 2)])
def test_idle_steps_are_passed_without_a_trace(num_steps, block_length, schedule):
    model = make_model()
    options = {"num_steps": num_steps, "block_length": block_length, "noise_schedule": schedule, "do_sample": True}
    jumping, watched = (
        model.generate(
            batch_of(PROMPTS), seed=5, max_new_tokens=12, return_history=True, logits_processor=processor, **options
        )
        for processor in (None, lambda ids, scores, cur_step: scores)
    )
    assert torch.equal(jumping.sequences, watched.sequences)
    assert torch.equal(jumping.history, watched.history)
    assert torch.equal(jumping.nfe, watched.nfe)
    assert jumping.finish_reason == watched.finish_reason


OPTIONS = {
    "ancestral": {"num_steps": 5},
    "one step a position": {},
    "first_hitting": {"sampler": "first_hitting"},
    "remdm": {"sampler": "remdm", "num_steps": 9, "eta": 0.3},
    "remdm, conf": {"sampler": "remdm", "remasking": "conf", "eta": 1.0},
    "blocks": {"block_length": 3, "num_steps": 8},
    "confidence": {"sampler": "confidence", "order": "entropy", "num_steps": 4},
    "confidence, threshold": {"sampler": "confidence", "confidence_threshold": 0.3, "block_length": 4},
    "confidence, bound": {"sampler": "confidence", "order": "random", "entropy_bound": 2.0},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backbone", ["rotary", "dit"])
def test_a_row_decodes_alike_in_any_batch_and_the_prompt_stays(backbone, name):
    model = make_model(backbone=backbone)
    # Without max_new_tokens every row has a canvas of its own length.
    for limit in ({"max_new_tokens": 9}, {"max_length": 14}):
        options = {"do_sample": True, "return_history": True, **OPTIONS[name], **limit}
        seeds = [3, 1, 4, 1]
        together = model.generate(batch_of(PROMPTS), seed=seeds, **options)
        width = batch_of(PROMPTS).shape[1]
        torch.testing.assert_close(together.sequences[:, :width], batch_of(PROMPTS))
        written = together.sequences[:, width:]
        assert MASK not in written
        assert set(written.unique().tolist()) <= {PAD, EOS, *range(FIRST_WORD, 20)}
        right = model.generate(batch_of(PROMPTS, side="right"), seed=seeds, **options)
        torch.testing.assert_close(together.sequences, right.sequences)
        with as_on_an_accelerator():
            rounded = model.generate(batch_of(PROMPTS), seed=seeds, **options)
        for field in ("sequences", "history", "nfe"):
            torch.testing.assert_close(rounded[field], together[field])
        for row, prompt in enumerate(PROMPTS):
            alone = model.generate(batch_of([prompt]), seed=[seeds[row]], **options)
            length = alone.sequences.shape[1] - len(prompt) - 1
            assert alone.sequences[0, len(prompt) + 1 :].tolist() == written[row, :length].tolist()
            assert (written[row, length:] == PAD).all()
            assert alone.history[0, len(prompt) + 1 :].tolist() == together.history[row, width:][:length].tolist()
            assert alone.nfe[0] == together.nfe[row]
            assert alone.finish_reason[0] == together.finish_reason[row]
            assert (alone.finish_reason[0] == "stop") == (EOS in alone.sequences[0, len(prompt) + 1 :])


@pytest.mark.parametrize("name", OPTIONS)
def test_blanks_are_filled_in_place(name):
    model = make_model()
    rows = [[8, MASK, 10, MASK], [MASK, MASK, 11], [12, MASK]]
    ids = batch_of(rows, end=())
    output = model.generate(ids, seed=[1, 2, 3], do_sample=True, return_history=True, **OPTIONS[name])
    assert output.sequences.shape == ids.shape
    assert (output.sequences[ids != MASK] == ids[ids != MASK]).all()
    assert MASK not in output.sequences
    assert torch.equal(output.history >= 0, ids == MASK)
    alone = model.generate(torch.tensor([rows[2]]), seed=[3], do_sample=True, **OPTIONS[name])
    assert alone.sequences[0].tolist() == output.sequences[2, 2:].tolist()


@pytest.mark.parametrize("name", ["ancestral", "remdm", "blocks", "confidence, threshold"])
def test_the_log_replays_the_decode(name):
    model, log, drafts = make_model(), [], []

    class Streamer:
        takes_edits = True
        put = end = staticmethod(lambda *value: None)

        def put_draft(self, value, edits=None):
            drafts.append(value.clone())
            log.append(edits)

    options = {"seed": 4, "do_sample": True, "return_history": True, "max_new_tokens": 9, **OPTIONS[name]}
    output = model.generate(batch_of(PROMPTS), streamer=Streamer(), **options)
    rows = [[*prompt, BOS] + [MASK] * 9 for prompt in PROMPTS]
    assert log.pop(0) is None
    assert [row[-9:] for row in rows] == drafts.pop(0).tolist()
    for of_step, draft in zip(log, drafts, strict=True):
        for row, _, kind, position, token in of_step.tolist():
            before = rows[row][position]
            assert EDIT_KINDS[kind] == ("unmask" if before == MASK else "remask")
            assert (token == MASK) == (EDIT_KINDS[kind] == "remask")
            rows[row][position] = token
        assert [row[-9:] for row in rows] == draft.tolist()
    assert sorted(torch.cat(log).tolist()) == sorted(output.edits.tolist())
    assert (name == "remdm") == bool((output.edits[:, 2] == EDIT_KINDS.index("remask")).any())
    # The last edit of a position is what the history says of it.
    last = {(row, position): (step, token) for row, step, _, position, token in output.edits.tolist()}
    for row, prompt in enumerate(PROMPTS):
        start = batch_of(PROMPTS).shape[1]
        for at, step in enumerate(output.history[row, start:].tolist()):
            if step >= 0:
                assert last[row, len(prompt) + 1 + at] == (step, int(output.sequences[row, start + at]))


@pytest.mark.parametrize("name", ["ancestral", "confidence, threshold"])
def test_a_criterion_ends_rows_as_they_stand(name):
    def is_half_written(ids, scores):
        return (ids == MASK).sum(dim=-1) <= 5

    options = {"seed": 4, "max_new_tokens": 9, "suppress_tokens": [EOS], **OPTIONS[name]}
    output = make_model().generate(batch_of(PROMPTS), stopping_criteria=[is_half_written], **options)
    assert output.finish_reason == ["stop"] * 4
    masks = (output.sequences == MASK).sum(dim=-1)
    assert (masks <= 5).all()
    assert (masks > 0).any()


def test_nothing_is_written_after_a_block_with_the_end():
    class Ends(TableModel):
        def table(self, canvas, alpha=None):
            return np.array([[0.98, 0.01, 0.01]] * len(canvas))

    model = Ends()
    model.config.eos_token_id = WORDS[0]
    options = {"max_new_tokens": 6, "seed": 0, "return_history": True}
    for sampler in ("ancestral", "remdm"):
        output = model.generate(torch.tensor([[BOS]]), block_length=2, sampler=sampler, num_steps=6, **options)
        assert output.sequences[0, 1:].tolist() == [WORDS[0]]
        assert output.finish_reason == ["stop"]
        assert output.nfe <= 2
        assert model.generate(torch.tensor([[BOS]]), sampler=sampler, **options).nfe > 2


def test_same_seed_same_tokens_and_bare_prompts_are_wrapped():
    model, options = make_model(), {"max_new_tokens": 6, "do_sample": True}
    first = model.generate(batch_of(PROMPTS[:2]), seed=5, **options).sequences
    torch.testing.assert_close(first, model.generate(batch_of(PROMPTS[:2]), seed=5, **options).sequences)
    assert not torch.equal(first, model.generate(batch_of(PROMPTS[:2]), seed=6, **options).sequences)
    bare = model.generate(torch.tensor([[8, 9, 10], [PAD, PAD, 11]]), seed=5, **options).sequences
    torch.testing.assert_close(bare, first)
    assert model.generate(seed=1, **options).sequences[0, 0] == BOS


def test_streamer_and_logits_processor_see_every_step_and_suppressed_ids_are_never_written():
    class Streamer:
        drafts, final = [], []

        def put(self, value):
            self.final.append(value.tolist())

        def put_draft(self, value):
            self.drafts.append(value.tolist()[0])

        def end(self):
            self.final.append("end")

    from transformers import LogitsProcessor, LogitsProcessorList

    class NoTens(LogitsProcessor):
        steps = []

        def __call__(self, input_ids, scores, cur_step):
            assert len(input_ids) == len(scores)
            assert (input_ids == MASK).any(dim=-1).all()
            self.steps.append(cur_step)
            scores[:, 10:] = -torch.inf
            return scores

    model, streamer, processor = make_model(), Streamer(), NoTens()
    output = model.generate(
        batch_of(PROMPTS[:1]),
        seed=0,
        streamer=streamer,
        logits_processor=LogitsProcessorList([processor]),
        suppress_tokens=[PAD, EOS, 8, 9],
        sampler="first_hitting",
        max_new_tokens=3,
    )
    assert output.sequences[0, -3:].tolist() == [7, 7, 7]
    assert [draft.count(MASK) for draft in streamer.drafts] == [2, 1, 0]
    assert streamer.final == [batch_of(PROMPTS[:1]).tolist(), [[7, 7, 7]], "end"]
    assert processor.steps == [0, 1, 2]
    torch.testing.assert_close(output.tokens_per_forward, torch.ones(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"temprature": 1.0}, "no option 'temprature': did you mean 'temperature'"),
        (
            {"sampler": "ancestry"},
            "sampler must be one of ancestral, first_hitting, remdm, confidence and is 'ancestry'",
        ),
        ({"noise_schedule": "linea"}, "noise_schedule 'linea' does not exist: did you mean 'linear'"),
        ({"sampler": "remdm", "remasking": "none"}, "remasking must be one of cap, rescale, conf and is 'none'"),
        ({"num_steps": 0}, "num_steps must be at least 1 and is 0"),
        ({"sampler": "confidence", "mask_schedule": "cosine"}, "mask_schedule spreads the positions over num_steps"),
        ({"sampler": "confidence", "num_steps": 2, "mask_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"block_length": -1}, "block_length must be at least 1 and is -1"),
        ({"sampler": "remdm", "eta": 1.5}, r"eta must be in \(0, 1\] and is 1.5"),
        (
            {"sampler": "first_hitting", "num_steps": 4},
            "The sampler 'first_hitting' has no option 'num_steps', which ancestral and remdm and confidence have",
        ),
        (
            {"entropy_bound": 0.5},
            "The sampler 'ancestral' has no option 'entropy_bound', which confidence has: unset it",
        ),
        ({"sampler": "confidence", "eta": 0.5}, "The sampler 'confidence' has no option 'eta', which remdm has"),
        ({"input_ids": torch.tensor([[8, BOS, 9, 10]])}, r"\[BOS\] \(id 4\) in its middle"),
        ({"max_new_tokens": 30}, "max_new_tokens is 30, but a prompt of 4 tokens leaves 20 of the model's 24"),
        ({"seed": [1, 2]}, "seed has 2 entries for 1 rows"),
        ({"seed": "abc"}, "seed must be an integer, or one for each row, and is 'abc'"),
        ({"sampler": ["remdm"]}, r"sampler must be one of .* and is \['remdm'\]"),
        ({"noise_schedule": 5}, "noise_schedule must be a string or a dictionary or None and is 5"),
        ({"sampler": "remdm", "eta": None}, "eta must be a finite number and is None"),
        ({"temperature": None, "do_sample": True}, "temperature must be a finite number and is None"),
        ({"temperature": "abc"}, "temperature must be a finite number and is 'abc'"),
        ({"temperature": float("nan")}, "temperature must be a finite number and is nan"),
        ({"num_steps": 2.5}, "num_steps must be an integer or None and is 2.5"),
        ({"num_steps": True}, "num_steps must be an integer or None and is True"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer or None and is 2.5"),
        ({"do_sample": "no"}, "do_sample must be true or false and is 'no'"),
        ({"suppress_tokens": [0.5]}, r"suppress_tokens must be a list of integers or None and is \[0.5\]"),
        ({"suppress_tokens": [-1]}, "suppress_tokens: id -1 is outside the model's vocabulary of 20"),
        ({"suppress_tokens": [20]}, "suppress_tokens: id 20 is outside the model's vocabulary of 20"),
        ({"input_ids": torch.tensor([[20, BOS]])}, "Token id 20 is outside the model's vocabulary of 20"),
    ],
)
def test_bad_calls_are_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**{"input_ids": batch_of(PROMPTS[:1]), **call})


SAVED = {
    **{"max_new_tokens": 7, "do_sample": False, "temperature": 1.0, "order": "entropy", "num_steps": None},
    **{"confidence_threshold": None, "entropy_bound": None, "block_length": 4, "noise_schedule": "cosine"},
    **{"remasking": "cap", "eta": 0.3, "pad_token_id": 0, "transformers_version": "5.24.0"},
}


@pytest.mark.parametrize(
    ("saved", "options"),
    [
        ({"sampler": "rule"}, {"sampler": "confidence", "order": "entropy", "block_length": 4}),
        ({"sampler": "remask"}, {"sampler": "remdm", "eta": 0.3, "noise_schedule": "cosine"}),
        ({"sampler": "first_hitting"}, {"sampler": "first_hitting", "block_length": 4}),
        ({}, {"sampler": "ancestral", "noise_schedule": "cosine"}),
    ],
)
def test_saved_options_of_every_sampler_load(saved, options, tmp_path):
    """A file from before samplers had options of their own holds those of all; names that changed are translated."""
    (tmp_path / "generation_config.json").write_text(json.dumps({**SAVED, **saved}))
    config = MDLMGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in options} == options
    assert hasattr(config, "eta") == (options["sampler"] == "remdm")
    with pytest.raises(ValueError, match="no option 'ordr': did you mean 'order'"):
        MDLMGenerationConfig.from_dict({"ordr": "random"})
    # Another sampler in a call leaves the options of the saved one behind.
    assert config.updated(sampler="confidence", entropy_bound=0.5).entropy_bound == 0.5
    assert not hasattr(config.updated(sampler="confidence"), "noise_schedule")


def _assigned(config, _):
    config.sampler, config.eta = "remdm", 0.2
    return config


def _updated(config, _):
    assert config.update(eta=0.2, other=1, sampler="remdm") == {"other": 1}
    return config


def _loaded(config, folder):
    config.save_pretrained(folder)
    return MDLMGenerationConfig.from_pretrained(folder, sampler="remdm", eta=0.2)


@pytest.mark.parametrize("change", [_assigned, _updated, _loaded])
def test_another_sampler_brings_its_options_and_takes_those_of_the_saved_one(change, tmp_path):
    config = change(MDLMGenerationConfig(sampler="confidence", order="entropy", max_new_tokens=3), tmp_path)
    wanted = MDLMGenerationConfig(sampler="remdm", eta=0.2, max_new_tokens=3)
    assert config.to_dict() == wanted.to_dict()
    model = make_model()
    model.generation_config = config
    output = model.generate(seed=1)
    torch.testing.assert_close(output.sequences, model.generate(seed=1, generation_config=wanted).sequences)


def test_an_option_that_was_set_for_no_sampler_of_the_config_is_refused_by_generate():
    model = make_model()
    model.generation_config.eta = 0.1
    with pytest.raises(ValueError, match="The sampler 'ancestral' has no option 'eta', which remdm has"):
        model.generate(seed=1)
    model.generation_config.sampler = "remdm"
    assert model.generate(seed=1, max_new_tokens=2).nfe
    assert model.generation_config.eta == 0.1


def test_one_number_of_any_kind_is_a_seed_and_a_prompt_of_no_tokens_is_empty():
    model, options = make_model(), {"do_sample": True, "max_new_tokens": 4, "return_dict_in_generate": False}
    expected = model.generate(batch_of([[], []]), seed=3, **options)
    for seed in (np.int64(3), torch.tensor(3)):
        torch.testing.assert_close(model.generate(torch.zeros(2, 0), seed=seed, **options), expected)


@pytest.mark.parametrize("backbone", ["rotary", "dit"])
def test_model_and_options_survive_saving(backbone, tmp_path):
    model = make_model(backbone=backbone)
    model.generation_config = MDLMGenerationConfig(sampler="remdm", eta=0.1, num_steps=6, max_new_tokens=7)
    model.save_pretrained(tmp_path)
    loaded = MDLMForMaskedDiffusion.from_pretrained(tmp_path)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert loaded.config.conditioning == ("adaln" if backbone == "dit" else "none")
    torch.testing.assert_close(loaded.generate(seed=3).sequences, model.generate(seed=3).sequences)
    assert MDLMConfig.from_pretrained(tmp_path).suppressed_ids == [1, 2, 4, 5, 6]

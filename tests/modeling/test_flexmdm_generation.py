"""Samplers of flexible masked diffusion against the enumerated law of their own discretisation."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare, poisson

from tests.host_reads import as_on_an_accelerator
from tests.modeling.naive_flexmdm import (
    BOS,
    MASK,
    PAD,
    WORDS,
    ExactTables,
    RandomTables,
    TableModel,
    gauss,
    make_model,
    random_law,
)
from xlm_hf.modeling.flexmdm import FlexMDMConfig
from xlm_hf.modules.edits import EDIT_KINDS

QUADRATIC = {"name": "polynomial", "power": 2}
MIRRORED = {"name": "polynomial", "power": 2, "mirrored": True}


def absent_shares(model, step, num_steps, options):
    """The shares of the tokens that are absent before and after a step."""
    shares = []
    for k in (step, step + 1):
        t = torch.tensor(max(0.0, 1 - k / num_steps), dtype=torch.float64)
        closed = k >= options.get("insertion_steps", math.inf)
        shares.append(0.0 if closed else float(model.insertion_schedule.mask_probability(t)))
    return shares


def turn_probabilities(model, step, num_steps, high, low):
    """For a mask that comes in a step, by the shares before and after it: the forward passes at which it turns."""

    def mask_probability(schedule, t):
        return schedule.mask_probability(torch.as_tensor(t, dtype=torch.float64))

    nodes, weights = gauss(100)
    came_at = model.insertion_schedule.inverse(torch.from_numpy(1 - low - (high - low) * nodes))
    before = 0.0
    result = {}
    for forward in range(step + 1, num_steps + 1):
        end = max(0.0, 1 - (forward + 1) / num_steps)
        # A mask of a time still to come is one.
        stays = mask_probability(model.unmasking_schedule, end) / mask_probability(model.unmasking_schedule, came_at)
        stays = stays.clamp(max=1)
        by_then = 1 - float((torch.from_numpy(weights) * stays).sum()) if forward < num_steps else 1.0
        result[forward] = by_then - before
        before = by_then
    return result


def comings(expected, comes, counts, capacity, free, do_sample=True):
    """The law of how many masks come into each gap, given its expected count."""
    law: Counter = Counter()
    num_gaps = len(expected)

    def add(numbers, p):
        kept, left = [], free
        for number in numbers:
            kept.append(min(number, left))
            left -= kept[-1]
        law[tuple(kept)] += p

    if counts == "independent":
        rates = np.asarray(expected) * comes
        total = rates.sum()
        for num in range(capacity + 2):
            p = poisson.pmf(num, total) if num <= capacity else poisson.sf(capacity, total)
            for gaps in itertools.product(range(num_gaps), repeat=num):
                q = p * math.prod(rates[gap] / total for gap in gaps)
                if q > 0:
                    add([gaps.count(gap) for gap in range(num_gaps)], q)
        return law
    ends = np.cumsum(expected)
    offsets = sorted({0.0, 1.0, *(float(math.ceil(end) - end) for end in ends)}) if do_sample else [0.5, 0.5]
    for low, high in itertools.pairwise(offsets):
        middle, p = (low + high) / 2, high - low if do_sample else 1.0
        missing = np.diff(np.floor(ends + middle), prepend=0.0).astype(int)
        slots = [gap for gap, number in enumerate(missing) for _ in range(number)][:capacity]
        for fired in itertools.product((False, True), repeat=len(slots)):
            q = p * math.prod(comes if fire else 1 - comes for fire in fired)
            come = [slot for slot, fire in zip(slots, fired, strict=True) if fire]
            if q > 0:
                add([come.count(gap) for gap in range(num_gaps)], q)
    return law


def step_law(model, state, step, num_steps, options, capacity):
    """All states after a step, and their probabilities; an entry of a state is a word or (MASK, when it turns)."""
    there = tuple(MASK if isinstance(entry, tuple) else entry for entry in state)
    expected, words = model.tables.tables(there, 1 - step / num_steps)
    masks = [i for i, entry in enumerate(state) if isinstance(entry, tuple)]
    due = [i for i in masks if state[i][1] == step or step == num_steps]
    chosen = due
    if options.get("sampler") == "confidence":
        chosen = sorted(masks, key=lambda i: (-max(words[i]), i))[: len(due)]
    stay = iter([state[i] for i in masks if i not in due])
    entries = [next(stay) if i in masks and i not in chosen else entry for i, entry in enumerate(state)]
    absent = absent_shares(model, step, num_steps, options)
    comes = 1 - absent[1] / absent[0] if absent[0] > 0 else 0.0
    law, counts = Counter(), options.get("counts", "independent")
    inserted = (
        comings(expected, comes, counts, capacity, capacity - len(state))
        if comes and sum(expected)
        else {(0,) * len(expected): 1.0}
    )
    turns = turn_probabilities(model, step, num_steps, *absent) if comes else {}
    for drawn in itertools.product(range(len(WORDS)), repeat=len(chosen)):
        filled, p = list(entries), 1.0
        for i, word in zip(chosen, drawn, strict=True):
            filled[i], p = WORDS[word], p * words[i, word]
        for numbers, q in inserted.items():
            for times in itertools.product(turns.items(), repeat=sum(numbers)):
                new, given = [], iter(times)
                for gap, number in enumerate(numbers):
                    new += [filled[gap - 1]] if gap else []
                    new += [(MASK, next(given)[0]) for _ in range(number)]
                law[tuple(new)] += p * q * math.prod(r for _, r in times)
    return law


def exact_law(model, num_steps, options, capacity):
    """The law of the finished text of the discretised process, by enumerating every path."""
    law: Counter = Counter({(): 1.0})
    for step in range(num_steps + 1):
        new: Counter = Counter()
        for state, p in law.items():
            for after, q in step_law(model, state, step, num_steps, options, capacity).items():
                new[after] += p * q
        law = new
    return law


def decoded(model, num, capacity, num_steps, seed=7, **options):
    output = model.generate(
        torch.full((num, 1), BOS), seed=seed, do_sample=True, max_new_tokens=capacity, num_steps=num_steps, **options
    )
    return Counter(tuple(token for token in row if token != PAD) for row in output.sequences[:, 1:].tolist()), output


def p_value(found, law):
    """Of a chi-square test, cells with few expected draws in one."""
    num = sum(found.values())
    common = [text for text, p in law.items() if p * num >= 8]
    observed = [found[text] for text in common] + [num - sum(found[text] for text in common)]
    expected = [law[text] * num for text in common] + [num * (1 - sum(law[text] for text in common))]
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    return chisquare(observed, expected, sum_check=False).pvalue


CASES = {
    "labelled times": {},
    "labelled times, rounded counts": {"counts": "rounded"},
    "by confidence": {"sampler": "confidence"},
    "by confidence, rounded counts": {"sampler": "confidence", "counts": "rounded"},
    "length first": {"insertion_steps": 1},
    "length first, by confidence": {"sampler": "confidence", "counts": "rounded", "insertion_steps": 2},
}
SCHEDULES = {"insertion_schedule": QUADRATIC, "unmasking_schedule": MIRRORED}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedules", [{}, SCHEDULES], ids=["linear", "other schedules"])
def test_samples_follow_the_enumerated_law_of_three_steps(case, schedules):
    """Random tables in place of the network; a capacity of 2, which is often reached, so the cap is exact too."""
    model = TableModel(RandomTables(), **schedules)
    law = exact_law(model, 3, CASES[case], 2)
    assert sum(law.values()) == pytest.approx(1.0)
    found, output = decoded(model, 20_000, 2, 3, **CASES[case])
    assert set(found) <= set(law)
    assert p_value(found, law) > 1e-4
    assert output.nfe.max() == (3 if "insertion_steps" in CASES[case] else 4)
    assert "length" in output.finish_reason
    assert "stop" in output.finish_reason


@pytest.mark.parametrize("options", [{}, {"insertion_steps": 1}], ids=str)
def test_masks_turn_at_the_times_of_the_data(options):
    """In rows of one token: the law of the step that writes it, given the one in which its mask came."""
    model = TableModel(RandomTables(), **SCHEDULES)
    _, output = decoded(model, 20_000, 1, 3, return_history=True, **options)
    came = output.edits[output.edits[:, 2] == EDIT_KINDS.index("insert")]
    found = Counter(zip(came[:, 1].tolist(), output.history[came[:, 0], 1].tolist(), strict=True))
    for step in {step for step, _ in found}:
        law = turn_probabilities(model, step, 3, *absent_shares(model, step, 3, options))
        law = {forward: p for forward, p in law.items() if p > 1e-12}
        written = Counter({forward: num for (first, forward), num in found.items() if first == step})
        assert set(written) <= set(law)
        assert len(law) == 1 or p_value(written, law) > 1e-4


def test_the_order_does_not_change_how_many_masks_turn():
    model, steps = TableModel(RandomTables()), []
    for sampler in ("tau_leaping", "confidence"):
        _, output = decoded(model, 500, 6, 6, return_history=True, insertion_steps=1, sampler=sampler)
        steps.append(output.history.sort(dim=-1).values)
    assert steps[0].equal(steps[1])


def hazard_times_step(model):
    """A known mistake: the hazard times the step in place of the probability that a missing token comes."""
    insertions = model._insertions

    def wrong(call, state, rows, exists, outputs, comes, step):
        num_steps = state.num_steps[rows].double()
        now = 1 - step / num_steps
        hazard = model.insertion_schedule.hazard(now.clamp(min=1e-6)) / num_steps
        return insertions(call, state, rows, exists, outputs, torch.where(comes > 0, hazard, 0.0), step)

    model._insertions = wrong


def a_row_that_overflows_gets_nothing(model):
    """A known mistake: a row whose insertions exceed its capacity loses all of them."""
    insertions = model._insertions

    def wrong(call, state, rows, exists, outputs, comes, step):
        slots, inserted = insertions(call, state, rows, exists, outputs, comes, step)
        fits = inserted.sum(dim=-1) <= (state.capacity - state.lengths)[rows]
        return slots, inserted & fits[:, None]

    model._insertions = wrong


@pytest.mark.parametrize("mistake", [hazard_times_step, a_row_that_overflows_gets_nothing])
def test_known_mistakes_are_found(mistake):
    model = TableModel(RandomTables(), **SCHEDULES)
    law = exact_law(model, 3, {}, 2)
    mistake(model)
    found, _ = decoded(model, 20_000, 2, 3)
    assert p_value(found, law) < 1e-6


@pytest.mark.parametrize("counts", ["independent", "rounded"])
def test_what_is_missing_comes_or_not_before_the_capacity_cuts_it_off(counts):
    """Of 12 missing tokens each comes in the first of four steps with probability 1/4; at most 4 are written."""
    model = TableModel(RandomTables(), gap_head="distribution", max_count=12)
    model.count_probabilities = lambda gaps: torch.nn.functional.one_hot(torch.full(gaps.shape, 12), 13).double()
    forward = model.forward

    def expecting_all(*args, **inputs):
        output = forward(*args, **inputs)
        output.expected_counts = torch.full_like(output.expected_counts, 12.0)
        return output

    model.forward = expecting_all
    call = {"max_new_tokens": 4, "num_steps": 4, "counts": counts, "do_sample": True, "return_history": True}
    edits = model.generate(torch.full((4000, 1), BOS), seed=2, **call).edits
    first = edits[(edits[:, 1] == 0) & (edits[:, 2] == EDIT_KINDS.index("insert"))]
    came = np.bincount(first[:, 0].bincount(minlength=4000).numpy(), minlength=5)
    law = binom.pmf(np.arange(12), 12, 0.25)
    assert chisquare(came, 4000 * np.append(law[:4], 1 - law[:4].sum())).pvalue > 1e-4


def test_the_count_head_says_how_many_are_missing():
    """Each gap misses 0 to 2 tokens by the head's probabilities, and each of them comes or not."""
    model = TableModel(RandomTables(), gap_head="distribution", max_count=2)
    model.count_probabilities = lambda expected: torch.stack(
        (1 - 0.3 - 0.2 + 0 * expected, 0.3 + 0 * expected, 0.2 + 0 * expected), -1
    )
    found, _ = decoded(model, 20_000, 8, 1)
    lengths = Counter()
    for text, num in found.items():
        lengths[len(text)] += num
    # One step: all that is missing comes.
    assert p_value(Counter({(n,): lengths[n] for n in lengths}), {(0,): 0.5, (1,): 0.3, (2,): 0.2}) > 1e-4
    # Without sampling as many as are most probable.
    model.count_probabilities = lambda expected: torch.tensor([0.3, 0.2, 0.5]).expand(len(expected), 3)
    output = model.generate(torch.full((5, 1), BOS), max_new_tokens=8, num_steps=4, insertion_steps=1)
    assert (output.sequences[:, 1:] != PAD).sum(dim=-1).tolist() == [2] * 5


def test_more_steps_come_closer_to_the_data():
    """Exact conditionals in place of the network: the total variation to the data falls; rounded counts are closer."""
    law, distance = random_law(), {}
    model = TableModel(ExactTables(law))
    for counts, num_steps in (("independent", 2), ("independent", 16), ("rounded", 2), ("rounded", 16)):
        found, _ = decoded(model, 4000, 6, num_steps, counts=counts)
        texts = set(found) | set(law)
        distance[counts, num_steps] = sum(abs(found[text] / 4000 - law.get(text, 0.0)) for text in texts) / 2
    assert distance["independent", 16] < 0.5 * distance["independent", 2]
    assert distance["rounded", 16] < 0.5 * distance["rounded", 2]
    assert distance["rounded", 2] < distance["independent", 2]


PROMPTS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17], []]
INFILLS = [[MASK, 9, 10, MASK, MASK, 11], [8, MASK], [MASK], [9, 10, MASK, 12, 13, MASK, 14]]


def batch_of(prompts, side="left"):
    width = max(map(len, prompts))
    return torch.tensor(
        [[PAD] * (width - len(r)) + r if side == "left" else r + [PAD] * (width - len(r)) for r in prompts]
    )


def texts_of(output):
    return [[token for token in row if token != PAD] for row in output.sequences.tolist()]


@pytest.mark.parametrize("options", [*CASES.values(), {"gap_head": "distribution"}, {"conditioning": "token"}], ids=str)
@pytest.mark.parametrize("prompts", [[[*prompt, BOS] for prompt in PROMPTS], INFILLS], ids=["prompts", "infilling"])
def test_a_row_decodes_alone_as_in_any_batch(options, prompts):
    """Padded on either side, with steps of its own, and as on an accelerator; what was given stays."""
    options = dict(options)
    own = {name: options.pop(name) for name in ("gap_head", "conditioning") if name in options}
    model, seeds = make_model(**own), [5, 1, 4, 2]
    options = {"do_sample": True, "max_new_tokens": 7, **options}
    outputs = model.generate(batch_of(prompts), seed=torch.tensor(seeds), **options)
    together = texts_of(outputs)
    assert texts_of(model.generate(batch_of(prompts, "right"), seed=torch.tensor(seeds), **options)) == together
    for prompt, seed, expected, nfe in zip(prompts, seeds, together, outputs.nfe, strict=True):
        output = model.generate(torch.tensor([prompt]), seed=torch.tensor([seed]), **options)
        assert output.nfe == nfe
        assert texts_of(output) == [expected]
        rest = iter(expected)
        assert all(token in rest for token in prompt if token != MASK)
        assert MASK not in expected
        assert len(expected) <= len([token for token in prompt if token != MASK]) + 7 + (
            prompt[0] != BOS and prompt[-1] != BOS
        )
    given = sum(token != MASK for prompt in prompts for token in prompt)
    assert sum(map(len, together)) > given + 3
    with as_on_an_accelerator():
        assert texts_of(model.generate(batch_of(prompts), seed=torch.tensor(seeds), **options)) == together


def test_nothing_is_written_into_closed_gaps():
    """In infilling tokens come only where a run of masks was, any number of them."""
    model, given = make_model(), [9, 10, MASK, 12, 13, MASK, MASK, 14]
    outputs = model.generate(torch.tensor([given] * 40), seed=0, do_sample=True, max_new_tokens=12, num_steps=8)
    lengths = set()
    for row in texts_of(outputs):
        assert row[:3] == [BOS, 9, 10]
        assert row[-1] == 14
        at = [i for i in range(3, len(row) - 1) if row[i : i + 2] == [12, 13]]
        assert at
        lengths.add(len(row))
    assert len(lengths) > 3


@pytest.mark.parametrize("prompts", [[[*prompt, BOS] for prompt in PROMPTS], INFILLS], ids=["prompts", "infilling"])
def test_the_log_replays_the_decode(prompts):
    model = make_model()
    output = model.generate(batch_of(prompts), seed=0, do_sample=True, max_new_tokens=7, return_history=True)
    rows = [prompt if BOS in prompt else [BOS, *prompt] for prompt in [list(prompt) for prompt in prompts]]
    kinds = set()
    for row, _, kind, position, token in output.edits.tolist():
        kinds.add(EDIT_KINDS[kind])
        if EDIT_KINDS[kind] == "insert":
            rows[row].insert(position, token)
        elif EDIT_KINDS[kind] == "delete":
            assert rows[row].pop(position) == token == MASK
        else:
            assert rows[row][position] == MASK
            rows[row][position] = token
    assert rows == texts_of(output)
    assert kinds == {"insert", "unmask"} | ({"delete"} if prompts is INFILLS else set())
    written = [sum(step >= 0 for step in row) for row in output.history.tolist()]
    assert written == [round(float(t * n)) for t, n in zip(output.tokens_per_forward, output.nfe, strict=True)]


def test_what_cannot_be_is_refused_in_one_sentence():
    model = make_model()
    with pytest.raises(ValueError, match=r"A prompt holds \[BOS\] \(id 4\) in its middle"):
        model.generate(torch.tensor([[8, BOS, 9]]))
    with pytest.raises(ValueError, match="counts must be one of independent, rounded and is 'poisson'"):
        model.generate(counts="poisson")
    with pytest.raises(ValueError, match="The sampler 'tau_leaping' has no option 'order'"):
        model.generate(order="margin")
    with pytest.raises(ValueError, match="pass times"):
        model(torch.tensor([[BOS]]))
    with pytest.raises(ValueError, match="must be told the time"):
        FlexMDMConfig(conditioning="none")
    for name in ("insertion_schedule", "unmasking_schedule"):
        with pytest.raises(ValueError, match=r"'geometric' does not run from data .alpha 1. to pure noise .alpha 0."):
            FlexMDMConfig(**{name: "geometric"})

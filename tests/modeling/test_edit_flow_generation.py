"""Samplers of edit flows against the enumerated law of their own discretisation."""

import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

from tests.host_reads import as_on_an_accelerator
from tests.modeling import naive
from tests.modeling.naive import BOS, CLS, FIRST_WORD, PAD, check_histogram, small_model, written
from tests.modeling.naive_edit_flow import (
    VOCABULARY,
    ExactTables,
    RandomTables,
    TableModel,
    event_law,
    expected_edits,
    from_noise,
    random_law,
    tau_leap_law,
)
from xlm_hf.modeling.edit_flow import EditFlowForEditLM
from xlm_hf.modules.edits import EDIT_KINDS
from xlm_hf.modules.noise_schedules import make_schedule

THREE = (FIRST_WORD, FIRST_WORD + 1, FIRST_WORD + 2)
SQUARED = {"name": "polynomial", "power": 2}
SOURCE = THREE[:2]


def grid_of(schedule, num_steps):
    """The time that is left before the first step and after each."""
    made = make_schedule(schedule)
    return [float(made.mask_probability(torch.tensor(1 - k / num_steps).double())) for k in range(num_steps + 1)]


def decoded(model, num, capacity, num_steps, sampler, seed=7, **options):
    if model.config.coupling == "source":
        options["source_ids"] = torch.tensor([SOURCE] * num)
    output = model.generate(
        torch.tensor([[CLS, BOS]] * num),
        **{"seed": seed, "do_sample": True, "max_new_tokens": capacity, "num_steps": num_steps, "sampler": sampler},
        **options,
    )
    return written(output, 2), output


def tables_of(kinds):
    return RandomTables(kinds, THREE, scale=0.3)


def model_of(kinds, **options):
    coupling = "empty" if kinds == 1 else "source"
    return TableModel(tables_of(kinds), FIRST_WORD + 3, coupling=coupling, **options)


def start_of(kinds):
    return {(): 1.0} if kinds == 1 else {SOURCE: 1.0}


def law_of(sampler, kinds, schedule):
    """The enumerated law of 3 steps, with a capacity that is often reached."""
    grid = grid_of(schedule, 3)
    if sampler == "tau_leaping":
        return tau_leap_law(tables_of(kinds), start_of(kinds), grid, 2)
    return event_law(tables_of(kinds), list(random_law(2, words=THREE)), start_of(kinds), grid, 2)


@pytest.mark.parametrize("sampler", ["tau_leaping", "event"])
@pytest.mark.parametrize("kinds", [1, 3])
@pytest.mark.parametrize("schedule", ["linear", SQUARED], ids=["linear", "squared"])
def test_samples_follow_the_enumerated_law_of_three_steps(sampler, kinds, schedule):
    """Random rates in place of the network, by a head of each kind; a capacity of 2, so the cap is exact too."""
    law = law_of(sampler, kinds, schedule)
    for insertion_head in ("independent", "joint"):
        model = model_of(kinds, noise_schedule=schedule, insertion_head=insertion_head)
        texts, output = decoded(model, 20_000, 2, 3, sampler)
        check_histogram(texts, law)
        assert {"length", "stop"} == set(output.finish_reason)
        is_full = [len(text) == 2 for text in texts]
        assert [reason == "length" for reason in output.finish_reason] == is_full
        if sampler == "tau_leaping":
            assert output.nfe.max() == 3


def test_the_flow_begins_with_random_tokens():
    """Uniform and independent of each other, with the coupling "uniform"."""
    tables = tables_of(3)
    model = TableModel(tables, FIRST_WORD + 3, coupling="uniform", noise_length=2)
    start = dict.fromkeys(itertools.product(THREE, repeat=2), 1 / 9)
    texts, _ = decoded(model, 20_000, 2, 3, "tau_leaping")
    check_histogram(texts, tau_leap_law(tables, start, grid_of("linear", 3), 2))
    with pytest.raises(ValueError, match="begins with 2 tokens and has 1 positions for them: raise max_new_tokens"):
        decoded(model, 2, 1, 3, "tau_leaping")


def frozen_events(model):
    """A known mistake: the rates of a forward pass hold until an edit is made; the network never looks again."""
    model.noise_schedule = type("", (), {"mask_probability": staticmethod(lambda t: torch.zeros_like(t))})()


def no_time(model):
    """A known mistake: rates that do not know how much time is left."""
    rates = model.tables.rates

    def wrong(there, time_left):
        counts, slack_of = rates(there, time_left)
        return counts, lambda kind: slack_of(kind) + 2.0

    model.tables = type("", (), {"rates": staticmethod(wrong)})()


def a_row_that_overflows_gets_nothing(model):
    """A known mistake: a row whose insertions exceed its capacity loses all of them."""
    edits = model._edits

    def wrong(call, state, rows, *args):
        made, *others = edits(call, state, rows, *args)
        fits = made[..., 0].sum(dim=-1) <= (state.capacity - state.lengths)[rows]
        return made & fits[:, None, None], *others

    model._edits = wrong


MISTAKES = [
    (frozen_events, "event"),
    (no_time, "tau_leaping"),
    (no_time, "event"),
    (a_row_that_overflows_gets_nothing, "tau_leaping"),
]


@pytest.mark.parametrize(("mistake", "sampler"), MISTAKES)
def test_known_mistakes_are_found(mistake, sampler):
    model, law = model_of(1), law_of(sampler, 1, "linear")
    mistake(model)
    texts, _ = decoded(model, 20_000, 2, 3, sampler)
    with pytest.raises(AssertionError):
        check_histogram(texts, law)


def distance(texts, law):
    found = Counter(texts)
    return sum(abs(found[text] / len(texts) - law.get(text, 0.0)) for text in set(found) | set(law)) / 2


@pytest.mark.parametrize("kinds", [1, 3])
def test_more_steps_come_closer_to_the_data(kinds):
    """Exact expectations in place of the network. One window is the event sampler that never looks again."""
    law = random_law()
    options = {} if kinds == 1 else {"coupling": "uniform", "noise_length": 2}
    model = TableModel(ExactTables(law, *(() if kinds == 1 else (from_noise(2),))), VOCABULARY, **options)
    # Where times are an own number of each row, each must be looked up.
    found = {
        (sampler, num_steps): distance(decoded(model, num, 8, num_steps, sampler)[0], law)
        for sampler, num_steps, num in (("tau_leaping", 2, 3000), ("tau_leaping", 32, 3000), ("event", 1, 300))
    }
    assert found["tau_leaping", 32] < 0.4 * found["tau_leaping", 2]
    assert found["event", 1] > 0.25
    if kinds == 1:
        assert distance(decoded(model, 1000, 8, 24, "event")[0], law) < 0.3 * found["event", 1]


@pytest.mark.parametrize("num_steps", [2, 12])
def test_without_sampling_the_likeliest_edit_is_made_when_it_is_as_likely_as_not(num_steps):
    """However often the network looks again: the edits that were expected since the last one add up."""
    model, tables = model_of(3), tables_of(3)
    options = {"sampler": "event", "num_steps": num_steps, "max_new_tokens": 9}
    output = model.generate(torch.tensor([[CLS, BOS]]), source_ids=torch.tensor([SOURCE]), **options)
    text, time_left, window, grid, nfe, waited = SOURCE, 1.0, 0, grid_of("linear", num_steps), 0, 0.0
    while window < num_steps:
        nfe += 1
        then = grid[window + 1]
        edits = expected_edits(tables, text, time_left, then)
        kinds: Counter = Counter()
        for (kind, i, *_), n in edits.items():
            kinds[kind, i] += n
        total = sum(kinds.values())
        if waited + total <= math.log(2):
            time_left, window, waited = then, window + 1, waited + total
            continue
        time_left -= (time_left - then) * max(math.log(2) - waited, 0.0) / total
        waited = 0.0
        (kind, i), _ = max(kinds.items(), key=lambda item: item[1])
        words = {e[2]: n for e, n in edits.items() if e[:2] == (kind, i) and len(e) > 2}
        word = [max(words, key=words.__getitem__)] if words else []
        text = (*text[:i], *word, *text[i + (kind != "insert") :])
    assert written(output, 2) == [text]
    assert output.nfe.tolist() == [nfe]
    assert nfe > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_ids": [[8, 9]], "source_mask": [[1, 1, 1]]}, r"a source_mask of the same shape; what came has"),
        ({"source_ids": [8]}, r"pass source_ids \(1, N\)"),
        ({}, r"pass source_ids \(1, N\), a text for each prompt"),
        ({"source_ids": [[8, BOS]]}, f"A source text holds the special token {BOS}, but no text does"),
    ],
)
def test_sources_that_cannot_be_edited_are_refused(options, message):
    inputs = {name: torch.tensor(value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        network("source").generate(batch_of([[8]]), **inputs)


def test_a_flow_from_nothing_takes_neither_sources_nor_their_mask():
    with pytest.raises(ValueError, match="begins with 'empty' and takes no source_ids"):
        network().generate(batch_of([[8]]), source_mask=torch.ones(1, 2))


def test_the_mask_of_a_source_says_which_of_its_tokens_there_are():
    model, padded = network("source"), torch.tensor([[8, 9, 10, 11]])
    call = {"seed": [3], "max_new_tokens": 8, "do_sample": True}
    masked = model.generate(batch_of([[12]]), source_ids=padded, source_mask=torch.tensor([[0, 1, 1, 0]]), **call)
    alone = model.generate(batch_of([[12]]), source_ids=padded[:, 1:3], **call)
    assert masked.sequences.tolist() == alone.sequences.tolist()


PROMPTS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17], []]
SOURCES = [[8, 9], [10, 11, 12, 13], [], [14, 15, 16]]
batch_of = partial(naive.batch_of, start=(CLS,))


def network(coupling="empty", **options):
    """A tiny network in which everything matters, with rates at which enough happens."""
    model = small_model(EditFlowForEditLM, 20, 40, coupling=coupling, noise_length=4, **options)
    for name, parameter in model.named_parameters():
        if "modulation" in name or "time_token" in name:
            parameter.data.normal_(std=0.3)
    model.rate_head.down_proj.bias.data[0] += 2.0
    return model


def inputs_of(model, number=None, side="left"):
    rows = range(4) if number is None else [number]
    inputs = {"input_ids": batch_of([PROMPTS[i] for i in rows], side)}
    if model.config.coupling == "source":
        # Padded on either side too.
        inputs["source_ids"] = naive.stack([SOURCES[i] for i in rows], PAD, side)
    return inputs


def texts_of(output):
    return [[token for token in row if token != PAD] for row in output.sequences.tolist()]


OPTIONS = {
    "tau_leaping": {},
    "event": {"sampler": "event"},
    "guided": {"guidance_scale": 2.0},
    "filtered": {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "num_steps": 5},
    "greedy": {"sampler": "event", "do_sample": False, "num_steps": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("coupling", ["empty", "uniform", "source"])
def test_a_row_decodes_alone_as_in_any_batch(options, coupling):
    """Padded on either side, with steps of its own, and as on an accelerator; prompts stay."""
    joint = {"insertion_head": "joint"} if coupling == "uniform" or "sampler" in options else {}
    model, seeds = network(coupling, **joint), torch.tensor([5, 1, 4, 2])
    options = {"do_sample": True, "max_new_tokens": 7, **options}
    output = model.generate(**inputs_of(model), seed=seeds, **options)
    together = texts_of(output)
    assert texts_of(model.generate(**inputs_of(model, side="right"), seed=seeds, **options)) == together
    for number, expected in enumerate(together):
        alone = model.generate(**inputs_of(model, number), seed=seeds[number : number + 1], **options)
        assert texts_of(alone) == [expected]
        assert alone.nfe[0] == output.nfe[number]
        head = [CLS, *PROMPTS[number], BOS]
        assert expected[: len(head)] == head
        assert len(expected) <= len(head) + 7
    assert sum(map(len, together)) > sum(map(len, PROMPTS)) + 2 * 4 + 3
    with as_on_an_accelerator():
        assert texts_of(model.generate(**inputs_of(model), seed=seeds, **options)) == together


@pytest.mark.parametrize("coupling", ["empty", "uniform", "source"])
@pytest.mark.parametrize("sampler", ["tau_leaping", "event"])
def test_the_log_replays_the_decode(coupling, sampler):
    model = network(coupling=coupling)
    options = {"do_sample": True, "max_new_tokens": 7, "sampler": sampler, "seed": 0, "return_history": True}
    drafts = []

    class Streamer:
        takes_edits = True
        put = end = staticmethod(lambda *value: None)
        put_draft = staticmethod(lambda value, edits=None: drafts.append(value.clone()))

    output = model.generate(**inputs_of(model), streamer=Streamer(), **options)
    # The first draft is what the flow begins with.
    rows = [
        [CLS, *prompt, BOS, *(token for token in draft if token != PAD)]
        for prompt, draft in zip(PROMPTS, drafts[0].tolist(), strict=True)
    ]
    kinds = set()
    for row, _, kind, position, token in output.edits.tolist():
        kinds.add(EDIT_KINDS[kind])
        if EDIT_KINDS[kind] == "insert":
            rows[row].insert(position, token)
        elif EDIT_KINDS[kind] == "delete":
            assert rows[row].pop(position) == token
        else:
            assert rows[row][position] != token
            rows[row][position] = token
    assert rows == texts_of(output)
    assert kinds == ({"insert"} if coupling == "empty" else {"insert", "delete", "substitute"})


def test_guidance_is_that_of_rates_and_logits():
    """Against two forward passes: the rates of a step, and the tokens' distribution in every slot."""
    model, scale = network(coupling="source"), 1.7
    prompts, texts = batch_of(PROMPTS[:1]), torch.tensor([[8, 9, 10]])
    ids, free = (torch.cat((x, texts), dim=1) for x in (prompts, torch.tensor([[CLS, BOS]])))
    time_left = torch.ones(1)
    given, other = (model(x, attention_mask=torch.ones_like(x), time_left=time_left) for x in (ids, free))
    found = {}

    def stop(call, state, rows, logits, edits, of_slots, step, now, then):
        found.update(edits=edits, insertions=logits[0][:], substitutions=logits[1][:])
        raise StopIteration

    model._edits = stop
    with pytest.raises(StopIteration):
        model.generate(prompts, source_ids=texts, guidance_scale=scale, num_steps=4, max_new_tokens=6)
    now, then = torch.ones(1, 1), torch.full((1, 1), 0.75)
    expected = [output.rates.between(now, then)[0, -4:] for output in (given, other)]
    torch.testing.assert_close(
        found["edits"].float(), expected[0] ** scale * expected[1] ** (1 - scale), rtol=1e-4, atol=1e-6
    )
    for name, field in (("insertions", "logits"), ("substitutions", "substitution_logits")):
        of_given, of_other = (getattr(output, field)[0, -4:, FIRST_WORD:] for output in (given, other))
        guided = scale * of_given + (1 - scale) * of_other
        torch.testing.assert_close(found[name][:, FIRST_WORD:], guided, rtol=1e-4, atol=1e-4)


def test_weights_of_an_insertion_language_model_fit_and_score_the_same_pairs():
    from xlm_hf.modeling.ilm import ILMForInsertionLM

    old = small_model(ILMForInsertionLM, 20, 40)
    model = network(insertion_head="joint")
    of_old = {name: x for name, x in old.state_dict().items() if name.split(".")[0] in ("model", "lm_head")}
    assert all(model.state_dict()[name].shape == x.shape for name, x in of_old.items())
    missing = set(model.state_dict()) - set(of_old)
    assert {name.split(".")[0] for name in missing if "time_token" not in name} == {"rate_head"}
    model.load_state_dict(of_old, strict=False)
    # At first the time is not told: its feature is a map that begins as zero.
    for parameter in model.model.time_token.projection.parameters():
        nn.init.zeros_(parameter)
    ids = batch_of(PROMPTS[:1])
    torch.testing.assert_close(model(ids, time_left=torch.rand(1)).logits, old(ids).logits)


def test_what_cannot_be_is_refused_in_one_sentence():
    model = network()
    with pytest.raises(ValueError, match="This model begins with 'empty' and takes no source_ids"):
        model.generate(source_ids=torch.tensor([[8]]))
    with pytest.raises(ValueError, match="This model edits given texts: pass source_ids"):
        network(coupling="source").generate()
    with pytest.raises(ValueError, match="pass time_left"):
        model(torch.tensor([[BOS]]))
    with pytest.raises(ValueError, match="must be told the time"):
        network(conditioning="none")
    with pytest.raises(ValueError, match=r"does not run from data .alpha 1. to pure noise"):
        network(noise_schedule="geometric")

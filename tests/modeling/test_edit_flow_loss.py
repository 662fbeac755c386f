"""The bound of edit flows against enumerated likelihoods, and the loss against its slow twin."""

import math

import numpy as np
import pytest
import torch

from tests.modeling.naive import UNK, SpecialIds, make_examples, small_model
from tests.modeling.naive_edit_flow import (
    VOCABULARY,
    WORDS,
    ExactTables,
    RandomTables,
    TableModel,
    applied,
    batch_of_states,
    exact_bound,
    from_noise,
    from_nothing,
    gauss,
    looped_loss,
    random_law,
)
from xlm_hf.modeling.edit_flow import EditFlowCollator, EditFlowForEditLM, EditFlowLoss
from xlm_hf.modeling.edit_flow.collator_edit_flow import columns_of
from xlm_hf.modeling.ilm import ILMCollator
from xlm_hf.objectives.alignment import aligned
from xlm_hf.testing import (
    FamilyCase,
    check_batch_composition,
    check_batch_entries,
    check_full_rows,
    check_packing,
    check_ways_to_compute,
)

A, B = WORDS


def shipped_bound(model, text, columns=from_nothing, has_changes=False, num=24):
    """The mean of the reported nats over all states of a text and the time left, v^4."""
    total = 0.0
    for v, weight in zip(*gauss(num), strict=True):
        batch, probabilities = batch_of_states(text, v**4, columns, has_changes)
        output = EditFlowLoss()(model, batch)
        assert bool(output.sequence_given["source"].all()) == has_changes
        total += weight * 4 * v**3 * float(output.sequence_nats @ probabilities)
    return total


@pytest.mark.parametrize("insertion_head", ["independent", "joint"])
def test_the_bound_of_insertions_is_the_likelihood_at_the_exact_expectations(insertion_head):
    law = random_law(longest=3)
    model = TableModel(ExactTables(law), insertion_head=insertion_head)
    for text, p in law.items():
        assert shipped_bound(model, text) == pytest.approx(-math.log(p), abs=1e-8)


def test_a_network_that_is_not_told_the_time_is_found():
    """Constant counts have no finite bound, the more of it the closer one looks; constant rates lie above."""
    law, text = random_law(), (A,)
    nll = -math.log(law[text])
    model = TableModel(ExactTables(law, constant="counts"))
    bounds = [shipped_bound(model, text, num=num) for num in (4, 8, 16)]
    assert nll + 0.5 < bounds[0] < bounds[1] - 0.3 < bounds[2] - 0.6
    assert shipped_bound(TableModel(ExactTables(law, constant="rates")), text) > nll + 0.1


def source_of(text):
    """A wrong text for each: the first word is another, one is missing, and one is too many."""
    changed = [A + B - text[0], *text[1:-1]] if text else []
    return [*changed, A]


def from_source(text):
    """The columns of the coupling "source"."""
    source = source_of(text)
    moves, _ = aligned(*(np.array(x, dtype=np.int64) for x in (source, [len(source)], list(text), [len(text)])))
    yield *(tuple(x.tolist()) for x in columns_of(moves, np.array(source), np.array(text, dtype=np.int64))), 1.0


def flow_law(tables, start, longest):
    """The law of the flow at the end of the time: the Kolmogorov equation, by matrix exponentials."""
    texts = list(random_law(longest))
    number = {text: i for i, text in enumerate(texts)}
    p = np.array([start.get(text, 0.0) for text in texts])
    # Steps of even length in v, the time left being v^2.
    for v in np.linspace(1, 0, 201)[1:]:
        now, time_left = (v + 1 / 200) ** 2, (v + 1 / 400) ** 2
        moves = np.zeros((len(texts), len(texts)))
        for there, i in number.items():
            counts, slack_of = tables.rates(there, time_left)
            for (kind, at, *word), n in counts.items():
                rate = n / (slack_of(kind) + time_left)
                insert, change = ({at: word[0]} if kind == name else {} for name in ("insert", "substitute"))
                after = applied(there, insert, {at} if kind == "delete" else set(), change, 99)
                moves[i, i] -= rate
                if after in number:
                    moves[i, number[after]] += rate
        step = np.eye(len(texts)) + moves * (now - v**2) / 256
        for _ in range(8):
            step = step @ step
        p = p @ step
    return dict(zip(texts, p, strict=True))


@pytest.mark.parametrize("noise_length", [1, 2])
def test_with_deletions_the_flow_has_the_law_of_the_data_and_the_bound_lies_above_it(noise_length):
    law, columns = random_law(), from_noise(noise_length)
    tables = ExactTables(law, columns)
    model = TableModel(tables, coupling="uniform", noise_length=noise_length)
    start = {text: 2.0**-noise_length for text in random_law(noise_length) if len(text) == noise_length}
    found = flow_law(tables, start, 2 + noise_length)
    for text, p in found.items():
        assert p == pytest.approx(law.get(text, 0.0), abs=2e-4)
    gaps = [shipped_bound(model, text, columns, True, num=12) + math.log(p) for text, p in law.items()]
    assert min(gaps) > -1e-6
    assert sum(p * gap for p, gap in zip(law.values(), gaps, strict=True)) > 0.05


def examples_of(text, num, **columns):
    example = {"input_ids": list(text), **columns}
    return [{**example, "example_id": i, "epoch": 0, "position": i} for i in range(num)]


CASES = {
    "empty": ({}, from_nothing, {}),
    "emptier states": ({"drop_beta": 2.0}, from_nothing, {}),
    # The unknown token is among what a tokenizer may write.
    "uniform": ({"coupling": "uniform", "noise_length": 2}, from_noise(2, (UNK, *WORDS)), {}),
    "source": ({"coupling": "source"}, from_source, {"source_ids": source_of}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("insertion_head", ["independent", "joint"])
def test_what_the_collator_draws_is_an_unbiased_estimate_of_the_bound(case, insertion_head):
    """The mean over 10^5 draws of the shipped collator and loss, at random rates."""
    options, columns, of_text = CASES[case]
    kinds = 3 if "coupling" in options else 1
    tables, num, text = RandomTables(kinds), 100_000, (A, A, B)
    own = {name: value for name, value in options.items() if name != "drop_beta"}
    model = TableModel(tables, insertion_head=insertion_head, **own)
    collator = EditFlowCollator(SpecialIds(VOCABULARY), max_length=16, kind="lm", seed=3, **options)
    batch = collator(examples_of(text, num, **{name: make(text) for name, make in of_text.items()}))
    output = EditFlowLoss()(model, batch)
    nats, expected = output.sequence_nats, exact_bound(tables, text, columns)
    assert output.sequence_tokens.tolist() == [4] * num
    assert abs(nats.mean() - expected) < 4 * nats.std() / num**0.5
    assert nats.std() / num**0.5 < 0.02 * expected
    assert output.metrics["sequence_nelbo"] == (nats.sum(), num)
    if case == "emptier states":
        assert abs(output.loss_sum / num - expected) > 0.1 * expected
    else:
        torch.testing.assert_close(output.loss_sum, nats.sum())


@pytest.mark.parametrize("drop_beta", [1.0, 2.0])
def test_weights_of_insertions_are_those_of_an_insertion_language_model(drop_beta):
    """There the mean over the n missing tokens counts L + 1, here their sum counts (L + 1) / n."""
    examples = make_examples(200, 20, min_target=1)
    batches = [
        collator(SpecialIds(20), max_length=32, kind="seq2seq", drop_beta=drop_beta)(examples)
        for collator in (EditFlowCollator, ILMCollator)
    ]
    documents = batches[0]["slot_documents"][batches[0]["filled_slots"][batches[0]["target_rows"]]]
    n = torch.bincount(documents, minlength=len(examples))
    assert torch.equal(n, batches[1]["num_dropped"])
    missing = n > 0
    torch.testing.assert_close((batches[0]["weights"] * n)[missing], batches[1]["weights"][missing])
    # With nothing missing, the rates count as much as a stop does there.
    torch.testing.assert_close(
        (batches[0]["weights"] * batches[0]["time_left"] * batches[0]["sequence_tokens"])[~missing],
        batches[1]["weights"][~missing],
    )


def example_with_source(example, seed):
    rng = np.random.default_rng([seed, example["example_id"]])
    words = rng.integers(7, 13, size=rng.integers(0, 8)).tolist()
    return {**example, "source_ids": [*example["target_ids"][:2], *words, *example["target_ids"][4:]]}


@pytest.mark.parametrize("insertion_head", ["independent", "joint"])
@pytest.mark.parametrize("coupling", ["empty", "uniform", "source"])
@pytest.mark.parametrize("conditioning", ["token", "adaln"])
def test_loss_and_gradients_equal_those_of_the_slow_twin(insertion_head, coupling, conditioning):
    own = {"coupling": coupling, "noise_length": 3}
    options = {"insertion_head": insertion_head, "conditioning": conditioning, **own}
    model = small_model(EditFlowForEditLM, 13, 48, **options).double()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "time_token" in name:
            parameter.data.normal_(std=0.3)
    # So that no rate is beyond what numbers can hold.
    model.rate_head.down_proj.weight.data.mul_(0.1)
    examples = [example_with_source(example, 5) for example in make_examples(7, 13, seed=2)]
    # The same word inserted twice into one slot counts twice.
    examples.append({**examples[0], "target_ids": [9, 9, 9, 9], "source_ids": [9, 8], "position": 9})
    collator = EditFlowCollator(SpecialIds(13), max_length=48, kind="seq2seq", drop_beta=2.0, **own)
    batch = collator(examples)
    output = EditFlowLoss()(model, batch)
    expected = looped_loss(model, batch)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=1e-9)
    parameters = [p for name, p in model.named_parameters()]
    found = torch.autograd.grad(output.loss_sum, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for gradient, of_twin in zip(found, wanted, strict=True):
        assert (gradient is None) == (of_twin is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, of_twin, rtol=1e-8, atol=1e-8)
    # In half precision the model is rounded, the loss is not.
    assert EditFlowLoss()(model.bfloat16(), batch).loss_sum.dtype == torch.float32


@pytest.mark.parametrize("insertion_head", ["independent", "joint"])
def test_as_many_edits_as_remain_leave_no_deviance(insertion_head):
    batch, _ = batch_of_states((A, B), 0.5)
    output = EditFlowLoss()(TableModel(ExactTables({(A, B): 1.0}), insertion_head=insertion_head), batch)
    assert float(output.metrics["edit_deviance"][0]) == pytest.approx(0.0, abs=1e-9)
    # Which of the two comes first is open, where both are missing.
    assert float(output.metrics["edit_cross_entropy"][0]) == pytest.approx(2 * math.log(2))
    assert int(output.metrics["edit_cross_entropy"][1]) == int(output.metrics["edit_accuracy"][0]) == 4


@pytest.mark.parametrize("insertion_head", ["independent", "joint"])
def test_deletions_and_substitutions_pass_the_suite(insertion_head, tmp_path):
    """Which the family itself passes with insertions alone."""
    options = ["model.coupling=uniform", "model.noise_length=5", f"model.insertion_head={insertion_head}"]
    case = FamilyCase("edit_flow", *options)
    for check in (check_batch_composition, check_batch_entries, check_packing, check_full_rows, check_ways_to_compute):
        check(case, tmp_path)

"""Score entropy diffusion sampled: laws against enumeration by matrices, rows against batches, prompts untouched."""

import itertools

import pytest
import torch
from transformers import LogitsProcessorList

from tests.modeling.canvas_checks import check_rows
from tests.modeling.naive import BOS, MASK, PAD, SpecialIds, check_histogram
from tests.modeling.naive_sedd import WORDS, TableModel, chain_law, make_model, random_joint
from xlm_hf.modeling.sedd import SEDDCollator, SEDDGenerationConfig, SEDDLoss
from xlm_hf.modules.noise_schedules import noise_of_tokens


@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("sampler", ["analytic", "euler"])
@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_samples_follow_the_law_of_their_steps(kernel, sampler, is_scaled):
    model = TableModel(kernel, is_scaled=is_scaled)
    law = chain_law(model, 3, 3, is_exact=sampler == "analytic")
    options = {"seed": 11, "do_sample": True, "max_new_tokens": 3, "num_steps": 3, "sampler": sampler}
    output = model.generate(torch.full((8000, 1), BOS), **options)
    check_histogram(list(map(tuple, output.sequences[:, 1:].tolist())), law)
    # Raw scores of an untrained table unmask everything at once.
    assert output.nfe.max() == (1 if kernel == "absorb" and not is_scaled else 3)


OPTIONS = {
    "greedy": ({"do_sample": False}, {"top_k": 1}),
    "temperature": ({"temperature": 0.5}, {"temperature": 0.5}),
    "top-k": ({"top_k": 2}, {"top_k": 2}),
    "nucleus": ({"top_p": 0.7}, {"top_p": 0.7}),
    "a word less": ({"suppress_tokens": [WORDS[1]]}, {"left": (0, 2)}),
    "a word less, by a processor": ({"logits_processor": True}, {"left": (0, 2)}),
    "a word less, nucleus": ({"suppress_tokens": [WORDS[1]], "top_p": 0.7}, {"left": (0, 2), "top_p": 0.7}),
}


def without_a_word(ids, scores, cur_step=None):
    return scores.index_fill(1, torch.tensor(WORDS[1]), -torch.inf)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sampler", ["analytic", "euler"])
@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_options_act_on_the_prediction_and_the_law_of_the_step_is_drawn(kernel, sampler, name):
    model = TableModel(kernel)
    options, of_law = OPTIONS[name]
    options = {"do_sample": True, "max_new_tokens": 2, "num_steps": 3, "sampler": sampler, **options}
    if options.pop("logits_processor", False):
        options["logits_processor"] = LogitsProcessorList([without_a_word])
    law = chain_law(model, 2, 3, is_exact=sampler == "analytic", **of_law)
    output = model.generate(torch.full((6000, 1), BOS), seed=7, **options)
    check_histogram(list(map(tuple, output.sequences[:, 1:].tolist())), law)


def test_more_steps_make_a_greedy_decode_better():
    # Two texts of one word twice, and one that is improbable.
    joint = torch.zeros(9, dtype=torch.float64)
    joint[[4, 8, 0]] = torch.tensor([0.45, 0.45, 0.1]).double()
    model = TableModel("uniform", joint)
    wrong = []
    for num_steps in (4, 16, 64):
        law = chain_law(model, 2, num_steps, top_k=1)
        wrong.append(1 - sum(law[word, word] for word in WORDS))
    assert wrong[0] > wrong[1] > wrong[2]
    assert wrong[2] < 0.01


def test_a_processor_that_changes_nothing_leaves_the_decode_as_it_is():
    for kernel in ("absorb", "uniform"):
        options = {"seed": 3, "do_sample": True, "max_new_tokens": 3, "num_steps": 3}
        prompts, model = torch.full((200, 1), BOS), TableModel(kernel)
        same = model.generate(prompts, logits_processor=LogitsProcessorList([lambda ids, x, **_: x]), **options)
        assert torch.equal(same.sequences, model.generate(prompts, **options).sequences)


def test_what_is_left_out_does_not_change_when_masks_go():
    """At the exact scores, whose sum does not depend on the words: then every step writes the same positions."""
    model = TableModel("absorb", random_joint(3, seed=1))
    options = {"seed": 5, "do_sample": True, "max_new_tokens": 3, "num_steps": 4, "return_history": True}
    prompts = torch.full((500, 1), BOS)
    histories = [
        model.generate(prompts, **{**options, **more}).history
        for more in (
            {},
            {"suppress_tokens": [WORDS[1]]},
            {"suppress_tokens": list(WORDS[:2])},
            {"logits_processor": LogitsProcessorList([without_a_word])},
        )
    ]
    assert len(histories[0].unique()) == 5
    assert all(torch.equal(history, histories[0]) for history in histories)


@pytest.mark.parametrize("sampler", ["analytic", "euler"])
@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_at_the_exact_scores_many_steps_write_the_data(kernel, sampler):
    joint = random_joint(2, seed=3)
    model = TableModel(kernel, joint)
    errors = []
    for num_steps in (8, 128):
        law = chain_law(model, 2, num_steps, is_exact=sampler == "analytic")
        errors.append(sum(abs(p - q) for p, q in zip(law.values(), joint.tolist(), strict=True)))
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("sampler", ["analytic", "euler"])
@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_a_row_decodes_alike_alone_and_in_any_batch_and_prompts_stay(kernel, sampler):
    check_rows(make_model(kernel=kernel, conv_kernel_size=3), num_steps=5, sampler=sampler, max_new_tokens=8)


@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_blanks_are_filled_in(kernel):
    model = make_model(kernel=kernel)
    ids = torch.tensor([[8, MASK, 10, MASK, MASK, MASK], [PAD, PAD, PAD, MASK, MASK, 11]])
    output = model.generate(ids, seed=[1, 2], do_sample=True, num_steps=4, return_history=True)
    assert torch.equal(output.sequences[ids != MASK], ids[ids != MASK])
    assert MASK not in output.sequences
    assert torch.equal(output.history >= 0, ids == MASK)
    own = model.generate(ids[1:, 3:], seed=[2], do_sample=True, num_steps=4)
    assert own.sequences[0].tolist() == output.sequences[1, 3:].tolist()


@pytest.mark.parametrize(
    ("kernel", "sampler"),
    [
        ("absorb", "analytic"),
        ("absorb", "euler"),
        ("absorb", "confidence"),
        ("uniform", "analytic"),
        ("uniform", "euler"),
    ],
)
def test_in_infilling_training_and_samplers_tell_the_network_the_same(kernel, sampler):
    """Given tokens have no noise: sigma is 0 there, and that of the time of the row at the blanks."""
    model, seen = make_model(kernel=kernel), []

    def note(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.append((ids, noise_of_tokens(kwargs["alpha"], model.config.noise_eps, kwargs.get("is_given"))))

    model.register_forward_pre_hook(note, with_kwargs=True)
    row = [8, MASK, 10, MASK]
    example = {"input_ids": row, "target_ids": [8, 9, 10, 11], "example_id": 3, "epoch": 0, "position": 0}
    batch = SEDDCollator(SpecialIds(20), max_length=16, kind="infill", kernel=kernel)([example])
    SEDDLoss()(model, batch)
    num_steps = {} if sampler == "confidence" else {"num_steps": 3}
    model.generate(torch.tensor([row]), sampler=sampler, seed=1, **num_steps)
    times = [-batch["alpha"].clamp(min=model.config.noise_eps).log()[0]]
    times += [-torch.tensor(max(alpha, model.config.noise_eps)).log() for alpha in alphas_of(sampler, kernel, seen)]
    assert len(times) == len(seen) > 1
    for (ids, sigma), time in zip(seen, times, strict=True):
        assert ids.shape == sigma.shape == (1, 4)
        assert sigma[0, [0, 2]].tolist() == [0.0, 0.0]
        torch.testing.assert_close(sigma[0, [1, 3]], time.expand(2))


def alphas_of(sampler, kernel, seen):
    """alpha of the steps of a sampler: even, or the share that is filled in; no step is made when no mask is left."""
    return [0.0, 0.5] if sampler == "confidence" else [0.0, 1 / 3, 2 / 3][: len(seen) - 1]


def test_masks_may_be_filled_by_confidence():
    model = TableModel("absorb")
    law = {}
    for first, second in itertools.product(range(3), repeat=2):
        # The more certain position first.
        start = model.logits(torch.tensor([[3, 3]]), torch.zeros(1).double()).softmax(dim=-1)[0]
        position = int(start.amax(dim=-1).argmax())
        canvas = (first, 3) if position == 0 else (3, first)
        then = model.logits(torch.tensor([canvas]), torch.full((1,), 0.5).double()).softmax(dim=-1)[0, 1 - position]
        whole = (first, second) if position == 0 else (second, first)
        law[tuple(WORDS[i] for i in whole)] = float(start[position, first] * then[second])
    options = {"seed": 5, "do_sample": True, "max_new_tokens": 2, "sampler": "confidence"}
    output = model.generate(torch.full((6000, 1), BOS), **options)
    check_histogram(list(map(tuple, output.sequences[:, 1:].tolist())), law)
    with pytest.raises(ValueError, match="'confidence' writes into masks, and the model has uniform noise"):
        make_model(kernel="uniform").generate(sampler="confidence")


def test_options_are_checked():
    with pytest.raises(ValueError, match="num_steps"):
        SEDDGenerationConfig(num_steps=0)
    with pytest.raises(ValueError, match="sampler must be one of analytic, euler, confidence"):
        SEDDGenerationConfig(sampler="ancestral")

"""Uniform diffusion sampled: laws against enumeration, rows against batches, prompts untouched."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from tests.modeling.canvas_checks import PROMPTS, SEEDS, check_blanks, check_rows
from tests.modeling.naive import BOS, EOS, MASK, PAD, batch_of, check_histogram
from tests.modeling.naive_udlm import (
    TableModel,
    as_dict,
    canvases,
    chain_law,
    make_model,
    posterior,
    random_joint,
    slow_sampler,
)
from xlm_hf.modeling.udlm import UDLMConfig, UDLMForUniformDiffusion, UDLMGenerationConfig
from xlm_hf.modeling.udlm.generation_udlm import DenoiserKernel
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.edits import EDIT_KINDS
from xlm_hf.modules.kernel_samplers import Move, PsiSampler, Resampling
from xlm_hf.modules.kernels import UniformKernel
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.modules.vocabulary_head import LogitsOnDemand


def check_law(model, law, length, num=6000, **options):
    """Whole decodes against an enumerated law (3^L,)."""
    options = {"seed": 11, "do_sample": True, "max_new_tokens": length, "return_history": True, **options}
    output = model.generate(torch.full((num, 1), BOS), **options)
    check_histogram(list(map(tuple, output.sequences[:, 1:].tolist())), as_dict(law, length))
    return output


# Three positions that like to have the same word: what a few steps make of them shows how they were made.
EQUAL_WORDS = torch.tensor([0.3 if len(set(z)) == 1 else 0.1 / 24 for z in canvases(3).tolist()], dtype=torch.float64)


def grid(num_steps):
    return [1 - i / num_steps for i in range(num_steps)] + [0]


@pytest.mark.parametrize("prediction_type", ["leave_one_out", "denoiser"])
@pytest.mark.parametrize(("num_steps", "schedule"), [(1, "log_linear"), (3, "log_linear"), (3, "cosine")])
def test_ancestral_samples_follow_the_law_of_their_steps(num_steps, schedule, prediction_type):
    model = TableModel(prediction_type=prediction_type, noise_schedule=schedule)

    def alpha(t):
        return 1 - (t if schedule == "log_linear" else torch.sin(torch.tensor(torch.pi / 2 * t)).double())

    law = chain_law(model, 3, grid(num_steps), alpha)
    output = check_law(model, law, 3, num_steps=num_steps)
    assert set(output.nfe.tolist()) == {num_steps}
    # The network is told the time of the model's own schedule.
    assert [float(a.unique()) for a in model.alphas] == pytest.approx([float(alpha(t)) for t in grid(num_steps)[:-1]])


@pytest.mark.parametrize(
    "options", [{"schedule": "cap", "eta": 0.3}, {"schedule": "rescale", "eta": 0.4}, {"schedule": "cap", "eta": 1.0}]
)
def test_psi_samples_follow_their_law(options):
    def share(t, s):
        largest = min(1.0, s / (1 - t)) if t < 1 else 1.0
        sigma = min(options["eta"], largest) if options["schedule"] == "cap" else options["eta"] * largest
        return min(1.0, sigma / s) if s > 0 else 0.0

    model = TableModel(EQUAL_WORDS)
    law = chain_law(model, 3, grid(3), share=share)
    assert (law - chain_law(model, 3, grid(3))).abs().sum() > 0.05
    check_law(model, law, 3, sampler="psi", num_steps=3, **options)


@pytest.mark.parametrize("is_denoiser", [False, True])
@pytest.mark.parametrize("kind", ["step", "to data and back", "anew", "greedy"])
def test_a_single_move_follows_its_law(kind, is_denoiser):
    """From one token at t to s, where a whole chain would hide what a step does wrong."""
    num, t, s = 30_000, 0.7, 0.4
    predicted = torch.tensor([[0.15, 0.6, 0.25]], dtype=torch.float64)
    kernel = (DenoiserKernel if is_denoiser else UniformKernel)(
        schedule=make_schedule("log_linear"), writable_ids=torch.arange(3)
    )
    scores = predicted.log()
    if is_denoiser:
        scores = scores + torch.tensor([[0.0, 0.0, math.log1p(3 * 0.3 / 0.7)]])
    every = torch.ones(num, dtype=torch.bool)
    flags = {"to data and back": {"to_data": every}, "greedy": {"is_greedy": every}}.get(kind, {})
    times = [torch.full((num,), x, dtype=torch.float64) for x in ((s, s) if kind == "anew" else (t, s))]
    if kind == "anew" and is_denoiser:
        scores = predicted.log() + torch.tensor([[0.0, 0.0, math.log1p(3 * 0.6 / 0.4)]])
    uniforms = uniform(3, torch.arange(7)[:, None], torch.arange(num))
    config = UDLMGenerationConfig(do_sample=True)
    move = (Resampling if kind == "anew" else Move)(kernel, config, torch.full((num,), 2), *times, uniforms, **flags)
    tokens, own = move(LogitsOnDemand.of(scores.float().expand(num, 3)))
    z = torch.tensor([[2]])
    law = {
        "step": lambda: posterior(predicted[None], z, 0.3, 0.6),
        "to data and back": lambda: 0.6 * posterior(predicted[None], z, 0.3, 1.0) + 0.4 / 3,
        "anew": lambda: 0.6 * predicted + 0.4 / 3,
        "greedy": lambda: torch.tensor([0.0, 1.0, 0.0]),
    }[kind]().flatten()
    if kind == "greedy":
        assert set(tokens.tolist()) == {1}
    else:
        check_histogram(tokens.tolist(), dict(enumerate(law.tolist())))
    torch.testing.assert_close(own, torch.full((num,), 0.25))


def test_the_times_and_shares_of_psi_are_those_of_their_formulas():
    n = torch.tensor([20, 40])
    loop = PsiSampler(schedule="loop", loop_time=0.2, eta=0.05)
    times = torch.stack([loop.times(torch.full_like(n, i), n) for i in range(21)])
    # 45 % of 20 steps are 9, 95 % are 19.
    expected = [1 - 0.8 * i / 9 for i in range(9)] + [0.2] * 11 + [0.0]
    assert times[:, 0].tolist() == pytest.approx(expected)
    assert times[18:, 1].tolist() == pytest.approx([0.2] * 3)
    # Too few steps for three phases are even; three are one of each.
    few = {1: [1, 0], 2: [1, 0.5, 0], 3: [1, 0.2, 0.2, 0]}
    for number, expected in few.items():
        made = [loop.times(torch.tensor([i]), torch.tensor([number])).item() for i in range(number + 1)]
        assert made == pytest.approx(expected)
    process = SimpleNamespace(kernel=UniformKernel(schedule=make_schedule("log_linear"), writable_ids=torch.arange(3)))
    t, s = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 0.6, 0.2, 0.2], [0.8, 0.4, 0.2, 0.0]))
    # sigma_max = min(1, s / (1 - t)), sigma / s.
    shares = PsiSampler(schedule="cap", eta=0.3).share_to_data(process, t, s)
    assert shares.tolist() == pytest.approx([0.3 / 0.8, 0.3 / 0.4, 0.25 / 0.2, 0.0])
    shares = PsiSampler(schedule="rescale", eta=0.3).share_to_data(process, t, s)
    assert shares.tolist() == pytest.approx([0.3 / 0.8, 0.3 / 0.4, 0.3 * 0.25 / 0.2, 0.0])
    assert loop.share_to_data(process, t, s).tolist() == pytest.approx([0.0, 0.0, 0.05 / 0.2, 0.0])


def test_tokens_that_are_given_are_told_as_clean_and_prompts_are_told_the_time():
    model, seen = make_model(), []
    forward = model.forward

    def record(*args, **kwargs):
        seen.append(kwargs["alpha"])
        return forward(*args, **kwargs)

    model.forward = record
    ids = torch.tensor([[8, MASK, 10, MASK], [PAD, 9, 11, BOS]])
    model.generate(ids, seed=[3, 1], num_steps=2, max_new_tokens=2)
    assert seen[0].tolist() == [[1, 0, 1, 0, 1, 1], [0] * 6]
    assert seen[1].tolist() == [[1, 0.5, 1, 0.5, 1, 1], [0.5] * 6]
    model.generate(ids[1:], seed=[1], num_steps=2, max_new_tokens=2)
    assert seen[3].tolist() == [0.5]


def test_psi_in_a_loop_stays_at_its_time():
    model, loop_time = TableModel(), 0.4
    # 45 % of 8 steps are 3, up to 95 % of them 7.
    times = [1.0, 0.8, 0.6, 0.4, 0.4, 0.4, 0.4, 0.4, 0.0]
    law = chain_law(model, 2, times, share=lambda t, s: 0.1 / s if t == s else 0.0)
    options = {"sampler": "psi", "schedule": "loop", "eta": 0.1, "loop_time": loop_time, "num_steps": 8}
    check_law(model, law, 2, **options)
    assert [1 - float(a.unique()) for a in model.alphas] == pytest.approx(times[:-1], abs=1e-6)


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("prediction_type", ["leave_one_out", "denoiser"])
def test_the_corrector_draws_positions_anew(order, prediction_type):
    model = TableModel(prediction_type=prediction_type)
    law = chain_law(model, 3, grid(3), corrected=2, order=order)
    assert (law - chain_law(model, 3, grid(3))).abs().sum() > 0.05
    output = check_law(model, law, 3, num_steps=3, corrector_steps=2, corrector_order=order)
    assert set(output.nfe.tolist()) == {3 + 2 * 2}


def test_the_corrector_leaves_the_law_of_noisy_data_alone():
    """One position at a time and at the exact conditionals: what the chain's errors were, it mends."""
    model = TableModel(random_joint(2, seed=4))
    noisy = [chain_law(model, 2, [1, 0.5, 0], corrected=n) for n in (0, 1, 4)]
    errors = [float((law - model.joint).abs().sum()) for law in noisy]
    assert errors[0] > errors[1] + 0.01
    # Once two positions have the law of noisy data, they keep it.
    assert errors[1] == pytest.approx(errors[2])


def test_the_greedy_tail_takes_the_most_probable_words():
    model = TableModel()
    law = chain_law(model, 3, grid(3), greedy=True)
    check_law(model, law, 3, num_steps=3, greedy_tail=True)


def test_at_the_exact_conditionals_many_steps_write_the_data():
    model = TableModel(random_joint(2, seed=3))
    errors = [(chain_law(model, 2, grid(n)) - model.joint).abs().sum() for n in (2, 8, 32, 128)]
    assert all(a > 2 * b for a, b in itertools.pairwise(errors))
    # psi steps of any strength keep the laws at single times, so they too end at the data.
    psi = [chain_law(model, 2, grid(n), share=lambda t, s: 0.5) for n in (8, 64, 512)]
    assert (psi[-1] - model.joint).abs().sum() < (psi[0] - model.joint).abs().sum() / 4


def test_filters_act_on_the_prediction_by_the_others():
    """With top_k=1 all of it is on one word: what a token is kept by, too."""
    model, sharp = TableModel(prediction_type="denoiser"), TableModel()
    table = sharp.table
    sharp.table = lambda z, alpha: torch.nn.functional.one_hot(table(z, alpha).argmax(dim=-1), 3).double()
    law = chain_law(sharp, 3, grid(3))
    check_law(model, law, 3, num_steps=3, top_k=1)
    check_law(model, law, 3, num_steps=3, do_sample=False)
    cool = TableModel()
    cool.table = lambda z, alpha: (table(z, alpha).log() / 0.5).softmax(dim=-1)
    check_law(model, chain_law(cool, 3, grid(3)), 3, num_steps=3, temperature=0.5)


@pytest.mark.parametrize("num_steps", [None, 5])
def test_it_writes_what_its_slow_twin_writes(num_steps):
    model, prompts = make_model(), torch.tensor([[8, BOS], [9, BOS]])
    ours = model.generate(prompts, max_new_tokens=9, seed=2, do_sample=True, num_steps=num_steps, eos_token_id=None)
    theirs = slow_sampler(model, prompts, 9, True, 2, num_steps=num_steps)
    ends = (theirs == EOS).cumsum(-1) - (theirs == EOS).long() > 0
    assert torch.equal(ours.sequences, theirs.masked_fill(ends, PAD)[:, : ours.sequences.shape[1]])


OPTIONS = {
    "ancestral": {"num_steps": 5},
    "one step a position": {},
    "corrected": {"num_steps": 4, "corrector_steps": 2, "corrector_positions": 2},
    "corrected by confidence": {"num_steps": 4, "corrector_steps": 1, "corrector_order": "confidence"},
    "greedy tail": {"num_steps": 4, "greedy_tail": True},
    "psi": {"sampler": "psi", "num_steps": 5, "eta": 0.3},
    "loop": {"sampler": "psi", "num_steps": 9, "schedule": "loop", "eta": 0.05},
    "filters": {"num_steps": 4, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_decodes_alike_alone_and_in_any_batch(name):
    model = make_model(conv_kernel_size=3, prediction_type="denoiser" if name == "filters" else "leave_one_out")
    for limit in ({"max_new_tokens": 8}, {"max_length": 14}):
        check_rows(model, **OPTIONS[name], **limit)


@pytest.mark.parametrize("name", OPTIONS)
def test_blanks_are_filled_in_and_the_rest_stays(name):
    check_blanks(make_model(), **OPTIONS[name])


def test_rows_that_are_filled_in_and_rows_that_go_on_may_share_a_batch():
    model, options = make_model(), {"num_steps": 4, "do_sample": True, "max_new_tokens": 6}
    ids = torch.tensor([[8, MASK, 10, MASK], [PAD, 9, 11, BOS]])
    output = model.generate(ids, seed=[3, 1], **options)
    alone = [model.generate(ids[i : i + 1], seed=[s], **options).sequences[0].tolist() for i, s in enumerate((3, 1))]
    assert output.sequences[0, :4].tolist() == alone[0][:4]
    written = output.sequences[1, 4:].tolist()
    assert [t for t in written if t != PAD] == [t for t in alone[1][3:] if t != PAD]


@pytest.mark.parametrize("name", ["ancestral", "corrected", "psi"])
def test_the_log_of_edits_replays_the_decode(name):
    model = make_model()
    output = model.generate(
        batch_of(PROMPTS), seed=SEEDS, do_sample=True, return_history=True, max_new_tokens=8, **OPTIONS[name]
    )
    for row, prompt in enumerate(PROMPTS):
        ids, steps = [*prompt, BOS, *[MASK] * 8], [-1] * (len(prompt) + 9)
        for _, step, kind, position, token in output.edits[output.edits[:, 0] == row].tolist():
            assert EDIT_KINDS[kind] == ("unmask" if ids[position] == MASK else "substitute")
            ids[position], steps[position] = token, step
        end = ids.index(EOS) + 1 if EOS in ids else len(ids)
        result = output.sequences[row, batch_of(PROMPTS).shape[1] - len(prompt) - 1 :].tolist()
        assert ids[:end] == result[:end]
        history = output.history[row, batch_of(PROMPTS).shape[1] - len(prompt) - 1 :].tolist()
        assert steps[:end] == history[:end]


def test_a_criterion_ends_rows_as_they_stand():
    model, calls = make_model(), []

    def stop(ids, scores):
        calls.append(ids)
        return torch.tensor([True, False, False, False])

    output = model.generate(batch_of(PROMPTS), seed=SEEDS, stopping_criteria=[stop], max_new_tokens=8, num_steps=5)
    assert output.nfe.tolist() == [1, 5, 5, 5]
    assert output.finish_reason[0] == "stop"
    assert len(calls) == 5


def test_options_are_those_of_the_sampler_and_survive_saving(tmp_path):
    model = make_model()
    model.generation_config = UDLMGenerationConfig(sampler="psi", eta=0.2, schedule="rescale", num_steps=6)
    model.save_pretrained(tmp_path)
    loaded = UDLMForUniformDiffusion.from_pretrained(tmp_path)
    assert loaded.generation_config.make_sampler() == model.generation_config.make_sampler()
    assert "loop_time" in json.loads((tmp_path / "generation_config.json").read_text())
    with pytest.raises(ValueError, match="The sampler 'ancestral' has no option 'eta', which psi has"):
        UDLMGenerationConfig(eta=0.5)
    for options, message in (
        ({"corrector_order": "rando"}, "corrector_order must be one of random, confidence"),
        ({"corrector_steps": -1}, "corrector_steps must be at least 0 and is -1"),
        ({"sampler": "psi", "eta": 1.5}, "eta"),
        ({"sampler": "psi", "schedule": "capped"}, "schedule must be one of cap, rescale, loop"),
        ({"block_length": 4}, "block_length"),
    ):
        with pytest.raises(ValueError, match=message):
            UDLMGenerationConfig(**options)
    with pytest.raises(ValueError, match="noise_schedule 'cosin' does not exist: did you mean 'cosine'"):
        UDLMConfig(noise_schedule="cosin")


def test_canvases_are_numbered_as_the_laws_are():
    assert canvases(2).tolist()[5] == [1, 2]

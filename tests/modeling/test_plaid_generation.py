"""Gaussian diffusion sampled: laws against a chain on a grid, marginals, rows against batches."""

import pytest
import torch
from scipy.stats import kstest, norm
from transformers import LogitsProcessorList

from tests.modeling.naive import BOS, MASK, PAD, batch_of, check_histogram
from tests.modeling.naive_plaid import TWO_VECTORS, chain_law, exact_model, make_model, slow_sampler
from xlm_hf.modeling.plaid import PlaidConfig, PlaidForGaussianDiffusion
from xlm_hf.modeling.plaid.generation_plaid import GaussianProcess
from xlm_hf.modeling.plaid.noise_plaid import ancestral_step, signal_and_scale, tempered

PROMPTS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17], []]
SEEDS = [3, 1, 4, 9]


def test_a_step_keeps_the_law_of_noise_at_a_single_time():
    """Mean and variance by its coefficients: from a_t e + s_t eps it makes a_s e with noise of variance s_s^2."""
    gamma_t, gamma_s = torch.tensor([[6.0, 1.2, -2.0, 3.0]]).double(), torch.tensor([[5.9, 0.4, -3.0, -3.0]]).double()
    (a_t, s_t), (a_s, s_s) = signal_and_scale(gamma_t), signal_and_scale(gamma_s)
    torch.testing.assert_close(a_t**2 + s_t**2, torch.ones_like(a_t))
    torch.testing.assert_close(torch.log(s_t**2 / a_t**2), gamma_t)
    zero, one = torch.zeros(1, 4).double(), torch.ones(1, 4).double()
    of_clean = ancestral_step(a_t, one, gamma_t, gamma_s, zero)
    of_noise, fresh = (
        ancestral_step(s_t, zero, gamma_t, gamma_s, zero),
        ancestral_step(zero, zero, gamma_t, gamma_s, one),
    )
    torch.testing.assert_close(of_clean, a_s, rtol=1e-12, atol=0)
    torch.testing.assert_close(of_noise**2 + fresh**2, s_s**2, rtol=1e-12, atol=0)


def test_a_temperature_divides_the_predicted_noise():
    z, expected, gamma = torch.randn(3, 2, 5).double(), torch.randn(3, 2, 5).double(), torch.tensor(0.7).double()
    signal, scale = signal_and_scale(gamma)
    noise = (z - signal * expected) / scale
    torch.testing.assert_close(signal * tempered(z, expected, gamma, 0.8) + scale * noise / 0.8, z)
    assert torch.equal(tempered(z, expected, gamma, 1.0), expected)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_marginals_are_kept_at_any_number_of_steps(num_steps, monkeypatch):
    """Where the network is sure of the text, the vectors have the law of its noise after every step."""
    model = exact_model(torch.tensor([1e-300, 1.0], dtype=torch.float64), TWO_VECTORS)
    seen, advance = [], GaussianProcess.advance

    def record(self, rows, wanted, expected, gamma_t, gamma_s, temperature):
        seen.append((float(gamma_t[0] + 3) / 9, self.latents[:, 1, 0].clone()))
        advance(self, rows, wanted, expected, gamma_t, gamma_s, temperature)

    monkeypatch.setattr(GaussianProcess, "advance", record)
    output = model.generate(torch.full((4000, 1), BOS), seed=5, max_new_tokens=1, num_steps=num_steps)
    assert set(output.sequences[:, 1].tolist()) == {8}
    assert set(output.nfe.tolist()) == {num_steps + 1}
    assert [t for t, _ in seen] == pytest.approx([1 - i / num_steps for i in range(num_steps + 1)])
    for t, z in seen[1:]:
        signal, scale = signal_and_scale(torch.tensor(-3 + 9 * t).double())
        assert kstest(z.numpy(), norm(float(signal), float(scale)).cdf).pvalue > 1e-4
    assert kstest(seen[0][1].numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize(("num_steps", "ends"), [(1, (-1.0, 3.0)), (3, (-1.0, 3.0)), (3, (-3.0, 6.0))])
def test_samples_follow_the_law_of_their_steps(num_steps, ends):
    model = exact_model(torch.tensor([0.3, 0.7]).double(), TWO_VECTORS, gamma_min=ends[0], gamma_max=ends[1])
    law = chain_law(model, num_steps)
    if num_steps == 1:
        # One step from noise is far from the data, which a wrong number of steps would hide.
        assert abs(float(law[1]) - 0.7) > 0.01
    options = {"seed": 11, "do_sample": True, "max_new_tokens": 1, "num_steps": num_steps}
    output = model.generate(torch.full((8000, 1), BOS), **options)
    check_histogram(output.sequences[:, 1].tolist(), {7: float(law[0]), 8: float(law[1])})


def test_many_steps_write_the_data():
    model = exact_model(torch.tensor([0.3, 0.7]).double(), TWO_VECTORS)
    assert float(chain_law(model, 100, num_points=401)[1]) == pytest.approx(0.7, abs=3e-3)


@pytest.mark.parametrize("do_sample", [False, True])
def test_samples_equal_those_of_the_slow_twin(do_sample):
    model, prompts = make_model(noise_schedule="linear"), torch.tensor([[8, 9, BOS], [10, 11, BOS]])
    for options in ({}, {"num_steps": 3}, {"num_steps": 3, "score_temperature": 0.5}):
        expected = slow_sampler(model, prompts, 5, do_sample, 4, **options)
        for savings in (("gather",), ("gather", "head")):
            assert torch.equal(slow_sampler(model, prompts, 5, do_sample, 4, savings, **options), expected)
        output = model.generate(prompts, seed=4, max_new_tokens=5, do_sample=do_sample, **options)
        width = output.sequences.shape[1]
        assert torch.equal(output.sequences, until_end(expected)[:, :width])
        assert set(output.nfe.tolist()) == {1 + options.get("num_steps", 5)}


def test_blocks_of_logits_change_nothing(monkeypatch):
    model, prompts = make_model(), torch.tensor([[8, 9, BOS], [10, 11, BOS]])
    options = {"seed": 4, "max_new_tokens": 5, "do_sample": True, "num_steps": 3}
    whole = model.generate(prompts, **options).sequences
    monkeypatch.setattr("xlm_hf.modeling.plaid.generation_plaid._BLOCK_ROWS", 3)
    assert torch.equal(model.generate(prompts, **options).sequences, whole)


def test_until_the_last_step_the_most_probable_tokens_are_shown():
    model, prompts = make_model(), torch.tensor([[8, 9, BOS], [10, 11, BOS]])
    options = {"seed": 4, "max_new_tokens": 5, "num_steps": 3, "return_history": True}
    greedy = model.generate(prompts, **options).edits
    drawn = model.generate(prompts, do_sample=True, **options).edits
    assert torch.equal(greedy[greedy[:, 1] < 3], drawn[drawn[:, 1] < 3])
    assert len(drawn[drawn[:, 1] == 3])


def test_an_end_that_is_written_into_a_blank_ends_nothing():
    def end_alone(ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[1]) != 3, -torch.inf)

    ids = torch.tensor([[8, MASK, 10, MASK]])
    options = {"seed": 1, "num_steps": 2, "logits_processor": LogitsProcessorList([end_alone])}
    assert make_model().generate(ids, **options).sequences.tolist() == [[8, 3, 10, 3]]


def until_end(ids):
    """What follows `[EOS]` behind the prompt becomes padding."""
    behind = ((ids == 3) & (torch.arange(ids.shape[1]) >= 3)).long()
    return ids.masked_fill(behind.cumsum(dim=1) - behind > 0, PAD)


@pytest.mark.parametrize("schedule", ["linear", "learnt"])
def test_rows_decode_alike_alone_and_in_a_batch_and_the_log_replays_them(schedule):
    model = make_model(noise_schedule=schedule)
    batch = batch_of(PROMPTS)
    options = {"max_new_tokens": 6, "num_steps": 4, "do_sample": True, "return_history": True}
    output = model.generate(batch, batch != PAD, seed=SEEDS, **options)
    assert torch.equal(output.sequences[:, : batch.shape[1]], batch)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([[*prompt, BOS]]), seed=SEEDS[row : row + 1], **options)
        expected = [t for t in output.sequences[row].tolist() if t != PAD]
        assert [t for t in alone.sequences[0].tolist() if t != PAD] == expected
        canvas = [MASK] * 6
        for _, step, kind, position, token in alone.edits.tolist():
            assert kind == (3 if canvas[position - len(prompt) - 1] == MASK else 2)
            assert 0 <= step <= 4
            canvas[position - len(prompt) - 1] = token
        written = alone.sequences[0, len(prompt) + 1 :].tolist()
        assert canvas[: len(written)] == written


def test_blanks_are_filled_in_and_given_tokens_stay():
    model = make_model()
    ids = torch.tensor([[8, MASK, 10, MASK], [PAD, 9, 11, BOS]])
    output = model.generate(ids, ids != PAD, seed=[3, 1], max_new_tokens=2)
    assert output.sequences[0, [0, 2]].tolist() == [8, 10]
    assert MASK not in output.sequences
    # One step for each position of a row's own canvas, and one pass more.
    assert output.nfe.tolist() == [3, 3]
    assert output.sequences[1, :4].tolist() == [PAD, 9, 11, BOS]


def test_what_is_suppressed_is_neither_written_nor_expected():
    model = make_model()
    prompts = torch.tensor([[8, 9, BOS]] * 20)
    words = [i for i in range(20) if i not in (12, 13)]
    output = model.generate(prompts, seed=2, max_new_tokens=5, do_sample=True, suppress_tokens=words)
    assert set(output.sequences[:, 3:].flatten().tolist()) <= {12, 13}

    def processor(ids, scores, cur_step):
        assert ids.shape == (100, 8)
        return scores.index_fill(1, torch.tensor([12]), -torch.inf)

    output = model.generate(prompts, seed=2, max_new_tokens=5, suppress_tokens=words, logits_processor=processor)
    assert set(output.sequences[:, 3:].flatten().tolist()) == {13}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma_min": 6.0}, "less than gamma_max"),
        ({"conditioning": "none"}, "conditioning"),
        ({"noise_schedule": "cosine"}, "noise_schedule"),
        ({"embedding_size": 0}, "embedding_size"),
    ],
)
def test_configurations_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PlaidConfig(vocab_size=10, **options)


def test_a_call_without_times_is_refused():
    model = PlaidForGaussianDiffusion(
        PlaidConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="pass times"):
        model(torch.tensor([[8]]))


def test_options_of_the_sampler_are_checked():
    model = make_model()
    for options in ({"score_temperature": 0.0}, {"num_steps": 0}, {"score_temprature": 1.0}):
        with pytest.raises(ValueError, match=r"score_temperature|num_steps"):
            model.generate(torch.tensor([[BOS]]), max_new_tokens=2, **options)


def test_a_resized_vocabulary_has_vectors():
    model = make_model()
    before, size = model.vectors.weight.clone(), model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    assert model.table().shape == (size + 3, before.shape[1])
    assert torch.equal(model.vectors.weight[:size], before)
    assert model.vectors.weight[size:].abs().min() > 0
    model.resize_token_embeddings(size - 1)
    assert torch.equal(model.vectors.weight, before[:-1])
    assert model(torch.tensor([[1, 2]]), times=torch.tensor([0.5])).logits.shape == (1, 2, size - 1)

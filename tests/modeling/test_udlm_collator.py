from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare, kstest, norm

from tests.modeling.naive import BOS, EOS, MASK, PAD, UNK, SpecialIds, make_examples
from tests.modeling.naive_udlm import make_model, slow_collation
from xlm_hf.modeling.udlm import UDLMCollator, UDLMLoss
from xlm_hf.modeling.udlm.curriculum_udlm import gaussian_tokens, uniform_noise
from xlm_hf.objectives.corruption import exact_noise

V = 40
WRITABLE = [PAD, EOS, UNK, *range(7, V)]


def collator(kind="seq2seq", **kwargs):
    return UDLMCollator(SpecialIds(V), max_length=32, kind=kind, **kwargs)


def restored(batch):
    ids = batch["input_ids"].clone()
    ids.view(-1)[batch["logits_index"]] = batch["target_ids"]
    return ids


@pytest.mark.parametrize("canvas_length", [None, 10, 8])
def test_prompt_bos_and_a_canvas_with_noise(canvas_length):
    examples = make_examples(64, V)
    batch = collator(canvas_length=canvas_length)(examples)
    for row, example in enumerate(examples):
        canvas = [*example["target_ids"], EOS]
        if canvas_length is not None:
            canvas = (canvas + [PAD] * canvas_length)[:canvas_length]
        expected = [*example["prompt_ids"], BOS, *canvas]
        assert restored(batch)[row, batch["attention_mask"][row]].tolist() == expected
        prompt = batch["input_ids"][row, : len(expected) - len(canvas)].tolist()
        assert prompt == [*example["prompt_ids"], BOS]
        assert batch["canvas_lengths"][row] == len(canvas)
        assert batch["sequence_tokens"][row] == len(example["target_ids"]) + 1
    assert len(batch["target_ids"]) == batch["canvas_lengths"].sum()
    assert set(batch["input_ids"].view(-1)[batch["logits_index"]].tolist()) <= set(WRITABLE)
    assert batch["given_length"].tolist() == [canvas_length is None] * 64
    torch.testing.assert_close(1 - batch["alpha"], batch["noise"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("schedule", ["log_linear", "cosine"])
def test_noise_replaces_tokens_by_any_others_at_the_rate_of_their_document(schedule):
    num = 20_000
    examples = [{"input_ids": [9] * 3, "example_id": i, "epoch": 1, "position": i} for i in range(num)]
    batch = collator("lm", noise_schedule=schedule, noising="bernoulli")(examples)
    noisy = batch["input_ids"][:, 1:4]
    noise = batch["noise"].double()
    t = noise if schedule == "log_linear" else torch.asin(noise.clamp(max=1)) * 2 / torch.pi
    # t = v^2.
    counts = torch.histc(t.sqrt(), bins=10, min=0, max=1)
    assert (counts - num / 10).abs().max() <= 12
    slope = 1.0 if schedule == "log_linear" else torch.pi / 2 * torch.cos(torch.pi / 2 * t)
    middle = (t > 1e-4) & (t < 0.99)
    torch.testing.assert_close(batch["weights"].double()[middle], (slope * 2 * t.sqrt())[middle], rtol=2e-3, atol=1e-3)
    for low in (0.0, 0.25, 0.5, 0.75):
        chosen = (noise >= low) & (noise < low + 0.25)
        changed = (noisy[chosen] != 9).double()
        share, n = 1 - 1 / len(WRITABLE), int(chosen.sum()) * 3
        assert abs(changed.sum() - noise[chosen].sum() * 3 * share) < 4.5 * (n * 0.25) ** 0.5
        # Two tokens of a row are independent given its time.
        pairs = (changed[:, 0] * changed[:, 2]).sum()
        assert abs(pairs - (noise[chosen] * share).square().sum()) < 4.5 * (int(chosen.sum()) * 0.25) ** 0.5
    others = Counter(noisy[noisy != 9].tolist())
    assert set(others) == set(WRITABLE) - {9}
    assert chisquare(list(others.values())).pvalue > 1e-4


@pytest.mark.parametrize("options", [{}, {"noising": "bernoulli"}, {"noise_beta": 3.0}, {"curriculum": {}}])
def test_noise_depends_on_the_example_alone(options):
    examples = make_examples(32, V, min_target=6)
    whole = collator(**options)(examples)
    names = {"noise", "alpha", "gamma", "temperature", "weights", "loss_weights"} & whole.keys()
    starts = whole["canvas_lengths"].cumsum(0) - whole["canvas_lengths"]
    for row in (0, 7, 31):
        alone = collator(**options)([examples[row]])
        width = alone["input_ids"].shape[1]
        assert alone["input_ids"][0].tolist() == whole["input_ids"][row, :width].tolist()
        assert all(alone[name][0] == whole[name][row] for name in names)
        if "noise_keys" in whole:
            own = slice(int(starts[row]), int(starts[row] + whole["canvas_lengths"][row]))
            assert torch.equal(whole["noise_keys"][own], alone["noise_keys"])
    changed = [collator(**options)([{**e, "epoch": 1} for e in examples]), collator(**options, seed=1)(examples)]
    for other in changed:
        assert other["noise"].tolist() != whole["noise"].tolist()
        name = "noise_keys" if "noise_keys" in whole else "input_ids"
        assert other[name].tolist() != whole[name].tolist()


def test_exactly_k_tokens_meet_noise_at_a_time_of_its_law():
    """The joint law of k and t, times the weight, is that of independent noise at uniform times."""
    length, num = 4, 20_000
    bits = np.random.default_rng(0).integers(2**64, size=num * length, dtype=np.uint64)
    lengths, draws = np.full(num, length), (np.arange(num) + 0.5) / num
    t, weights, met = exact_noise(bits, lengths, draws)
    k = met.reshape(num, length).sum(axis=1)
    assert np.bincount(k).tolist() == [num / 5] * 5
    for size in range(5):
        chosen = k == size
        assert kstest(t[chosen], "beta", (max(size, 1), length - size + 1)).pvalue > 1e-4
        np.testing.assert_allclose(weights[chosen], (length + 1) * t[chosen] / size if size else 1.0)
        # The mean over uniform times of P(k) t^2.
        expected = np.polynomial.legendre.leggauss(20)
        u = (expected[0] + 1) / 2
        exact = (expected[1] / 2 * binom.pmf(size, length, u) * u**2).sum()
        assert (weights * t**2 * chosen).mean() == pytest.approx(exact, rel=0.1)
    subsets = Counter(map(tuple, met.reshape(num, length)[k == 2].tolist()))
    assert chisquare(list(subsets.values())).pvalue > 1e-4


def test_exact_noise_has_the_smaller_error():
    model, examples = make_model(V, 32), [{"input_ids": [9] * 8, "example_id": i, "epoch": 0} for i in range(500)]
    squares = []
    for noising in ("exact", "bernoulli"):
        batch = collator("lm", noising=noising)([{**e, "position": e["example_id"]} for e in examples])
        with torch.no_grad():
            squares.append(float(UDLMLoss()(model, batch).sequence_nats.var()))
    assert squares[0] < 0.7 * squares[1]


def test_noise_beta_shows_noisier_canvases_and_weighs_all_tokens_alike():
    examples = [{"input_ids": [9], "example_id": i, "epoch": 0, "position": i} for i in range(2000)]
    batch = collator("lm", noise_beta=3.0)(examples)
    assert kstest(batch["noise"].numpy(), "beta", (3, 1)).pvalue > 0.5
    assert set(batch["loss_weights"].tolist()) == {1.0}
    assert "weights" not in batch


def test_in_infilling_blanks_alone_get_noise():
    rows = [([9, MASK, 11, MASK, MASK], [9, 10, 11, 12, 13]), ([MASK, 15], [14, 15]), ([16, 17], [16, 17])]
    seen = Counter()
    for epoch in range(100):
        examples = [
            {"input_ids": a, "target_ids": b, "example_id": i, "epoch": epoch, "position": i}
            for i, (a, b) in enumerate(rows)
        ]
        batch = collator("infill")(examples)
        assert batch["canvas_lengths"].tolist() == batch["sequence_tokens"].tolist() == [3, 1, 0]
        assert [
            row[m].tolist() for row, m in zip(restored(batch), batch["attention_mask"], strict=True)
        ] == [b for _, b in rows]  # fmt: skip
        assert batch["logits_index"].tolist() == [1, 3, 4, 5]
        given = torch.ones(3, 5, dtype=torch.bool)
        given[0, [1, 3, 4]] = given[1, 0] = False
        assert torch.equal(batch["is_given"], given)
        assert not batch["given_length"].any()
        seen.update(
            (batch["input_ids"].view(-1)[batch["logits_index"]] != batch["target_ids"]).nonzero()[:, 0].tolist()
        )
    assert sorted(seen) == [0, 1, 2, 3]


def test_prediction_batches_are_padded_on_the_left():
    examples = make_examples(9, V)
    batch = collator(prediction=True)(examples)
    expected = [[*e["prompt_ids"], BOS] for e in examples]
    width = batch["input_ids"].shape[1]
    assert batch["input_ids"].tolist() == [[PAD] * (width - len(ids)) + ids for ids in expected]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"target_ids": [V]}, {}, f"Token id {V} is outside the vocabulary of {V}"),
        ({"target_ids": [8, MASK]}, {}, "holds the special token 2, which this model never writes"),
        ({}, {"noising": "exakt"}, "noising must be one of exact, bernoulli and is 'exakt'"),
        ({}, {"noise_beta": -1.0}, r"noise_beta must be greater than 0 and is -1\.0"),
        ({}, {"noise_beta": 2.0, "curriculum": {}}, "are two objectives of training"),
        ({}, {"curriculum": {"gama_min": -3}}, "gama_min.*did you mean 'gamma_min'"),
        ({}, {"noise_schedule": {"name": "log_linear", "eps": 1e-3}}, "does not run from data .* to pure noise"),
    ],
)
def test_bad_examples_and_options_are_refused_in_one_sentence(change, options, message):
    example = {**make_examples(1, V)[0], "target_ids": [], **change}
    with pytest.raises(ValueError, match=message):
        collator(**options)([example])


def test_the_largest_entry_of_the_gaussian_noise_is_the_token_with_uniform_noise():
    """What is drawn, against the shares that the bound is told; its normals are normal."""
    num, gamma = 40_000, -0.5
    keys = torch.arange(num).mul(7919)
    clean = torch.full((num,), 9)
    options = {"vocab_size": 12, "suppressed_ids": [0, 1, 2]}
    noisy, ids, weights = gaussian_tokens(keys, clean, torch.full((num,), gamma), torch.full((num,), 0.5), **options)
    noise = float(uniform_noise(torch.tensor([gamma], dtype=torch.float64).numpy(), 9)[0][0])
    expected = [num * noise / 9 + num * (1 - noise) * (i == 9) for i in range(3, 12)]
    counts = Counter(noisy.tolist())
    assert chisquare([counts[i] for i in range(3, 12)], expected).pvalue > 1e-4
    torch.testing.assert_close(weights.sum(-1), torch.ones(num))
    assert torch.equal(ids[:, 0], noisy)
    # Back from the softmax to the entries, up to a constant: differences of two normals.
    w = torch.zeros(num, 12).scatter(1, ids, 0.5 * weights.log())
    scale = torch.sigmoid(torch.tensor(gamma)).sqrt()
    assert kstest(((w[:, 4] - w[:, 7]) / scale / 2**0.5).numpy(), norm.cdf).pvalue > 1e-4
    # A token has the same noise whatever comes with it, in chunks of any size.
    some = gaussian_tokens(keys[7:9], clean[7:9], torch.full((2,), gamma), torch.full((2,), 0.5), **options)
    assert all(torch.equal(a, b[7:9]) for a, b in zip(some, (noisy, ids, weights), strict=True))


def test_the_curriculum_trains_on_the_bound_of_what_was_drawn():
    """With a cold softmax the network sees the noisy tokens themselves, so its loss is that of a plain batch."""
    model, examples = make_model(V, 32), make_examples(8, V)
    options = {"gamma_min": -2.0, "gamma_max": 1.0, "temperature": 1e-6}
    batch = collator(curriculum=options)(examples)
    assert torch.equal(restored(batch), batch["input_ids"])
    # Times are even in gamma: the weight is the change of the noise with the draw.
    gamma, step = batch["gamma"].numpy().astype(float), 1e-5
    (before, _), (after, _) = (uniform_noise(gamma + sign * step, len(WRITABLE)) for sign in (-1, 1))
    expected = torch.from_numpy((after - before) / (2 * step) * 3).float()
    torch.testing.assert_close(batch["loss_weights"], expected, rtol=1e-4, atol=1e-6)
    output = UDLMLoss()(model, batch)
    documents = batch["target_documents"]
    noisy, *_ = gaussian_tokens(
        batch["noise_keys"], batch["target_ids"], batch["gamma"][documents], batch["temperature"][documents], V,
        model.config.suppressed_ids,
    )  # fmt: skip
    assert (noisy != batch["target_ids"]).any()
    plain = {name: x for name, x in batch.items() if name not in ("noise_keys", "gamma", "temperature")}
    plain |= {"weights": plain.pop("loss_weights"), "input_ids": batch["input_ids"].clone()}
    plain["input_ids"].view(-1)[batch["logits_index"]] = noisy
    torch.testing.assert_close(output.loss_sum, UDLMLoss()(model, plain).loss_sum)
    assert output.sequence_nats is None
    output.loss_sum.backward()
    # Warm, it learns every embedding that the softmax holds.
    warm = collator(curriculum={**options, "temperature": 1.0})(examples)
    model.zero_grad()
    UDLMLoss()(model, warm).loss_sum.backward()
    assert (model.model.embed_tokens.weight.grad[WRITABLE].abs().sum(-1) > 0).all()


def test_the_slow_twin_collates():
    batch = slow_collation(make_examples(4, V), V, dense=True)
    assert batch["targets"].shape == (*batch["input_ids"].shape, V)

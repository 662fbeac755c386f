import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from xlm_hf.modules.counter_random import random_bits, unit_interval
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.objectives.corruption import bernoulli_masks, exact_masks, mixed_noise, schedule_at, skewed_times


def bits_of(num, seed=0):
    return random_bits(seed, np.arange(num, dtype=np.uint64))


def test_exact_masks_against_a_loop():
    lengths, beta = np.array([5, 0, 1, 8, 3]), 2.0
    bits, draws = bits_of(17), np.array([0.3, 0.5, 0.0, 0.999, 0.7])
    masked, alpha, weights = exact_masks(bits, lengths, draws, beta)
    start = 0
    for d, length in enumerate(lengths):
        own = bits[start : start + length]
        k = int(draws[d] ** (1 / beta) * length) + 1
        smallest = sorted(own.tolist())[:k]
        assert masked[start : start + length].tolist() == [b in smallest for b in own.tolist()]
        if length:
            assert alpha[d] == pytest.approx(1 - unit_interval(np.uint64(max(smallest))), abs=1e-12)
            # 1 / P(k), over the L / k of an even choice of k.
            chance = (k / length) ** beta - ((k - 1) / length) ** beta
            assert weights[d] == pytest.approx(1 / (k * chance))
        start += length


def test_skewed_times_are_beta_draws_with_their_importance_weights():
    draws = (np.arange(20_000) + 0.5) / 20_000
    for beta in (0.5, 1.0, 3.0):
        t, weights = skewed_times(draws, beta)
        assert kstest(t, lambda x, beta=beta: x**beta).pvalue > 0.99
        # The weights turn any mean over t back into one over U(0, 1).
        assert np.mean(weights * t**2) == pytest.approx(1 / 3, rel=1e-3)


def test_bernoulli_masks_have_their_rates_and_schedules_their_values():
    lengths, rates = np.array([3000, 5000]), np.array([0.2, 0.9])
    masked = bernoulli_masks(bits_of(8000), lengths, rates)
    assert abs(masked[:3000].mean() - 0.2) < 0.03
    assert abs(masked[3000:].mean() - 0.9) < 0.03
    alpha, masks, hazard = schedule_at(make_schedule("log_linear"), rates)
    np.testing.assert_allclose(alpha, 1 - rates)
    np.testing.assert_allclose(masks, rates)
    np.testing.assert_allclose(hazard, 1 / rates)


def test_mixed_noise_has_the_shares_of_its_kernel():
    num, writable = 30_000, np.array([1, 2, 4])
    ids = np.full(num, 2)
    noisy, met = mixed_noise(ids, bits_of(num), np.array([num]), np.array([0.3]), np.array([0.5]), writable, 3)
    # 0.5 masks, 0.2 uniform ids (the own one among them), 0.3 clean.
    counts = [int((noisy == token).sum()) for token in (1, 2, 3, 4)]
    assert chisquare(counts, [num * p for p in (0.2 / 3, 0.3 + 0.2 / 3, 0.5, 0.2 / 3)]).pvalue > 1e-3
    assert abs(met.mean() - 0.7) < 0.01
    assert (noisy[~met] == 2).all()
    # By documents: the shares of one do not touch the other.
    lengths = np.array([4, 6])
    none, all_ = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    noisy, met = mixed_noise(ids[:10], bits_of(10), lengths, none, all_, writable, 3)
    assert noisy.tolist() == [2] * 4 + [3] * 6
    assert met.tolist() == [False] * 4 + [True] * 6
    uniform, met = mixed_noise(ids, bits_of(num), np.array([num]), np.zeros(1), np.zeros(1), writable)
    assert chisquare([int((uniform == token).sum()) for token in writable]).pvalue > 1e-3
    assert met.all()

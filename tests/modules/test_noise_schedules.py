import math

import pytest
import torch

from xlm_hf.modules.noise_schedules import NOISE_SCHEDULES, total_noise

TIMES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_a_schedule_is_a_smooth_decrease_from_one_to_zero(name):
    schedule, h = NOISE_SCHEDULES[name], 1e-6
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64))
    slope = (schedule.alpha(TIMES + h) - schedule.alpha(TIMES - h)) / (2 * h)
    torch.testing.assert_close(schedule.alpha_prime(TIMES), slope, rtol=1e-6, atol=1e-8)
    assert (slope < 0).all()
    torch.testing.assert_close(schedule.inverse(schedule.alpha(TIMES)), TIMES)
    torch.testing.assert_close(schedule.weight(TIMES), -slope / (1 - schedule.alpha(TIMES)), rtol=1e-6, atol=1e-8)


def test_the_two_schedules_are_those_of_the_papers():
    torch.testing.assert_close(NOISE_SCHEDULES["log_linear"].weight(TIMES), 1 / TIMES)
    expected = 1 - torch.cos(math.pi / 2 * (1 - TIMES))
    torch.testing.assert_close(NOISE_SCHEDULES["cosine"].alpha(TIMES), expected)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_weights_stay_precise_at_the_smallest_times(name):
    t = torch.tensor([1e-12, 1e-300], dtype=torch.float64)
    torch.testing.assert_close(NOISE_SCHEDULES[name].weight(t) * t, torch.ones(2, dtype=torch.float64))


def test_total_noise_is_the_published_one_and_finite():
    eps, t = 1e-3, torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(total_noise(1 - t, eps), -torch.log1p(-(1 - eps) * t))
    assert float(total_noise(torch.zeros(1), eps)) == pytest.approx(-math.log(eps))

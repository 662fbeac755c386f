import math

import pytest
import torch

from xlm_hf.modules.noise_schedules import make_schedule

TIMES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
SCHEDULES = [
    "log_linear",
    "linear",
    "cosine",
    "polynomial",
    "geometric",
    {"name": "log_linear", "eps": 1e-3},
    {"name": "polynomial", "power": 0.5},
    {"name": "polynomial", "mirrored": True},
    {"name": "cosine", "mirrored": True},
    {"name": "geometric", "sigma_min": 1e-3, "sigma_max": 9.0},
    {"name": "clipped", "low": 0.3, "high": 0.8},
]
# alpha at 0 and at 1, where these are not 1 and 0.
ENDS = {
    "geometric": (math.exp(-1e-4), math.exp(-20.0)),
    str({"name": "log_linear", "eps": 1e-3}): (1.0, 1e-3),
    str({"name": "geometric", "sigma_min": 1e-3, "sigma_max": 9.0}): (math.exp(-1e-3), math.exp(-9.0)),
    str({"name": "clipped", "low": 0.3, "high": 0.8}): (0.7, 0.2),
}


@pytest.mark.parametrize("name", SCHEDULES, ids=str)
def test_a_schedule_is_a_smooth_fall_with_its_derivative_inverse_and_hazard(name):
    schedule, times = make_schedule(name), TIMES.clone().requires_grad_()
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor(ENDS.get(str(name), (1.0, 0.0)), dtype=torch.float64))
    alpha = schedule.alpha(times)
    (slope,) = torch.autograd.grad(alpha.sum(), times)
    torch.testing.assert_close(schedule.alpha_prime(TIMES), slope, rtol=1e-10, atol=1e-12)
    assert (slope < 0).all()
    assert (alpha.diff() < 0).all()
    torch.testing.assert_close(schedule.mask_probability(TIMES), 1 - alpha.detach(), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(schedule.inverse(alpha.detach()), TIMES, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(schedule.hazard(TIMES), -slope / (1 - alpha.detach()), rtol=1e-7, atol=1e-12)


def test_the_schedules_are_those_of_the_papers():
    torch.testing.assert_close(make_schedule("log_linear").hazard(TIMES), 1 / TIMES)
    torch.testing.assert_close(make_schedule("cosine").alpha(TIMES), 1 - torch.cos(math.pi / 2 * (1 - TIMES)))
    torch.testing.assert_close(
        make_schedule({"name": "cosine", "mirrored": True}).alpha(TIMES), (TIMES * math.pi / 2).cos()
    )
    late = make_schedule({"name": "polynomial", "power": 2, "mirrored": True})
    torch.testing.assert_close(late.alpha(TIMES), (1 - TIMES) ** 2)
    sigma = 1e-4 ** (1 - TIMES) * 20**TIMES
    torch.testing.assert_close(make_schedule("geometric").alpha(TIMES), torch.exp(-sigma))


@pytest.mark.parametrize("name", ["log_linear", "linear", "cosine", "polynomial"])
def test_hazards_stay_precise_at_the_smallest_times(name):
    t = torch.tensor([1e-12, 1e-100], dtype=torch.float64)
    expected = 2.0 if name == "polynomial" else 1.0
    torch.testing.assert_close(make_schedule(name).hazard(t) * t, torch.full_like(t, expected))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("cosin", "noise_schedule 'cosin' does not exist: did you mean 'cosine'"),
        ({"name": "polynomial", "pover": 2}, "noise_schedule 'polynomial' has no option 'pover': did you mean 'power'"),
        ({"name": "polynomial", "power": 0}, "power must be greater than 0 and is 0"),
        ({"name": "log_linear", "eps": "x"}, "eps must be a finite number and is 'x'"),
        ({"name": "geometric", "sigma_min": 30.0}, r"sigma_min must be in \(0, sigma_max = 20.0\) and is 30.0"),
        ({"name": "clipped", "low": 0.8, "high": 0.3}, "0 <= low < high <= 1; they are 0.8 and 0.3"),
        ({"power": 2}, "noise_schedule 'None' does not exist"),
    ],
)
def test_bad_schedules_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(schedule)

"""The noise of Gaussian diffusion: how much there is at a time, and how a step takes some of it away.

At gamma a vector e of length 1 is z = a e + s eps, with a^2 = sigmoid(-gamma), s^2 = sigmoid(gamma) and a normal eps.
The ratio of signal to noise is exp(-gamma).
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import softplus

# Units of the learnt schedule (arXiv 2305.18619's code).
_NUM_UNITS = 1024


def signal_and_scale(gamma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the vector and of its noise, a and s."""
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def ancestral_step(
    z: torch.Tensor, expected: torch.Tensor, gamma_t: torch.Tensor, gamma_s: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """A draw of z at s < t, given that at t and the clean vector (arXiv 2107.00630, equation 33).

    With c = 1 - exp(gamma_s - gamma_t),

        z_s = (a_s / a_t) (1 - c) z + c a_s e + sqrt(c) s_s noise,

    which has the law of noise at s where z has that at t, whatever the two are.

    Args:
        z: (..., D).
        expected: (..., D), the clean vector or what is expected of it.
        gamma_t: of z; broadcasts with it.
        gamma_s: likewise, at most that.
        noise: (..., D), normal.
    """
    share = -torch.expm1(gamma_s - gamma_t)
    (signal_t, _), (signal_s, scale_s) = signal_and_scale(gamma_t), signal_and_scale(gamma_s)
    return signal_s / signal_t * (1 - share) * z + share * signal_s * expected + share.sqrt() * scale_s * noise


def tempered(z: torch.Tensor, expected: torch.Tensor, gamma: torch.Tensor, temperature: float) -> torch.Tensor:
    """The clean vector that follows once the predicted noise (z - a expected) / s is divided by a temperature.

    A temperature below 1 makes the score, which points towards the data, steeper.
    """
    signal, _ = signal_and_scale(gamma)
    return z / signal * (1 - 1 / temperature) + expected / temperature


class Level(NamedTuple):
    """The noise at some times.

    Attributes:
        gamma: of each.
        slope: d gamma / d time of each.
        score: of each 0, with the gradient of -log p(gamma) by the schedule, p being the density of gamma if times are
            uniform. Only it reaches what makes the shape of a learnt schedule; gamma and slope reach its ends.
        end: gamma at time 1.
    """

    gamma: torch.Tensor
    slope: torch.Tensor
    score: torch.Tensor
    end: torch.Tensor


class NoiseSchedule(nn.Module):
    """gamma at a time, from gamma_min (time 0) to gamma_max (time 1).

    The shape of a learnt schedule is a monotone network of tanh units with positive weights, brought to 0 and 1 at the
    ends. A bound does not depend on it, but the variance of its estimate does.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.first_ends = (config.gamma_min, config.gamma_max)
        self.is_learnt = config.noise_schedule == "learnt"
        if self.is_learnt:
            self.ends = nn.Parameter(torch.tensor(self.first_ends))
            self.steepness, self.heights, self.offsets = (nn.Parameter(torch.randn(_NUM_UNITS)) for _ in range(3))

    def forward(self, times: torch.Tensor) -> Level:
        """The noise at `times` (D,) in [0, 1], in their type."""
        ends = self.ends.to(times.dtype) if self.is_learnt else times.new_tensor(self.first_ends)
        # No views of the parameter, which hooks of modules would take for parts of a graph even where there is none.
        low, high = ends[0].clone(), ends[1].clone()
        share, slope, bend = self._shape(times) if self.is_learnt else (times, torch.ones_like(times), 0 * times)
        score = slope / slope.detach() - (bend / slope.square()).detach() * share
        share, slope = share.detach(), slope.detach()
        return Level(low + (high - low) * share, (high - low) * slope, score - score.detach(), high)

    def _shape(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The share of the way from one end to the other at `times` (D,), and its first and second derivative."""
        steepness, heights = (softplus(x.to(times.dtype)) for x in (self.steepness, self.heights))
        ends = times.new_tensor((0.0, 1.0))
        units = ((torch.cat((ends, times))[:, None] - 0.5) * steepness + self.offsets.to(times.dtype)).tanh()
        first, last, *_ = at = units @ heights
        units = units[2:]
        slope = (1 - units.square()) @ (heights * steepness)
        bend = (-2 * units * (1 - units.square())) @ (heights * steepness.square())
        return (at[2:] - first) / (last - first), slope / (last - first), bend / (last - first)

"""Noise schedules: the share alpha_t of a text that is present and clean at time t of a discrete diffusion.

Time runs from t = 0 (text) to t = 1 (noise), and alpha falls with it. A schedule with alpha_0 = 1 and alpha_1 = 0 gives
the bound

    -log p(x) <= E_t[ hazard(t) x sum over masked l of -log p(x_l | x_t) ],   t ~ U(0, 1],

(Sahoo et al., arXiv 2406.07524, equation 10) without a remainder. Published code often stops at alpha_1 = eps; its
integral leaves out the times at which nearly everything is masked. The bound does not depend on the schedule
(substitute alpha for t), only the variance of its estimate and the time grid of a sampler do.

A schedule is written as its name or, with parameters, as a dictionary such as `{"name": "polynomial", "power": 2}`:
`make_schedule` builds it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .checked_options import CheckedOptions, PartialShare, Positive, check_arguments, check_value, checked
from .messages import did_you_mean


class NoiseSchedule(CheckedOptions):
    """A falling alpha_t; times and what is returned are float tensors of one shape."""

    def __post_init__(self):
        self.check()

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """1 - alpha_t, without cancellation near t = 0."""
        raise NotImplementedError

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Probability that a token is present and clean at time t."""
        return 1 - self.mask_probability(t)

    def alpha_prime(self, t: torch.Tensor) -> torch.Tensor:
        """Derivative of alpha by t; at most 0."""
        raise NotImplementedError

    def inverse(self, alpha: torch.Tensor) -> torch.Tensor:
        """The time t in [0, 1] at which alpha_t = `alpha`."""
        raise NotImplementedError

    def hazard(self, t: torch.Tensor) -> torch.Tensor:
        """-alpha'_t / (1 - alpha_t): the rate at which a mask is unmasked as time runs back, for t in (0, 1].

        It is the weight of a masked token's cross-entropy in the bound.
        """
        return -self.alpha_prime(t) / self.mask_probability(t)


@dataclass(frozen=True)
class ClippedSchedule(NoiseSchedule):
    """alpha_t = 1 - low - (high - low) t: mask probabilities from a range, as BD3-LM trains (arXiv 2503.09573).

    Raises:
        ValueError: unless 0 <= low < high <= 1.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"A clipped schedule needs 0 <= low < high <= 1; they are {self.low} and {self.high}.")

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """1 - alpha_t = low + (high - low) t."""
        return self.low + (self.high - self.low) * t

    def alpha_prime(self, t: torch.Tensor) -> torch.Tensor:
        """The constant low - high."""
        return torch.full_like(t, self.low - self.high)

    def inverse(self, alpha: torch.Tensor) -> torch.Tensor:
        """(1 - alpha - low) / (high - low)."""
        return (1 - alpha - self.low) / (self.high - self.low)


class LinearSchedule(ClippedSchedule):
    """alpha_t = 1 - t, hazard 1 / t."""

    def __init__(self):
        super().__init__()


class LogLinearSchedule(ClippedSchedule):
    """alpha_t = 1 - (1 - eps) t (arXiv 2406.07524, section 5 and appendix E); eps = 0 is the linear one."""

    @checked
    def __init__(self, eps: PartialShare = 0.0):
        super().__init__(0.0, 1 - eps)


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """alpha_t = 1 - cos(pi / 2 x (1 - t)) = 1 - sin(pi t / 2), the masking curve of MaskGIT (arXiv 2202.04200)."""

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """1 - alpha_t = sin(pi t / 2)."""
        return torch.sin(math.pi / 2 * t)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """2 sin^2(pi (1 - t) / 4), precise near t = 1."""
        return 2 * torch.sin(math.pi / 4 * (1 - t)) ** 2

    def alpha_prime(self, t: torch.Tensor) -> torch.Tensor:
        """-(pi / 2) cos(pi t / 2)."""
        return -math.pi / 2 * torch.cos(math.pi / 2 * t)

    def inverse(self, alpha: torch.Tensor) -> torch.Tensor:
        """1 - (4 / pi) arcsin(sqrt(alpha / 2)), precise near alpha = 0."""
        return 1 - 4 / math.pi * torch.arcsin((alpha / 2).sqrt())


@dataclass(frozen=True)
class PolynomialSchedule(NoiseSchedule):
    """alpha_t = 1 - t^power (MD4, arXiv 2406.04329)."""

    power: Positive = 2.0

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """t^power."""
        return t**self.power

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """-expm1(power log t), precise near t = 1."""
        return -torch.expm1(self.power * t.log())

    def alpha_prime(self, t: torch.Tensor) -> torch.Tensor:
        """-power t^(power - 1)."""
        return -self.power * t ** (self.power - 1)

    def inverse(self, alpha: torch.Tensor) -> torch.Tensor:
        """(1 - alpha)^(1 / power)."""
        return torch.exp(torch.log1p(-alpha) / self.power)


@dataclass(frozen=True)
class GeometricSchedule(NoiseSchedule):
    """alpha_t = exp(-sigma_t) with sigma_t = sigma_min^(1 - t) sigma_max^t (arXiv 2310.16834).

    It runs from exp(-sigma_min), not 1, to exp(-sigma_max), not 0.
    """

    sigma_min: Positive = 1e-4
    sigma_max: Positive = 20.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must be in (0, sigma_max = {self.sigma_max}) and is {self.sigma_min}.")

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The total noise -log alpha_t."""
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """1 - exp(-sigma_t)."""
        return -torch.expm1(-self.sigma(t))

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """exp(-sigma_t)."""
        return torch.exp(-self.sigma(t))

    def alpha_prime(self, t: torch.Tensor) -> torch.Tensor:
        """-sigma_t log(sigma_max / sigma_min) exp(-sigma_t)."""
        sigma = self.sigma(t)
        return -sigma * math.log(self.sigma_max / self.sigma_min) * torch.exp(-sigma)

    def inverse(self, alpha: torch.Tensor) -> torch.Tensor:
        """log(-log(alpha) / sigma_min) / log(sigma_max / sigma_min)."""
        return torch.log(-alpha.log() / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class MirroredSchedule(NoiseSchedule):
    """alpha_t = 1 - base alpha at 1 - t: masks come late where those of `base` come early, and the other way round.

    The mirrored polynomial schedule is alpha_t = (1 - t)^power and the mirrored cosine one is cos(pi t / 2).
    """

    base: NoiseSchedule

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """The alpha of `base` at 1 - t."""
        return self.base.alpha(1 - t)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The mask probability of `base` at 1 - t."""
        return self.base.mask_probability(1 - t)

    def alpha_prime(self, t: torch.Tensor) -> torch.Tensor:
        """That of `base` at 1 - t."""
        return self.base.alpha_prime(1 - t)

    def inverse(self, alpha: torch.Tensor) -> torch.Tensor:
        """1 - the inverse of `base` at 1 - alpha."""
        return 1 - self.base.inverse(1 - alpha)


NOISE_SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "log_linear": LogLinearSchedule,
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "polynomial": PolynomialSchedule,
    "geometric": GeometricSchedule,
    "clipped": ClippedSchedule,
}


def make_schedule(schedule: str | Mapping[str, Any]) -> NoiseSchedule:
    """The schedule of a name from `NOISE_SCHEDULES`, or of a dictionary of a `name` and parameters.

    `mirrored: True` among the parameters mirrors it (see `MirroredSchedule`).

    Raises:
        ValueError: for an unknown name or parameter, naming the closest one, or a value out of range.
    """
    check_value("noise_schedule", schedule, str | dict)
    parameters: dict[str, Any] = {"name": schedule} if isinstance(schedule, str) else dict(schedule)
    name, mirrored = str(parameters.pop("name", None)), parameters.pop("mirrored", False)
    if name not in NOISE_SCHEDULES:
        raise ValueError(f"noise_schedule {name!r} does not exist: {did_you_mean(name, NOISE_SCHEDULES)}")
    check_value("mirrored", mirrored, bool)
    check_arguments(f"noise_schedule {name!r}", parameters, NOISE_SCHEDULES[name])
    made = NOISE_SCHEDULES[name](**parameters)
    return MirroredSchedule(made) if mirrored else made


def make_whole_schedule(schedule: str | Mapping[str, Any]) -> NoiseSchedule:
    """What `make_schedule` makes; raises ValueError too unless it runs from alpha_0 = 1 to alpha_1 = 0."""
    made, ends = make_schedule(schedule), torch.tensor([0.0, 1.0], dtype=torch.float64)
    if (made.mask_probability(ends) - ends).abs().max() > 1e-9:
        found = f"The noise_schedule {schedule!r} does not run from data (alpha 1) to pure noise (alpha 0)"
        raise ValueError(f"{found}: choose one that does, such as 'log_linear'.")
    return made


def noise_of_tokens(alpha: torch.Tensor | None, noise_eps: float, is_given: torch.Tensor | None = None) -> torch.Tensor:
    """What a network is told of a canvas under noise: sigma = -log max(alpha, noise_eps), float32.

    Args:
        alpha: (B,), or (B, L) where tokens of a row differ: the share of the canvas that is without noise.
        noise_eps: no alpha is taken to be less.
        is_given: (B, L) tokens that have no noise at any time: alpha is 1 for them, and the result (B, L).

    Raises:
        ValueError: if alpha is None.
    """
    if alpha is None:
        raise ValueError("The model is conditioned on the time: pass alpha, one number for each row or token.")
    if is_given is not None:
        alpha = (alpha if alpha.dim() == 2 else alpha[:, None]).masked_fill(is_given, 1.0)
    return -alpha.float().clamp(min=noise_eps).log()

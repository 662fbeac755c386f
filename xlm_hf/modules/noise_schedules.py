"""How fast tokens are masked: the share alpha_t of tokens that are still clean at time t of a masked diffusion.

Time runs from t = 0 (text) to t = 1 (noise). Every schedule here ends at alpha_1 = 0 exactly, so that the bound

    -log p(x) <= E_t[ -alpha'_t / (1 - alpha_t) x sum over masked l of -log p(x_l | x_t) ],   t ~ U(0, 1],

(Sahoo et al., arXiv 2406.07524, equation 10) is one without a remainder. Published code stops at alpha_1 = eps; the
integral then leaves out the times at which (almost) everything is masked, and what it gives is below the bound by about
eps times the loss on an empty canvas. The bound does not depend on the schedule (substitute alpha for t), only the
variance of its estimate and the time grid of a sampler do.
"""

import math

import torch


class NoiseSchedule:
    """A decreasing alpha_t with alpha_0 = 1 and alpha_1 = 0; t and what is returned are tensors of one shape."""

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """1 - alpha_t, without the cancellation near t = 0."""
        raise NotImplementedError

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Probability that a token is still clean at time t."""
        return 1 - self.mask_probability(t)

    def alpha_prime(self, t: torch.Tensor) -> torch.Tensor:
        """Derivative of alpha by t; at most 0."""
        raise NotImplementedError

    def inverse(self, alpha: torch.Tensor) -> torch.Tensor:
        """The time t in [0, 1] at which alpha_t = `alpha`."""
        raise NotImplementedError

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """-alpha'_t / (1 - alpha_t), the weight of a masked token's cross-entropy in the bound, for t in (0, 1]."""
        return -self.alpha_prime(t) / self.mask_probability(t)


class LogLinearSchedule(NoiseSchedule):
    """alpha_t = 1 - t, weight 1 / t (arXiv 2406.07524, section 5 and appendix E, with eps = 0)."""

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """1 - alpha_t = t."""
        return t

    def alpha_prime(self, t: torch.Tensor) -> torch.Tensor:
        """-1."""
        return -torch.ones_like(t)

    def inverse(self, alpha: torch.Tensor) -> torch.Tensor:
        """1 - alpha."""
        return 1 - alpha


class CosineSchedule(NoiseSchedule):
    """alpha_t = 1 - cos(pi / 2 x (1 - t)) = 1 - sin(pi t / 2), the masking curve of MaskGIT (arXiv 2202.04200)."""

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """1 - alpha_t = sin(pi t / 2)."""
        return torch.sin(math.pi / 2 * t)

    def alpha_prime(self, t: torch.Tensor) -> torch.Tensor:
        """-(pi / 2) cos(pi t / 2)."""
        return -math.pi / 2 * torch.cos(math.pi / 2 * t)

    def inverse(self, alpha: torch.Tensor) -> torch.Tensor:
        """(2 / pi) arcsin(1 - alpha)."""
        return 2 / math.pi * torch.arcsin(1 - alpha)


NOISE_SCHEDULES: dict[str, NoiseSchedule] = {"log_linear": LogLinearSchedule(), "cosine": CosineSchedule()}


def total_noise(alpha: torch.Tensor, eps: float) -> torch.Tensor:
    """What a time-conditioned network is told: sigma = -log(eps + (1 - eps) alpha), in [0, -log eps].

    With alpha_t = 1 - t this is the sigma_t = -log(1 - (1 - eps) t) of the published code of arXiv 2406.07524. Any
    function of the time is as good for the bound; eps only keeps this one finite where nothing is clean.
    """
    return -torch.log(eps + (1 - eps) * alpha)

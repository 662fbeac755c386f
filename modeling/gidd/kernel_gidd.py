"""The noise of GIDD: masks and uniform noise, mixed."""

from dataclasses import dataclass, field

import torch

from xlm_hf.modules.kernels import Kernel, Shares
from xlm_hf.modules.noise_schedules import LinearSchedule, NoiseSchedule


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedKernel(Kernel):
    """Masks and uniformly drawn tokens (arXiv 2503.04482, section 3.2).

    With c_t = p / (1 - p) x 2^g (t (1 - t))^(g / 2): alpha_t = (1 - t) / (1 + c_t), m_t = t / (1 + c_t) and U_t =
    c_t / (1 + c_t). So the uniform share is p at t = 1/2 and 0 at both ends.

    Attributes:
        uniform_share: p, in [0, 1).
        gamma: g, how fast the uniform share rises.
        schedule: another pace of time: in place of t stands 1 - alpha of this schedule, which is t for the linear one.
    """

    uniform_share: float = 0.0
    gamma: float = 1.0
    schedule: NoiseSchedule = field(default_factory=LinearSchedule)

    def shares(self, t: torch.Tensor) -> Shares:
        """alpha_t, m_t and U_t as above."""
        t = self.schedule.mask_probability(t)
        odds = self.uniform_share / (1 - self.uniform_share)
        c = odds * 2**self.gamma * (t * (1 - t)) ** (self.gamma / 2)
        return Shares((1 - t) / (1 + c), t / (1 + c), c / (1 + c))

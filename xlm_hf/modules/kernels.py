"""Noise kernels: the corruption of a token, and the reverse step of a sampler.

At time t a token is clean with probability alpha_t and a mask with probability m_t. With probability U_t it is an id
drawn uniformly from the N writable ids, its own included. alpha_t + m_t + U_t = 1. With U = 0 the kernel is absorbing,
with m = 0 it is uniform, with both it is mixed (arXiv 2503.04482). Corruption for training draws from the
same shares in NumPy: `xlm_hf.objectives.corruption`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .noise_schedules import LinearSchedule, NoiseSchedule

KEEP, PREDICTED, UNIFORM, MASK = range(4)


class Shares(NamedTuple):
    """alpha_t, m_t and U_t, float64 tensors of the shape of t."""

    alpha: torch.Tensor
    mask: torch.Tensor
    uniform: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """A forward process on single tokens; subclasses say which `shares` and which `prior` it has.

    Attributes:
        mask_token_id: the mask; None where there is none.
        writable_ids: (N,) int64, the ids that a uniform draw may give; None where there are none.
    """

    mask_token_id: int | None = None
    writable_ids: torch.Tensor | None = None

    def shares(self, t: torch.Tensor) -> Shares:
        """The shares at times t."""
        raise NotImplementedError

    def prior(self, uniforms: torch.Tensor) -> torch.Tensor:
        """Ids at t = 1, drawn by `uniforms` in [0, 1), of their shape."""
        if self.mask_token_id is None:
            return self.replacement(uniforms)
        return torch.full_like(uniforms, self.mask_token_id, dtype=torch.int64)

    def replacement(self, uniforms: torch.Tensor) -> torch.Tensor:
        """Writable ids, drawn by `uniforms` in [0, 1)."""
        writable = self.writable_ids
        if writable is None:
            raise ValueError("An absorbing kernel replaces no token by another: choose a uniform or mixed one.")
        return writable[(uniforms * len(writable)).long().clamp(max=len(writable) - 1)]

    def posterior(
        self, ids: torch.Tensor, probabilities: torch.Tensor, t: torch.Tensor, s: torch.Tensor
    ) -> torch.Tensor:
        """The law of the token at time s < t, given the one at t, as a mixture of four parts.

        Let a = alpha_t / alpha_s. Let b be the share that the noise at t gives to the observed id, less a times that of
        s. Let p_s be x_theta noised to s. Then p(z_s) is proportional to (a [z_s = z_t] + b) p_s(z_s). So the token is
        kept, drawn from x_theta, drawn uniformly, or masked. No product over the vocabulary is needed: of x_theta only
        its value at the observed token is used. Everything is in float64.

        Args:
            ids: (...) the tokens at t.
            probabilities: (...) x_theta of these ids, for uniform noise the leave-one-out prediction; 0 at a mask.
            t: times that broadcast with `ids`, float64.
            s: likewise, at most t.

        Returns:
            (..., 4) float64, the probabilities of `KEEP`, `PREDICTED`, `UNIFORM` and `MASK`.
        """
        at_t, at_s = self.shares(t), self.shares(s)
        ratio = at_t.alpha / at_s.alpha
        size = 1 if self.writable_ids is None else len(self.writable_ids)
        is_mask = torch.zeros_like(ids, dtype=torch.bool) if self.mask_token_id is None else ids == self.mask_token_id
        extra = torch.where(is_mask, at_t.mask - ratio * at_s.mask, (at_t.uniform - ratio * at_s.uniform) / size)
        own = torch.where(is_mask, at_s.mask, at_s.alpha * probabilities.double() + at_s.uniform / size)
        keep, predicted, uniform, mask = torch.broadcast_tensors(
            ratio * own, extra * at_s.alpha, extra * at_s.uniform, extra * at_s.mask
        )
        parts = torch.stack((keep, predicted, uniform, mask), dim=-1).clamp(min=0)
        total = parts.sum(dim=-1, keepdim=True)
        # A token that no noise of this kernel gives is clean, however improbable the network takes it to be.
        certain = parts.new_tensor([1.0, 0.0, 0.0, 0.0])
        return torch.where(total > 0, parts / total, certain)

    def own_evidence(self, ids: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Log q(z_t = z | x = z) - log q(z_t = z | another x), float64 (...): what a token says of its clean one.

        Added to the logit of the token at hand, it turns the prediction of a position by the others (leave-one-out)
        into one by all of them (the denoiser), up to a constant: log(1 + N alpha_t / U_t). A mask says nothing.

        Args:
            ids: (...) the tokens at t.
            t: times that broadcast with `ids`, float64, in (0, 1].
        """
        alpha, _, uniform = self.shares(t)
        size = 1 if self.writable_ids is None else len(self.writable_ids)
        evidence = torch.log1p(size * alpha / uniform)
        return evidence if self.mask_token_id is None else evidence.masked_fill(ids == self.mask_token_id, 0.0)


def draw_part(parts: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Which part (...) of a mixture (..., 4) is drawn by `uniforms` (...) in [0, 1): `KEEP`, `PREDICTED`, ..."""
    return (parts[..., :-1].cumsum(dim=-1) <= uniforms[..., None]).sum(dim=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class AbsorbingKernel(Kernel):
    """Tokens become masks: m_t = 1 - alpha_t."""

    schedule: NoiseSchedule

    def shares(self, t: torch.Tensor) -> Shares:
        """alpha_t, 1 - alpha_t and 0."""
        return Shares(self.schedule.alpha(t), self.schedule.mask_probability(t), torch.zeros_like(t))


@dataclass(frozen=True, kw_only=True, eq=False)
class UniformKernel(Kernel):
    """Tokens become uniformly drawn ones (arXiv 2412.10193): U_t = 1 - alpha_t."""

    schedule: NoiseSchedule

    def shares(self, t: torch.Tensor) -> Shares:
        """alpha_t, 0 and 1 - alpha_t."""
        return Shares(self.schedule.alpha(t), torch.zeros_like(t), self.schedule.mask_probability(t))


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

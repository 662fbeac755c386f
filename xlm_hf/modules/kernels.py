"""Noise kernels: the corruption of a token, and the reverse step of a sampler.

At time t a token is clean with probability alpha_t and a mask with probability m_t. With probability U_t it is an id
drawn uniformly from the N writable ids, its own included. alpha_t + m_t + U_t = 1. With U = 0 the kernel is absorbing,
with m = 0 it is uniform, with both it is mixed (arXiv 2503.04482). Corruption for training draws from the
same shares in NumPy: `xlm_hf.objectives.corruption`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .noise_schedules import NoiseSchedule

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
        writable: Any = self.writable_ids
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

    def leave_one_out(self, logits: torch.Tensor, ids: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits (S, V) of the clean tokens by all *other* positions, of what a network gives at tokens `ids` (S,).

        Here it gives just these. A family whose network looks at the token itself has a kernel that takes it out.
        """
        return logits


def draw_part(parts: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Which part (...) of a mixture (..., 4) is drawn by `uniforms` (...) in [0, 1): `KEEP`, `PREDICTED`, ..."""
    return (parts[..., :-1].cumsum(dim=-1) <= uniforms[..., None]).sum(dim=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class UniformKernel(Kernel):
    """Tokens become uniformly drawn ones (arXiv 2412.10193): U_t = 1 - alpha_t."""

    schedule: NoiseSchedule

    def shares(self, t: torch.Tensor) -> Shares:
        """alpha_t, 0 and 1 - alpha_t."""
        return Shares(self.schedule.alpha(t), torch.zeros_like(t), self.schedule.mask_probability(t))

"""Counter-based random numbers: every draw is a pure function of a seed and integer counters.

No state is kept, so neither workers, ranks, batch composition nor a resume change a draw. The generator is SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) keyed by the counters in turn.
"""

import math

import torch

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def _xor_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 shifts keep the sign; the mask makes the shift logical, as SplitMix64 asks on unsigned integers.
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


def random_bits(*counters: int | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Hash integer counters to 64 random bits.

    Args:
        counters: integers or int64 tensors that broadcast together, the seed first. Each distinct tuple gives an
            independent draw.
        device: where to make the result when every counter is a plain integer.

    Returns:
        int64 tensor of the broadcast shape, uniform over all 64-bit patterns.
    """
    tensors = [torch.as_tensor(c, dtype=torch.int64, device=device if isinstance(c, int) else None) for c in counters]
    state = torch.zeros((), dtype=torch.int64, device=device)
    for counter in tensors:
        state = state.to(counter.device) + (counter + 1) * _GAMMA
        state = _xor_shift(state, 30) * _MULTIPLIER_1
        state = _xor_shift(state, 27) * _MULTIPLIER_2
        state = _xor_shift(state, 31)
    return state


def uniform(*counters: int | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Uniform draws in [0, 1) with 53 random bits, one for each tuple of `counters` (see `random_bits`).

    Returns:
        float64 tensor of the broadcast shape of the counters.
    """
    bits = (random_bits(*counters, device=device) >> 11) & ((1 << 53) - 1)
    return bits.to(torch.float64) * 2.0**-53


def low_discrepancy(seed: int, epoch: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Evenly spread draws over an epoch: u = frac(offset(seed, epoch) + position / golden ratio).

    The additive recurrence with the golden ratio has the lowest discrepancy of its kind, so every stretch of an epoch
    covers [0, 1) evenly whatever the batch size; the offset is a counter-based uniform draw.

    Args:
        seed: of the run.
        epoch: int64 tensor.
        position: int64 tensor, an example's place in the shuffled epoch.

    Returns:
        float64 tensor in [0, 1) of the broadcast shape.
    """
    return (uniform(seed, epoch) + position.to(torch.float64) * GOLDEN_RATIO) % 1.0

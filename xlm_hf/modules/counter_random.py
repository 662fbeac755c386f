"""Counter-based random numbers: every draw is a pure function of a seed and integer counters.

No state is kept, so neither workers, ranks, batch composition nor a resume change a draw. The generator is SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) keyed by the counters in turn.
"""

import math

import torch

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1


def _mix(state: torch.Tensor | int) -> torch.Tensor | int:
    """The output function of SplitMix64, on int64 tensors or Python integers."""
    if isinstance(state, int):
        state &= _MASK
        state = ((state ^ (state >> 30)) * _MULTIPLIER_1) & _MASK
        state = ((state ^ (state >> 27)) * _MULTIPLIER_2) & _MASK
        return state ^ (state >> 31)
    state = (state ^ _logical_shift(state, 30)) * _signed(_MULTIPLIER_1)
    state = (state ^ _logical_shift(state, 27)) * _signed(_MULTIPLIER_2)
    return state ^ _logical_shift(state, 31)


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    # An int64 shift keeps the sign; SplitMix64 is defined on unsigned integers.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return (x & _MASK) - ((x & 1 << 63) << 1)


def random_bits(*counters: int | torch.Tensor) -> torch.Tensor:
    """Hash integer counters to 64 random bits.

    Args:
        counters: integers or int64 tensors that broadcast together, the seed first. Each distinct tuple gives an
            independent draw.

    Returns:
        int64 tensor of the broadcast shape, uniform over all 64-bit patterns.
    """
    state: torch.Tensor | int = 0
    for counter in counters:
        if isinstance(counter, torch.Tensor):
            state = _mix(
                (state if isinstance(state, torch.Tensor) else _signed(state)) + (counter + 1) * _signed(_GAMMA)
            )
        else:
            step = (counter + 1) * _GAMMA
            state = _mix(state + (_signed(step) if isinstance(state, torch.Tensor) else step))
    return state if isinstance(state, torch.Tensor) else torch.tensor(_signed(state))


def uniform(*counters: int | torch.Tensor) -> torch.Tensor:
    """Uniform draws in [0, 1) with 53 random bits, one for each tuple of `counters` (see `random_bits`).

    Returns:
        float64 tensor of the broadcast shape of the counters.
    """
    return _logical_shift(random_bits(*counters), 11).to(torch.float64) * 2.0**-53


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

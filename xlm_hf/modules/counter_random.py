"""Counter-based random numbers: every draw is a pure function of a seed and integer counters.

No state is kept, so neither workers, ranks, batch composition nor a resume change a draw. The generator is SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) keyed by the counters in turn.
"""

import math
from functools import cache
from typing import Any

import torch

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1


def _mix(state: Any) -> Any:
    """The output function of SplitMix64, on Python integers, NumPy arrays of uint64 or int64 tensors."""
    if isinstance(state, torch.Tensor):
        state = (state ^ _logical_shift(state, 30)) * _signed(_MULTIPLIER_1)
        state = (state ^ _logical_shift(state, 27)) * _signed(_MULTIPLIER_2)
        return state ^ _logical_shift(state, 31)
    if isinstance(state, int):
        state = ((state & _MASK ^ (state & _MASK) >> 30) * _MULTIPLIER_1) & _MASK
        state = ((state ^ (state >> 27)) * _MULTIPLIER_2) & _MASK
        return state ^ (state >> 31)
    # An array of uint64 wraps around by itself. It is a new one, so it can be changed in place.
    state ^= state >> 30
    state *= _MULTIPLIER_1
    state ^= state >> 27
    state *= _MULTIPLIER_2
    state ^= state >> 31
    return state


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    # An int64 shift keeps the sign; SplitMix64 is defined on unsigned integers.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return (x & _MASK) - ((x & 1 << 63) << 1)


def random_bits(*counters: Any, state: Any = 0) -> Any:
    """Hash integer counters to 64 random bits.

    Args:
        counters: integers, int64 tensors or NumPy arrays of uint64 that broadcast together, the seed first. Each
            distinct tuple gives an independent draw.
        state: what this returned for the counters that come before, so that they need not be hashed again.

    Returns:
        int64 tensor of the broadcast shape, uniform over all 64-bit patterns; for arrays the same bits as uint64.
    """
    for counter in counters:
        if isinstance(counter, torch.Tensor):
            state = (state if isinstance(state, torch.Tensor) else _signed(state)) + (counter + 1) * _signed(_GAMMA)
        else:
            step = (counter + 1) * _GAMMA
            step = step & _MASK if isinstance(counter, int) else step
            state = state + (_signed(step) if isinstance(state, torch.Tensor) else step)
        state = _mix(state)
    return torch.tensor(_signed(state)) if isinstance(state, int) else state


@cache
def stream_seed(seed: int, stream: str | None) -> int:
    """The seed of a named stream: with it in place of `seed`, all draws are independent of those of other streams.

    None is the stream without a name, whose seed is `seed`.
    """
    return seed if stream is None else int(random_bits(seed, *stream.encode())) & _MASK


def unit_interval(bits: Any) -> Any:
    """Turn random bits, as `random_bits` returns them, into uniform draws in [0, 1): float64, of their first 53."""
    return (_logical_shift(bits, 11).double() if isinstance(bits, torch.Tensor) else bits >> 11) * 2.0**-53


def uniform(*counters: Any) -> Any:
    """Uniform draws in [0, 1) with 53 random bits, float64, one for each tuple of `counters` (see `random_bits`)."""
    return unit_interval(random_bits(*counters))


def low_discrepancy(seed: int, epoch: Any, position: Any) -> Any:
    """Evenly spread draws over an epoch: u = frac(offset(seed, epoch) + position / golden ratio).

    The additive recurrence with the golden ratio has the lowest discrepancy of its kind, so every stretch of an epoch
    covers [0, 1) evenly whatever the batch size; the offset is a counter-based uniform draw.

    Args:
        seed: of the run.
        epoch: NumPy array of uint64.
        position: NumPy array of integers, an example's position in the shuffled epoch.

    Returns:
        float64 array in [0, 1) of the broadcast shape.
    """
    return (uniform(seed, epoch) + position * GOLDEN_RATIO) % 1.0

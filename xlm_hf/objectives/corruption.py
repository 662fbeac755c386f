"""Corrupting the tokens of a batch, in NumPy, by random bits that the collator hashes.

Everything here is flat: the tokens of all documents one after the other, (N,), and what belongs to a document (D,). The
shares are those of `xlm_hf.modules.kernels`: alpha is the share of tokens that stay, and time runs from 0 (text) to 1.
"""

import numpy as np
import torch

from xlm_hf.modules.counter_random import random_bits, unit_interval
from xlm_hf.modules.noise_schedules import NoiseSchedule
from xlm_hf.objectives.collation import random_subset


def skewed_times(draws: np.ndarray, beta: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Times t = v^(1/beta) in (0, 1], v = 1 - draw, and their importance weights 1 / density = t^(1 - beta) / beta.

    These are Beta(beta, 1) draws. A beta above 1 shows noisier states; beta = 1/2, t = v^2 with weight 2 v, keeps the
    variance of a weight of 1 / t finite.

    Args:
        draws: uniform in [0, 1), float64.
        beta: greater than 0.
    """
    t = (1 - draws) ** (1 / beta)
    return t, 1 / (beta * t ** (beta - 1))


def schedule_at(schedule: NoiseSchedule, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha_t, 1 - alpha_t and the hazard of a schedule at times t, float64."""
    times = torch.from_numpy(t)
    return schedule.alpha(times).numpy(), schedule.mask_probability(times).numpy(), schedule.hazard(times).numpy()


def exact_masks(
    bits: np.ndarray, lengths: np.ndarray, draws: np.ndarray, beta: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask exactly k of the L tokens of each document, k uniform in 1..L.

    The k smallest of L uniform draws are a uniformly random k-subset. Independently, the k-th smallest is a Beta(k, L -
    k + 1) draw. This is the law of the mask probability given that k of L tokens are masked. So the weight of a masked
    token in the bound is L / k, and its variance is finite.

    Args:
        bits: (N,) uint64 of the tokens.
        lengths: (D,) tokens of each document; 0 masks nothing.
        draws: (D,) uniform in [0, 1).
        beta: k / L, rounded up, is drawn from Beta(beta, 1); the weights make up for it.

    Returns:
        (N,) bool, which tokens are masked; (D,) alpha; (D,) weight of each masked token in the bound.
    """
    k = (draws ** (1 / beta) * lengths).astype(np.int64) + 1
    masked, greatest = random_subset(bits, lengths, np.minimum(k, lengths))
    alpha = np.where(lengths == 0, 0.0, 1 - unit_interval(greatest))
    return masked, alpha, lengths**beta / (k * (k**beta - (k - 1) ** beta))


def exact_noise(bits: np.ndarray, lengths: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Let exactly k of the L tokens of each document meet noise, k uniform in 0..L.

    Given k, t ~ Beta(k, L - k + 1) is the k-th smallest of L uniform draws, and the tokens that meet noise are those of
    the k smallest. With C(L, k) B(k, L - k + 1) = 1 / k, (k, t) has the density k / ((L + 1) t) times that of noise at
    uniform times: the weight is (L + 1) t / k, and a rate of 1 / t at k tokens becomes a constant. For k = 0, t ~
    Beta(1, L + 1) has the very density of no noise at uniform times, so the weight is 1.

    Args:
        bits: (N,) uint64 of the tokens.
        lengths: (D,) tokens of each document.
        draws: (D,) uniform in [0, 1).

    Returns:
        (D,) t = 1 - alpha; (D,) weight of the rates of a document in the bound; (N,) bool, which tokens meet noise.
    """
    k = (draws * (lengths + 1)).astype(np.int64)
    met, greatest = random_subset(bits, lengths, k)
    without = 1 - (1 - (draws * (lengths + 1) - k)) ** (1 / (lengths + 1))
    t = np.where(k == 0, without, unit_interval(greatest))
    return t, np.where(k == 0, 1.0, (lengths + 1) * t / np.maximum(k, 1)), met


def bernoulli_masks(bits: np.ndarray, lengths: np.ndarray, mask_probability: np.ndarray) -> np.ndarray:
    """Mask each token by itself with the probability of its document (D,); (N,) bool.

    Args:
        bits: (N,) uint64 of the tokens.
        lengths: (D,) tokens of each document.
        mask_probability: (D,) float64.
    """
    return unit_interval(bits) < np.repeat(mask_probability, lengths)


def mixed_noise(
    ids: np.ndarray,
    bits: np.ndarray,
    lengths: np.ndarray,
    alpha: np.ndarray,
    mask_share: np.ndarray,
    writable_ids: np.ndarray,
    mask_token_id: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Noise of uniform and mixed kernels: a token becomes a mask, a uniformly drawn id (its own included), or stays.

    Args:
        ids: (N,) the clean tokens.
        bits: (N,) uint64 of the tokens; what a token becomes and by which id are two draws from them.
        lengths: (D,) tokens of each document.
        alpha: (D,) the share that stays.
        mask_share: (D,) the share that is masked; 0 for uniform noise.
        writable_ids: (N,) the ids that a uniform draw may give.
        mask_token_id: the mask, where any share is masked.

    Returns:
        (N,) the noisy ids; (N,) bool, which tokens met noise, though a uniform draw may have given their own id.
    """
    events, share = unit_interval(bits), np.repeat(mask_share, lengths)
    is_noise = events < np.repeat(1 - alpha, lengths)
    drawn = unit_interval(random_bits(1, state=bits))
    noisy = np.where(is_noise, writable_ids[(drawn * len(writable_ids)).astype(np.int64)], ids)
    if mask_token_id is not None:
        noisy[events < share] = mask_token_id
    return noisy, is_noise

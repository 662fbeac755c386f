"""Duo's Gaussian curriculum (arXiv 2506.10892): uniform noise as the largest entry of a Gaussian vector.

Let w = a e_x + s eps, with e_x the clean token as a vector of N entries, a^2 = sigmoid(-gamma) and s^2 =
sigmoid(gamma). The largest entry of w is x with a probability p(gamma), and any other alike. So it is x with uniform
noise, of alpha = (N p - 1) / (N - 1). Instead of this token the network is shown softmax(w / temperature), which tells
more of x: an easier task that leads to the real one.
"""

from collections.abc import Sequence

import numpy as np
import torch

from xlm_hf.modules.counter_random import random_bits, unit_interval

# Entries of a softmax that are kept: at the published temperature of 0.001 all others are 0 in float32.
_NUM_KEPT = 64
# Entries of w at once.
_CHUNK_SIZE = 2**22


def uniform_noise(gamma: np.ndarray, num_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """1 - alpha and -d alpha / d gamma, float64 (D,), of the uniform noise that Gaussian noise at `gamma` (D,) makes.

    With m = a / s = exp(-gamma / 2): p = int phi(y) Phi(y + m)^(N - 1) dy.
    """
    y = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    m = torch.exp(-torch.from_numpy(gamma) / 2)[:, None]
    log_below = torch.special.log_ndtr(y + m)
    density = torch.exp(-(y**2) / 2) * ((y[1] - y[0]) / np.sqrt(2 * np.pi))
    ratio = num_ids / (num_ids - 1)
    noise = -ratio * (density * torch.expm1((num_ids - 1) * log_below)).sum(dim=-1)
    others = (num_ids - 1) * torch.exp((num_ids - 2) * log_below - (y + m) ** 2 / 2) / np.sqrt(2 * np.pi)
    slope = ratio * (density * others).sum(dim=-1) * m[:, 0] / 2
    return noise.numpy(), slope.numpy()


def gaussian_tokens(
    keys: torch.Tensor,
    clean_ids: torch.Tensor,
    gamma: torch.Tensor,
    temperature: torch.Tensor,
    vocab_size: int,
    suppressed_ids: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise of S tokens, drawn on their device: entry v of eps is a function of a token's key and v alone.

    Args:
        keys: (S,) int64 random bits.
        clean_ids: (S,).
        gamma: (S,) of the Gaussian noise.
        temperature: (S,).
        vocab_size: V.
        suppressed_ids: ids that noise never gives.

    Returns:
        the noisy tokens (S,); the largest entries of softmax(w / temperature), as ids (S, K) and weights (S, K).
    """
    every = torch.arange(vocab_size, device=keys.device)
    writable = every[~torch.isin(every, torch.tensor(list(suppressed_ids), dtype=torch.int64, device=keys.device))]
    num_kept, parts = min(_NUM_KEPT, len(writable)), []
    size = max(1, _CHUNK_SIZE // vocab_size)
    for rows in [slice(i, i + size) for i in range(0, len(keys), size)]:
        uniforms = unit_interval(random_bits(writable, state=keys[rows, None])) + 2.0**-54
        signal, scale = (torch.sigmoid(sign * gamma[rows, None].double()).sqrt() for sign in (-1, 1))
        w = scale * torch.special.ndtri(uniforms) + signal * (writable == clean_ids[rows, None])
        top, at = w.topk(num_kept, dim=-1)
        parts.append((writable[at], (top / temperature[rows, None]).softmax(dim=-1).float()))
    ids, weights = (torch.cat(x) for x in zip(*parts, strict=True))
    return ids[:, 0], ids, weights

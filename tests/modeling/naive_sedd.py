"""The slow twin of score entropy diffusion."""

import itertools
import math

import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot

from tests.modeling.naive import BOS, FIRST_WORD, UNK, filtered, small_model
from xlm_hf.modeling.sedd import SEDDConfig, SEDDForScoreEntropy, SEDDGenerationConfig
from xlm_hf.modeling.sedd.generation_sedd import SEDDGenerationMixin
from xlm_hf.modules.vocabulary_head import LanguageModelOutput, head_fields

WORDS, MASK_NUMBER = (7, 8, 9), 3


def make_model(*args, **options):
    # The unknown word is a word: texts may hold it, and so may noise.
    options = {"suppress_tokens": [i for i in range(FIRST_WORD) if i != UNK], **options}
    model = small_model(SEDDForScoreEntropy, *args, **options)
    for name, parameter in model.named_parameters():
        if "modulation" in name or "time_token.projection" in name:
            parameter.data.normal_(std=0.3)
    return model


def log_scores(logits, z, alpha, kernel, is_scaled):
    """log s (..., N) of logits; z (...) numbers, N where a mask stands; alpha (..., 1)."""
    num_ids = logits.shape[-1]
    if kernel == "absorb":
        offset = torch.log(alpha / (1 - alpha)) - np.log(num_ids) if is_scaled else 0.0
        return logits + offset
    kappa = num_ids * alpha / (1 - alpha)
    return (logits * kappa / (1 + kappa) if is_scaled else logits) * (1 - one_hot(z, num_ids))


def score_entropies(log_s, x, z, alpha, kernel):
    """sigma-rate of the bound in sigma: arXiv 2310.16834, definition 3.3, as a sum over y; alpha (..., 1)."""
    num_ids = log_s.shape[-1]
    own = one_hot(x, num_ids).to(log_s.dtype)
    if kernel == "absorb":
        ratios = own * alpha / (1 - alpha)
        terms = log_s.exp() - ratios * log_s + torch.special.xlogy(ratios, ratios) - ratios
        return terms.sum(dim=-1)
    q = alpha * own + (1 - alpha) / num_ids
    ratios = q / q.gather(-1, z[..., None])
    terms = log_s.exp() - ratios * log_s + ratios * (ratios.log() - 1)
    return (terms * (1 - one_hot(z, num_ids))).sum(dim=-1) / num_ids


class TableModel(nn.Module, SEDDGenerationMixin):
    """A table in place of the network: logits of three words at each position of a canvas, at random or exact ones.

    Args:
        kernel: of the noise.
        joint: law of the canvas (3^L,), of which the table then gives the exact scores; None draws it at random.
        is_scaled: see `SEDDConfig.scaled_scores`.
    """

    def __init__(self, kernel, joint=None, is_scaled=True):
        super().__init__()
        self.config = SEDDConfig(
            **{"vocab_size": 10, "max_position_embeddings": 16, "suppress_tokens": list(range(7))},
            **{"pad_token_id": WORDS[0], "eos_token_id": None, "kernel": kernel, "scaled_scores": is_scaled},
        )
        self.generation_config = SEDDGenerationConfig()
        self.device, self.joint = torch.device("cpu"), joint

    def logits(self, z, alpha):
        """Logits (R, L, 3), float64, for canvases z (R, L) of numbers, 3 being the mask, at alpha (R,)."""
        length, kernel, alpha = z.shape[1], self.config.kernel, alpha[:, None, None]
        if self.joint is None:
            generator = torch.Generator().manual_seed(length)
            level, slope = torch.randn((2, 4**length, length, 3), dtype=torch.float64, generator=generator)
            number = (z * 4 ** torch.arange(length - 1, -1, -1)).sum(dim=-1)
            return level[number] + alpha * slope[number]
        x = canvases(length)
        if kernel == "absorb":
            fits = (z[:, None] == x) | (z[:, None] == MASK_NUMBER)
        else:
            fits = (1 - alpha) / 3 + alpha * (z[:, None] == x)
        predicted = torch.empty(*z.shape, 3, dtype=torch.float64)
        for i, word in itertools.product(range(length), range(3)):
            others = [j for j in range(length) if j != i]
            predicted[:, i, word] = (self.joint * fits[..., others].prod(dim=-1))[:, x[:, i] == word].sum(dim=-1)
        predicted = predicted / predicted.sum(dim=-1, keepdim=True)
        if kernel == "absorb":
            log_s = (predicted * alpha / (1 - alpha)).log()
            return log_s - (torch.log(alpha / (1 - alpha)) - np.log(3) if self.config.scaled_scores else 0.0)
        noisy = 3 * alpha * predicted + 1 - alpha
        log_s = (noisy / noisy.gather(-1, z[..., None])).log()
        kappa = 3 * alpha / (1 - alpha)
        return log_s * (1 + kappa) / kappa if self.config.scaled_scores else log_s

    def forward(self, input_ids, attention_mask, alpha, logits_index, head_function=None):
        start = int((input_ids[0] == BOS).nonzero()) + 1
        z = input_ids[:, start:] - WORDS[0]
        z = z.masked_fill(z < 0, MASK_NUMBER)
        logits = torch.full((*input_ids.shape, 10), -torch.inf)
        logits[:, start:, list(WORDS)] = self.logits(z, alpha.double().clamp(1e-12, 1 - 1e-7)).float()
        head = (logits.flatten(0, 1)[logits_index], nn.Identity(), self.config.suppressed_ids, head_function)
        return LanguageModelOutput(**head_fields(*head))


def canvases(length, num=3):
    """All canvases (num^L, L), as numbers of words."""
    return torch.tensor(list(itertools.product(range(num), repeat=length)))


def random_joint(length, seed=0):
    weights = torch.from_numpy(np.random.default_rng(seed).gamma(0.7, size=3**length))
    return weights / weights.sum()


def after_options(predicted, left, options):
    """Predictions (..., 3), up to a factor, of the numbers in `left` after temperature, top-k and top-p."""
    result = torch.zeros_like(predicted)
    for row, weights in zip(result.view(-1, 3), predicted.reshape(-1, 3).tolist(), strict=True):
        total = sum(weights[i] for i in left)
        for i, p in filtered({i: weights[i] / total for i in left}, **options).items():
            row[i] = p
    return result


def scores_after_options(log_s, z, alpha, left, options):
    """log s (..., 3) of uniform noise by a prediction after the options; `left` has all numbers that are not -inf."""
    s = torch.where(one_hot(z, 3) > 0, 1.0, log_s.exp())
    result = torch.zeros_like(s)
    for index in itertools.product(*map(range, z.shape)):
        own = int(z[index])
        # q = factor x s is known of these alone; all of the prediction is among them.
        known = {*left, own}
        factor = (alpha + (1 - alpha) * len(known) / 3) / sum(float(s[index][i]) for i in known)
        p = {i: max(0.0, factor * float(s[index][i]) - (1 - alpha) / 3) for i in left}
        if sum(p.values()) == 0:
            p = {i: float(s[index][i]) for i in left}
        total = sum(p.values())
        p = filtered({i: weight / total for i, weight in p.items()}, **options)
        q = [alpha * p.get(i, 0.0) + (1 - alpha) / 3 for i in range(3)]
        result[index] = torch.tensor([math.log(x / q[own]) for x in q])
    return result


def step_law(log_s, z, alpha_t, alpha_s, kernel, is_exact):
    """Laws (R, L, N + 1) of the tokens at s, the mask last, by matrices: exp(-change Q) s_t x exp(change Q)."""
    eye = torch.eye(4 if kernel == "absorb" else 3, dtype=torch.float64)
    s = torch.cat((log_s.exp(), torch.ones_like(log_s[..., :1])), dim=-1) if kernel == "absorb" else log_s.exp()
    s = torch.where(one_hot(z, len(eye)) > 0, 1.0, s)
    into = torch.zeros(4, 4).double() if kernel == "absorb" else torch.full((3, 3), 1 / 3).double()
    if kernel == "absorb":
        into[:, MASK_NUMBER] = 1.0
    # Q[y, z]: the rate from y to z; an absorbed token stays.
    Q = into - eye
    change = float(np.log(alpha_s / alpha_t))
    forward = torch.linalg.matrix_exp(change * Q)
    if is_exact:
        law = (s @ torch.linalg.matrix_exp(-change * Q)) * forward.T[z]
    else:
        law = change * s * Q.T[z] * (1 - one_hot(z, len(eye)))
        law = law + one_hot(z, len(eye)) * (1 - law.sum(dim=-1, keepdim=True))
    if kernel == "absorb":
        # A clean token stays, and of a mask nothing is left over or missing.
        words = law[..., :3] / law[..., :3].sum(dim=-1, keepdim=True).clamp(min=1)
        rest = 1 - words.sum(dim=-1, keepdim=True)
        law = torch.cat((words, rest), dim=-1)
        law = torch.where((z == MASK_NUMBER)[..., None], law, one_hot(z, 4).double())
    law = law.clamp(min=0)
    return law / law.sum(dim=-1, keepdim=True)


def chain_law(model, length, num_steps, is_exact=True, left=(0, 1, 2), **options):
    """Law of the canvas after `num_steps` even steps of alpha, by ids of the words, of which `left` may be written."""
    is_plain = len(left) == 3 and not options
    kernel, eps = model.config.kernel, model.config.noise_eps
    num = 4 if kernel == "absorb" else 3
    z = canvases(length, num)
    law = torch.zeros(len(z), dtype=torch.float64)
    law[(z == MASK_NUMBER).all(dim=-1) if kernel == "absorb" else slice(None)] = 1.0
    law /= law.sum()
    for step in range(num_steps):
        alpha = torch.full((len(z),), step / num_steps, dtype=torch.float64)
        logits = model.logits(z, alpha.float().double().clamp(1e-12, 1 - 1e-7))
        a_t, a_s = max(step / num_steps, eps), (step + 1) / num_steps
        alpha = torch.full((len(z), 1, 1), a_t, dtype=torch.float64)
        log_s = log_scores(logits, z, alpha, kernel, model.config.scaled_scores)
        if kernel == "uniform" and not is_plain:
            log_s = scores_after_options(log_s, z, a_t, left, options)
        laws = step_law(log_s, z, a_t, a_s, kernel, is_exact)
        if kernel == "absorb":
            # Which word it is, the options change; how many masks go, they do not.
            words = after_options(logits.softmax(dim=-1), left, options)
            goes = 1.0 if step + 1 == num_steps else laws[..., :3].sum(dim=-1, keepdim=True)
            last = torch.cat((words * goes, torch.zeros_like(words[..., :1]) + 1 - goes), dim=-1)
            laws = torch.where((z == MASK_NUMBER)[..., None], last, one_hot(z, 4).double())
        elif step + 1 == num_steps:
            laws = laws * torch.tensor([float(i in left) for i in range(3)])
            laws = laws / laws.sum(dim=-1, keepdim=True)
        law = law @ laws.gather(2, z.T.expand(len(z), -1, -1)).prod(dim=1)
    return {tuple(WORDS[i] for i in row): float(p) for row, p in zip(z.tolist(), law, strict=True) if max(row) < 3}


def exact_nelbo(model, length, num_nodes=80):
    """The bounds (3^L,) for all canvases, by sums over all noisy ones and quadrature over t, dense near both ends."""
    kernel, is_scaled = model.config.kernel, model.config.scaled_scores
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(num_nodes))
    u, weights = (nodes + 1) / 2, weights / 2
    scale = u**2 + (1 - u) ** 2
    z, total = canvases(length, 4 if kernel == "absorb" else 3), torch.zeros(3**length, dtype=torch.float64)
    for t, weight in zip(u**2 / scale, weights * 2 * u * (1 - u) / scale**2, strict=True):
        alpha = (1 - t).expand(len(z), 1, 1)
        log_s = log_scores(model.logits(z, (1 - t).expand(len(z))), z, alpha, kernel, is_scaled)
        for number, x in enumerate(canvases(length)):
            rates = score_entropies(log_s, x.expand_as(z), z, alpha, kernel)
            if kernel == "absorb":
                rates, share = rates * (z == MASK_NUMBER), (1 - t) * (z == x) + t * (z == MASK_NUMBER)
            else:
                share = (1 - t) * (z == x) + t / 3
            # d sigma = d(1 - alpha) / alpha.
            total[number] += weight / (1 - t) * (share.prod(dim=-1) * rates.sum(dim=-1)).sum()
    return total

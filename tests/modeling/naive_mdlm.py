"""The slow twin of masked diffusion."""

import itertools
import math
from functools import cache

import numpy as np
import torch
from torch import nn

from tests.modeling.naive import (
    BOS,
    MASK,
    commit,
    cross_entropies,
    logits_at,
    make_canvas,
    masked_at_random,
    small_model,
)
from xlm_hf.modeling.mdlm import MDLMConfig, MDLMForMaskedDiffusion, MDLMGenerationConfig
from xlm_hf.modeling.mdlm.generation_mdlm import MDLMGenerationMixin
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds
from xlm_hf.modules.vocabulary_head import LanguageModelOutput, head_fields

LADDER = ("gather", "head", "rows")
WORDS = (7, 8, 9)

slow_collation = masked_at_random


def make_model(*args, **options):
    model = small_model(MDLMForMaskedDiffusion, *args, **options)
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            parameter.data.normal_(std=0.3)
    return model


def slow_loss(model, batch, block=None, dense=True):
    """Sum of the weighted cross-entropies of the masked tokens (arXiv 2406.07524, equation 10)."""
    weights = batch.get("loss_weights", batch["weights"])
    return (weights * cross_entropies(model, batch, block, dense, alpha=batch["alpha"]).sum(dim=-1)).sum()


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=(), num_steps=None):
    """The reverse process of the log-linear schedule: a mask goes at a time t ~ U(0, 1), in the step that passes it."""
    all_seeds = row_seeds(seed, len(prompts), prompts.device)
    all_ids, columns = make_canvas(prompts, max_new_tokens, model.config.mask_token_id)
    num_steps = num_steps or max_new_tokens
    times = uniform(all_seeds[:, None], columns, 0)
    for step in range(num_steps):
        masked = all_ids == model.config.mask_token_id
        chosen = masked & (times >= (num_steps - step - 1) / num_steps)
        rows = chosen.any(dim=-1) if "rows" in savings else torch.ones_like(chosen[:, 0])
        if not rows.any():
            continue
        ids, chosen, seeds = all_ids[rows], chosen[rows], all_seeds[rows]
        seen = chosen if "head" in savings else torch.ones_like(chosen)
        logits = logits_at(model, ids, chosen if "head" in savings else None)
        uniforms = uniform(seeds[:, None], step, columns[rows], 1) if do_sample else None
        commit(ids, chosen, seen, logits, uniforms, savings)
        all_ids[rows] = ids
    return all_ids


class TableModel(nn.Module, MDLMGenerationMixin):
    """A table in place of the network: p(word at l | canvas, alpha) over three words.

    Args:
        joint: law of the whole canvas, a dict; the table then holds its exact conditionals. None draws a table at
            random, which is consistent with no joint law.
        uses_time: whether the random table changes with alpha.
    """

    def __init__(self, joint=None, uses_time=False):
        super().__init__()
        self.config = MDLMConfig(vocab_size=10, max_position_embeddings=16, backbone="dit" if uses_time else "rotary")
        self.generation_config = MDLMGenerationConfig()
        self.device = torch.device("cpu")
        self.joint = joint
        self.random_scores = cache(lambda canvas: np.random.default_rng(canvas).normal(size=(2, len(canvas), 3)))
        self.calls = 0

    def table(self, canvas, alpha=None) -> np.ndarray:
        """Probabilities (L, 3) of the words at each position of a canvas, a tuple of ids."""
        if self.joint is not None:
            fits = [
                (x, p) for x, p in self.joint.items() if all(c in (MASK, t) for c, t in zip(canvas, x, strict=True))
            ]
            weights = np.array([[sum(p for x, p in fits if x[i] == w) for w in WORDS] for i in range(len(canvas))])
            return weights / weights.sum(axis=-1, keepdims=True)
        scores, slopes = self.random_scores(canvas)
        weights = np.exp(1.5 * scores + (2.0 * alpha * slopes if self.config.time_conditioning else 0.0))
        return weights / weights.sum(axis=-1, keepdims=True)

    def forward(self, input_ids, attention_mask, alpha, logits_index, head_function=None):
        self.calls += 1
        B, L = input_ids.shape
        logits = torch.full((B * L, 10), -torch.inf)
        rows = {}
        for index in logits_index.tolist():
            row = index // L
            if row not in rows:
                ids = input_ids[row].tolist()
                start = ids.index(BOS) + 1
                with np.errstate(divide="ignore"):
                    rows[row] = start, np.log(self.table(tuple(ids[start:]), float(alpha[row])))
            start, table = rows[row]
            logits[index, list(WORDS)] = torch.from_numpy(table[index % L - start]).float()
        return LanguageModelOutput(**head_fields(logits[logits_index], nn.Identity(), None, head_function))


def random_joint(length, seed=0):
    weights = np.random.default_rng(seed).gamma(0.7, size=3**length)
    return dict(zip(itertools.product(WORDS, repeat=length), weights / weights.sum(), strict=True))


def subsets(items):
    items = list(items)
    return itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(len(items) + 1))


def fill(canvas, positions, table):
    """All ways of writing words at `positions`, each by itself: pairs of the new canvas and its probability."""
    for words in itertools.product(range(3), repeat=len(positions)):
        new, p = list(canvas), 1.0
        for position, word in zip(positions, words, strict=True):
            new[position], p = WORDS[word], p * table[position, word]
        yield tuple(new), p


def mask_probability(schedule, t):
    return t if schedule == "log_linear" else math.sin(math.pi * t / 2)


def process_law(model, length, num_steps, schedule="log_linear", blocks=None, sigma=lambda s, t: 0.0):
    """Law of the canvas after the reverse process on `num_steps` steps a block, from (alpha_s, alpha_t) alone."""
    blocks = blocks or [tuple(range(length))]
    law = {(MASK,) * length: 1.0}
    for number, block in enumerate(blocks):
        later = sum(map(len, blocks[number + 1 :]))
        for step in range(num_steps):
            m_t = mask_probability(schedule, 1 - step / num_steps)
            m_s = mask_probability(schedule, 1 - (step + 1) / num_steps) if step + 1 < num_steps else 0.0
            remask = sigma(1 - m_s, 1 - m_t)
            unmask = (1 - m_s - (1 - remask) * (1 - m_t)) / m_t if m_s > 0 else 1.0
            told = 1 - (m_t * len(block) + later) / length
            new: dict = {}
            for canvas, p in law.items():
                masked = [i for i in block if canvas[i] == MASK]
                written = [i for i in block if canvas[i] != MASK]
                for go in subsets(masked):
                    for back in subsets(written):
                        q = p * unmask ** len(go) * (1 - unmask) ** (len(masked) - len(go))
                        q *= remask ** len(back) * (1 - remask) ** (len(written) - len(back))
                        if q == 0.0:
                            continue
                        for filled, r in fill(canvas, go, model.table(canvas, told)):
                            taken = tuple(MASK if i in back else token for i, token in enumerate(filled))
                            new[taken] = new.get(taken, 0.0) + q * r
            law = new
    return law


def random_order_law(model, length):
    """Law of the canvas when one token after the other is written, every order alike; for a network without time."""
    law = {(MASK,) * length: 1.0}
    for _ in range(length):
        new: dict = {}
        for canvas, p in law.items():
            masked = [i for i in range(length) if canvas[i] == MASK]
            for i in masked:
                for filled, q in fill(canvas, [i], model.table(canvas)):
                    new[filled] = new.get(filled, 0.0) + p * q / len(masked)
        law = new
    return law


def rule_law(model, length, sizes, order):
    """Law of committing by a rule `sizes[i]` positions in step i; the network is told the share that is masked."""
    law = {(MASK,) * length: 1.0}
    for block, k in sizes:
        new: dict = {}
        for canvas, p in law.items():
            table = model.table(canvas, 1 - canvas.count(MASK) / length)
            top = np.sort(table, axis=-1)
            scores = {
                "confidence": top[:, -1],
                "margin": top[:, -1] - top[:, -2],
                "entropy": (table * np.log(table)).sum(-1),
            }[order]
            masked = sorted((i for i in block if canvas[i] == MASK), key=lambda i: -scores[i])
            for x, q in fill(canvas, masked[:k], table):
                new[x] = new.get(x, 0.0) + p * q
        law = new
    return law


def gauss(num, low=0.0, high=1.0):
    nodes, weights = np.polynomial.legendre.leggauss(num)
    return low + (high - low) * (nodes + 1) / 2, weights * (high - low) / 2


def exact_nelbo(model, x, schedule="log_linear", first_time=0.0):
    """The bound for a canvas x, by summing over all sets of masks and quadrature over t in (first_time, 1]."""
    total = 0.0
    for t, weight in zip(*gauss(64, first_time), strict=True):
        r = mask_probability(schedule, t)
        slope = 1.0 if schedule == "log_linear" else math.pi / 2 * math.cos(math.pi * t / 2)
        for masked in subsets(range(len(x))):
            canvas = tuple(MASK if i in masked else token for i, token in enumerate(x))
            table = model.table(canvas, 1 - r)
            nll = -sum(math.log(table[i, WORDS.index(x[i])]) for i in masked)
            total += weight * slope / r * r ** len(masked) * (1 - r) ** (len(x) - len(masked)) * nll
    return total

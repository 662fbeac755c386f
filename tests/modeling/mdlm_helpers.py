"""Slow, plain counterparts of masked diffusion, for its tests: everything is enumerated."""

import itertools
import math
import random
from functools import cache

import numpy as np
import torch
from torch import nn

from xlm_hf.modeling.mdlm import MDLMConfig, MDLMForMaskedDiffusion, MDLMGenerationConfig
from xlm_hf.modeling.mdlm.generation_mdlm import MDLMGenerationMixin
from xlm_hf.modules.vocabulary_head import LanguageModelOutput, head_fields

PAD, MASK, EOS, BOS, FIRST_WORD = 0, 2, 3, 4, 7
WORDS = (7, 8, 9)


class SpecialIds:
    """What the collators read of a tokenizer."""

    pad_token_id, mask_token_id, eos_token_id, bos_token_id, unk_token_id = PAD, MASK, EOS, BOS, 6
    all_special_ids = list(range(FIRST_WORD))

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __len__(self):
        return self.vocab_size


def make_examples(num, vocab_size, max_prompt=6, max_target=8, min_target=0, seed=0):
    rng = random.Random(seed)

    def words(low, high):
        return [rng.randrange(FIRST_WORD, vocab_size) for _ in range(rng.randint(low, high))]

    return [
        {
            "prompt_ids": words(0, max_prompt),
            "target_ids": words(min_target, max_target),
            "example_id": 1000 + i,
            "epoch": 0,
            "position": i,
        }
        for i in range(num)
    ]


def make_model(vocab_size=20, max_position_embeddings=24, **kwargs):
    torch.manual_seed(11)
    config = MDLMConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_position_embeddings,
        suppress_tokens=list(range(FIRST_WORD)),
        initializer_range=0.4,
        **kwargs,
    )
    model = MDLMForMaskedDiffusion(config).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            parameter.data.normal_(std=0.3)
    return model


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
        """Probabilities (L, 3) of the words at each place of a canvas, a tuple of ids."""
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


def fill(canvas, places, table):
    """All ways of writing words at `places`, each by itself: pairs of the new canvas and its probability."""
    for words in itertools.product(range(3), repeat=len(places)):
        new, p = list(canvas), 1.0
        for place, word in zip(places, words, strict=True):
            new[place], p = WORDS[word], p * table[place, word]
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


def slow_loss(logits, batch):
    """The weighted sum of the cross-entropies by a double loop; `logits` (B, L, V)."""
    total, targets = 0.0, iter(batch["target_ids"].tolist())
    weights = batch.get("loss_weights", batch["weights"])
    for b, row in enumerate(batch["input_ids"].tolist()):
        for i, token in enumerate(row):
            if token == MASK:
                log_probabilities = logits[b, i] - logits[b, i].logsumexp(-1)
                total = total - weights[b].double() * log_probabilities[next(targets)]
    return total

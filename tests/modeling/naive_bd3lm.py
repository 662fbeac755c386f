"""Slow, plain counterparts of block diffusion, for its tests: everything is enumerated."""

import itertools
import math
import random
from functools import cache

import numpy as np
import torch
from torch import nn

from xlm_hf.modeling.bd3lm import BD3LMConfig, BD3LMForBlockDiffusion, BD3LMGenerationConfig
from xlm_hf.modeling.bd3lm.generation_bd3lm import BD3LMGenerationMixin
from xlm_hf.modules.vocabulary_head import LanguageModelOutput, head_fields

PAD, MASK, EOS, BOS, FIRST_WORD = 0, 2, 3, 4, 7
WORDS = (7, 8, 9)


class SpecialIds:
    """What the collators read of a tokenizer."""

    pad_token_id, mask_token_id, eos_token_id, bos_token_id, unk_token_id = PAD, MASK, EOS, BOS, 6
    all_special_ids = list(range(FIRST_WORD))

    def __init__(self, vocab_size=20):
        self.vocab_size = vocab_size

    def __len__(self):
        return self.vocab_size


class EndsInAWord(SpecialIds):
    """What the collator appends is then a word of the table."""

    eos_token_id = WORDS[2]


def make_examples(num, vocab_size=20, seed=0, max_target=9):
    rng = random.Random(seed)

    def words(low, high):
        return [rng.randrange(FIRST_WORD, vocab_size) for _ in range(rng.randint(low, high))]

    return [
        {"prompt_ids": words(0, 5), "target_ids": words(0, max_target), "example_id": 50 + i, "epoch": 0, "position": i}
        for i in range(num)
    ]


def make_model(block_length=3, **kwargs):
    torch.manual_seed(11)
    config = BD3LMConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        suppress_tokens=list(range(FIRST_WORD)),
        initializer_range=0.4,
        block_length=block_length,
        **kwargs,
    )
    model = BD3LMForBlockDiffusion(config).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            parameter.data.normal_(std=0.3)
    return model


class TableModel(nn.Module, BD3LMGenerationMixin):
    """A table in place of the network: p(word at l | canvas up to the end of its block) over three words.

    Args:
        block_length: positions of a block.
        joint: law of the whole canvas, a dict; the table then holds its exact conditionals. None draws a table at
            random, which is consistent with no joint law.
    """

    def __init__(self, block_length, joint=None):
        super().__init__()
        self.config = BD3LMConfig(vocab_size=10, max_position_embeddings=16, block_length=block_length)
        self.generation_config = BD3LMGenerationConfig(use_cache=False)
        self.device, self.joint = torch.device("cpu"), joint
        self.table = cache(self._table)

    def _table(self, canvas) -> np.ndarray:
        """Probabilities (l, 3) of the words at each position of the beginning of a canvas, a tuple of ids."""
        if self.joint is None:
            weights = np.exp(1.5 * np.random.default_rng(canvas).normal(size=(len(canvas), 3)))
        else:
            fits = [
                (x, p) for x, p in self.joint.items() if all(c in (MASK, t) for c, t in zip(canvas, x, strict=False))
            ]
            weights = np.array([[sum(p for x, p in fits if x[i] == w) for w in WORDS] for i in range(len(canvas))])
        return weights / weights.sum(axis=-1, keepdims=True)

    def forward(
        self,
        input_ids,
        attention_mask,
        position_ids,
        block_ids,
        is_noisy=None,
        logits_index=None,
        head_function=None,
        cache=None,
    ):
        L, noisy = input_ids.shape[1], torch.ones_like(input_ids) if is_noisy is None else is_noisy.long()
        whole = torch.stack((input_ids, attention_mask.long(), block_ids, noisy, position_ids.expand_as(input_ids)))
        # The few rows that differ.
        distinct, of_row = whole.transpose(0, 1).flatten(1).unique(dim=0, return_inverse=True)
        tables = torch.full((len(distinct), L, 10), -torch.inf)
        for number, row in enumerate(distinct.view(-1, 5, L).tolist()):
            for column, (_, exists, block, of_noisy, position) in enumerate(zip(*row, strict=True)):
                if exists and block and of_noisy:
                    seen = [
                        token
                        for token, there, b, n, _ in zip(*row, strict=True)
                        if there and 0 < b <= block and (is_noisy is None or n == (b == block))
                    ]
                    probabilities = torch.from_numpy(self.table(tuple(seen))[position - 1])
                    tables[number, column, list(WORDS)] = probabilities.log().float()
        logits = tables[of_row[logits_index // L], logits_index % L]
        return LanguageModelOutput(**head_fields(logits, nn.Identity(), None, head_function))


def random_joint(length, seed=0, num_words=3):
    texts = list(itertools.product(WORDS[:num_words], repeat=length))
    weights = np.random.default_rng(seed).gamma(0.7, size=len(texts))
    return dict(zip(texts, weights / weights.sum(), strict=True))


def blocks_of(length, block_length):
    return [tuple(range(i, min(i + block_length, length))) for i in range(0, length, block_length)]


def subsets(items):
    items = list(items)
    return itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(len(items) + 1))


def masked_nll(model, x, block, hidden):
    """-log p of the hidden tokens of a block, each by itself, given the rest of the block and what is before it."""
    seen = tuple(MASK if i in hidden else x[i] for i in range(block[-1] + 1))
    table = model.table(seen)
    return -sum(math.log(table[i, WORDS.index(x[i])]) for i in hidden)


def exact_bound(model, x, block_length, first_time=0.0):
    """The bound for a canvas x, by summing over all sets of masks and quadrature over t in (first_time, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(48)
    times, weights = first_time + (1 - first_time) * (nodes + 1) / 2, weights * (1 - first_time) / 2
    total = 0.0
    for block in blocks_of(len(x), block_length):
        for hidden in subsets(block):
            k, size = len(hidden), len(block)
            if k:
                weight = float((weights * times ** (k - 1) * (1 - times) ** (size - k)).sum())
                total += weight * masked_nll(model, x, block, hidden)
    return total


def fill(canvas, positions, table):
    """All ways of writing words at `positions`, each by itself: pairs of the new canvas and its probability."""
    for words in itertools.product(range(3), repeat=len(positions)):
        new, p = list(canvas), 1.0
        for position, word in zip(positions, words, strict=True):
            new[position], p = WORDS[word], p * table[position, word]
        yield tuple(new), p


def _table_of(model, canvas, block):
    return model.table(canvas[: block[-1] + 1])


def reverse_law(model, length, block_length, num_steps, eta=None):
    """Law of the canvas after `num_steps` steps in each block, alpha_t = 1 - t; with `eta`, ReMDM's "cap"."""
    law = {(MASK,) * length: 1.0}
    for block in blocks_of(length, block_length):
        for step in range(num_steps):
            m_t, m_s = 1 - step / num_steps, 1 - (step + 1) / num_steps
            sigma = 0.0 if eta is None else min(eta, 1.0 if m_t == 1 else min(1.0, m_s / (1 - m_t)))
            go = (m_t - m_s + sigma * (1 - m_t)) / m_t
            new: dict = {}
            for canvas, p in law.items():
                masked = [i for i in block if canvas[i] == MASK]
                written = [i for i in block if canvas[i] != MASK]
                for chosen, back in itertools.product(subsets(masked), subsets(written)):
                    q = p * go ** len(chosen) * (1 - go) ** (len(masked) - len(chosen))
                    q *= sigma ** len(back) * (1 - sigma) ** (len(written) - len(back))
                    for filled, r in fill(canvas, chosen, _table_of(model, canvas, block)) if q > 0 else ():
                        taken = tuple(MASK if i in back else token for i, token in enumerate(filled))
                        new[taken] = new.get(taken, 0.0) + q * r
            law = new
    return law


def one_by_one_law(model, length, block_length, order):
    """Law of the canvas when a block is written token by token, in "random" order or the surest first."""
    law = {(MASK,) * length: 1.0}
    for block in blocks_of(length, block_length):
        for _ in block:
            new: dict = {}
            for canvas, p in law.items():
                table, masked = _table_of(model, canvas, block), [i for i in block if canvas[i] == MASK]
                chosen = masked if order == "random" else [max(masked, key=lambda i: (table[i].max(), -i))]
                for i in chosen:
                    for filled, q in fill(canvas, [i], table):
                        new[filled] = new.get(filled, 0.0) + p * q / len(chosen)
            law = new
    return law

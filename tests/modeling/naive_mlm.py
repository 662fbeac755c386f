"""The slow twin of the masked language model."""

import functools
import itertools
import math

import numpy as np
import torch
from torch import nn

from tests.modeling.naive import (
    EOS,
    MASK,
    PAD,
    UNK,
    commit,
    cross_entropies,
    filtered,
    logits_at,
    make_canvas,
    masked_at_random,
    small_model,
    until_end,
)
from xlm_hf.modeling.mlm import MLMConfig, MLMForMaskedLM
from xlm_hf.modeling.mlm.generation_mlm import MLMGenerationConfig, MLMGenerationMixin
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds
from xlm_hf.modules.vocabulary_head import LanguageModelOutput

LADDER = ("gather", "head")
V = 13
make_model = functools.partial(small_model, MLMForMaskedLM, V, suppress_tokens=list(range(UNK)))

slow_collation = masked_at_random


def slow_loss(model, batch, block=None, dense=True):
    """Sum of the cross-entropies of the masked tokens."""
    return cross_entropies(model, batch, block, dense).sum()


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=(), num_steps=None):
    """The most confident masks first, evenly over `num_steps`."""
    seeds = row_seeds(seed, len(prompts), prompts.device)
    ids, columns = make_canvas(prompts, max_new_tokens, model.config.mask_token_id)
    num_steps = num_steps or max_new_tokens
    for step in range(num_steps):
        masked = ids == model.config.mask_token_id
        k = -(-int(masked[0].sum()) // (num_steps - step))
        if k == 0:
            break
        seen = masked if "head" in savings else torch.ones_like(masked)
        logits = logits_at(model, ids, masked if "head" in savings else None)
        confidence = (logits.softmax(dim=-1) if "gather" in savings else logits.log_softmax(dim=-1).exp()).amax(dim=-1)
        confidence = torch.zeros(ids.shape).masked_scatter(seen, confidence)
        order = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)[:, :k]
        chosen = torch.zeros_like(masked).scatter(-1, order, True)
        commit(ids, chosen, seen, logits, uniform(seeds[:, None], columns, 1) if do_sample else None, savings)
    return ids


class TableModel(nn.Module, MLMGenerationMixin):
    """A table in place of the network: random logits for every state of a canvas of `length` tokens."""

    allowed = (PAD, EOS, 5, 6)

    def __init__(self, length: int = 3, scale: float = 1.5):
        super().__init__()
        self.config = MLMConfig(vocab_size=7, max_position_embeddings=64)
        self.generation_config = MLMGenerationConfig(max_new_tokens=length)
        self.device = torch.device("cpu")
        self.length = length
        self.table = torch.full((7**length, length, 7), -torch.inf)
        draws = np.random.default_rng(length).normal(scale=scale, size=(7**length, length, len(self.allowed)))
        self.table[..., list(self.allowed)] = torch.from_numpy(draws).float()

    def distribution(self, state: tuple[int, ...], position: int) -> dict[int, float]:
        code = sum(token * 7**i for i, token in enumerate(state))
        weights = {v: math.exp(float(self.table[code, position, v])) for v in self.allowed}
        return {v: w / sum(weights.values()) for v, w in weights.items()}

    def forward(self, input_ids, attention_mask, logits_index, head_function):
        rows, L = input_ids.shape
        codes = (input_ids[:, -self.length :] * 7 ** torch.arange(self.length)).sum(dim=-1)
        logits = torch.zeros(rows, L, 7)
        logits[:, -self.length :] = self.table[codes]
        return LanguageModelOutput(head_output=head_function(logits.flatten(0, 1)[logits_index], nn.Identity(), None))


def open_positions(state: tuple[int, ...]) -> list[int]:
    end = state.index(EOS) if EOS in state else len(state)
    return [i for i in range(end) if state[i] == MASK]


def slow_choices(laws: dict[int, dict], config: MLMGenerationConfig, step: int) -> dict[tuple[int, ...], float]:
    """Sets of positions that a step may commit, with their probabilities; `laws` holds the open positions' tokens."""
    p1 = {i: max(law.values()) for i, law in laws.items()}
    margin = {i: p1[i] - sorted(law.values())[-2] for i, law in laws.items()}
    entropy = {i: -sum(p * math.log(p) for p in law.values()) for i, law in laws.items()}
    keys = {"confidence": p1, "margin": margin, "entropy": {i: -h for i, h in entropy.items()}}
    orders = list(itertools.permutations(laws))
    if config.order != "random":
        orders = [tuple(sorted(laws, key=lambda i: (-keys[config.order][i], i)))]
    choices: dict[tuple[int, ...], float] = {}
    for order in orders:
        size = 1
        if config.num_steps:
            size = math.ceil(len(order) / (config.num_steps - step))
        for bound, cost in ((config.entropy_bound, entropy), (config.error_bound, {i: 1 - p for i, p in p1.items()})):
            if bound is not None:
                costs = [[cost[i] for i in order[:n]] for n in range(1, len(order) + 1)]
                size = max(n for n, c in enumerate(costs, 1) if sum(c) - max(c) <= bound)
        chosen = set(order[:size])
        if config.confidence_threshold:
            chosen |= {i for i in order if p1[i] > config.confidence_threshold}
        key = tuple(sorted(chosen))
        choices[key] = choices.get(key, 0.0) + 1 / len(orders)
    return choices


def exact_law(model: TableModel, config: MLMGenerationConfig) -> dict[tuple[int, ...], float]:
    """Law of what is written, up to the end-of-sequence token, by enumerating every path."""
    finished: dict = {}
    states: dict = {(MASK,) * model.length: 1.0}
    for step in itertools.count():
        after: dict = {}
        for state, p in states.items():
            positions = open_positions(state)
            if not positions:
                text = until_end(state)
                finished[text] = finished.get(text, 0.0) + p
                continue
            laws = {i: model.distribution(state, i) for i in positions}
            for chosen, q in slow_choices(laws, config, step).items():
                options = [filtered(laws[i], config.temperature, config.top_k, config.top_p) for i in chosen]
                for tokens in itertools.product(*options):
                    new = list(state)
                    for i, token in zip(chosen, tokens, strict=True):
                        new[i] = token
                    r = math.prod(law[token] for law, token in zip(options, tokens, strict=True))
                    after[tuple(new)] = after.get(tuple(new), 0.0) + p * q * r
        if not after:
            return finished
        states = after
    raise AssertionError

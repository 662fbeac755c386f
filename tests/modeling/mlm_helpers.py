"""Slow, plain counterparts of the masked language model, for its tests."""

import itertools
import math
import random

import numpy as np
import torch
from torch import nn

from xlm_hf.modeling.mlm import MLMConfig, MLMForMaskedLM
from xlm_hf.modeling.mlm.generation_mlm import MLMGenerationConfig, MLMGenerationMixin
from xlm_hf.modules.vocabulary_head import LanguageModelOutput

PAD, CLS, MASK, EOS, BOS, SEP, UNK, FIRST_WORD = range(8)
V = 13


class SpecialIds:
    """What the collators read of a tokenizer."""

    pad_token_id, mask_token_id, bos_token_id, eos_token_id, unk_token_id = PAD, MASK, BOS, EOS, UNK
    all_special_ids = [PAD, CLS, MASK, EOS, BOS, SEP, UNK]

    def __len__(self):
        return V


def make_model(**kwargs):
    torch.manual_seed(0)
    config = MLMConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        suppress_tokens=[PAD, CLS, MASK, EOS, BOS, SEP],
        initializer_range=0.5,
        **kwargs,
    )
    return MLMForMaskedLM(config).eval()


def make_examples(num, max_prompt=6, max_target=8, min_target=0, seed=0):
    rng = random.Random(seed)

    def words(low, high):
        return [rng.randrange(FIRST_WORD, V) for _ in range(rng.randint(low, high))]

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


def slow_loss(logits, batch):
    """The objective as written: a loop over sequences and positions, and one over the vocabulary for the softmax."""
    total = logits.new_zeros(())
    truth = dict(zip(batch["logits_index"].tolist(), batch["target_ids"].tolist(), strict=True))
    B, L = batch["input_ids"].shape
    for b in range(B):
        for i in range(L):
            if batch["attention_mask"][b, i] and batch["input_ids"][b, i] == MASK:
                scores = [logits[b, i, v] for v in range(V) if v not in (CLS, MASK, BOS, SEP)]
                total = total - (logits[b, i, truth[b * L + i]] - torch.stack(scores).logsumexp(0))
    return total


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


def filtered(probabilities: dict, temperature=1.0, top_k=None, top_p=None) -> dict:
    """Temperature, top-k and top-p on a dict of probabilities, by sorting a list."""
    weights = {key: p ** (1 / temperature) for key, p in probabilities.items()}
    total = sum(weights.values())
    ranked = sorted(((w / total, key) for key, w in weights.items()), key=lambda item: -item[0])[:top_k]
    total = sum(p for p, _ in ranked)
    kept, mass = {}, 0.0
    for p, key in ranked:
        if top_p is not None and mass >= top_p:
            break
        kept[key] = p / total
        mass += p / total
    total = sum(kept.values())
    return {key: p / total for key, p in kept.items()}


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
            places = open_positions(state)
            if not places:
                text = state[: state.index(EOS) + 1] if EOS in state else state
                finished[text] = finished.get(text, 0.0) + p
                continue
            laws = {i: model.distribution(state, i) for i in places}
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

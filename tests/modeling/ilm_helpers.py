"""Slow, plain counterparts of the insertion language model, for its tests."""

import itertools
import math
import random

import numpy as np
import torch
from torch import nn

from xlm_hf.modeling.ilm import ILMConfig, ILMOutput
from xlm_hf.modeling.ilm.generation_ilm import ILMGenerationConfig, ILMGenerationMixin

PAD, CLS, BOS, FIRST_WORD = 0, 1, 4, 7


class SpecialIds:
    """What the collators read of a tokenizer."""

    pad_token_id, cls_token_id, bos_token_id = PAD, CLS, BOS
    eos_token_id, mask_token_id, unk_token_id = None, None, None

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


def dense_loss(logits, stop_logits, batch, stop_loss_weight):
    """The objective as written: a dense target over (slot, token), a double loop over both, one sequence at a time."""
    total = 0.0
    B, L = batch["input_ids"].shape
    slot_of_target = batch["slot_index"][batch["target_slots"]]
    for b in range(B):
        n = int(batch["num_dropped"][b])
        if n:
            length = int(batch["attention_mask"][b].sum())
            first_slot = batch["input_ids"][b].tolist().index(BOS)
            counts = torch.zeros(L, logits.shape[-1], dtype=logits.dtype)
            for slot, token in zip(slot_of_target.tolist(), batch["target_ids"].tolist(), strict=True):
                if slot // L == b:
                    counts[slot % L, token] += 1
            assert counts.sum() == n
            # As float32, which the loss object makes of an integer.
            share = 1 / batch["num_dropped"][b]
            cells = [(i, v) for i in range(first_slot, length) for v in range(logits.shape[-1])]
            log_normaliser = torch.stack([logits[b, i, v] for i, v in cells]).logsumexp(0)
            for i, v in cells:
                if counts[i, v]:
                    total = total - counts[i, v] * share * (logits[b, i, v] - log_normaliser)
        stop = stop_logits[b].log_softmax(-1)
        total = total - stop_loss_weight * stop[1 if n else 0]
    return total


class TableModel(nn.Module, ILMGenerationMixin):
    """A table in place of the network: random logits for every sequence over a few words, and a fixed stopping rule."""

    words = (5, 6, 7)

    def __init__(self, stop_at=(), stop_probability=None):
        super().__init__()
        self.stop_probability = stop_probability
        self.config = ILMConfig(vocab_size=8, bos_token_id=BOS, max_position_embeddings=64)
        self.generation_config = ILMGenerationConfig()
        self.device = torch.device("cpu")
        self.stop_at = set(stop_at)

    def table(self, written: tuple[int, ...]) -> np.ndarray:
        logits = np.random.default_rng([len(written), *written]).normal(scale=1.5, size=(len(written) + 1, 8))
        logits[:, :5] = -np.inf
        return logits

    def probability_of_stopping(self, written: tuple[int, ...]) -> float:
        if self.stop_probability is not None:
            return self.stop_probability(written)
        return 0.99 if written in self.stop_at else 0.01

    def forward(self, input_ids, attention_mask, slot_index, head_function):
        rows, L = input_ids.shape
        grid = torch.zeros(rows, L, 8)
        stop_logits = torch.zeros(rows, 2)
        for row in range(rows):
            ids = input_ids[row, attention_mask[row]].tolist()
            written = tuple(ids[ids.index(BOS) + 1 :])
            start = input_ids[row].tolist().index(BOS)
            table = torch.from_numpy(self.table(written)).float()
            grid[row, start : start + len(table)] = table
            p = self.probability_of_stopping(written)
            stop_logits[row] = torch.tensor([math.log(p), math.log1p(-p)])
        drawn = head_function(grid.flatten(0, 1)[slot_index], nn.Identity(), None)
        return ILMOutput(head_output=drawn, stop_logits=stop_logits)


def filtered(probabilities: dict, temperature=1.0, top_k=None, top_p=None) -> dict:
    """Temperature, top-k and top-p on a dict of probabilities, by sorting a list."""
    weights = {key: p ** (1 / temperature) for key, p in probabilities.items() if p > 0}
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


def step_law(model: TableModel, written: tuple[int, ...], config: ILMGenerationConfig, room: int) -> dict:
    """Law of the sequence after one step, by enumerating every draw."""
    table = model.table(written)
    grid = {(i, v): math.exp(table[i, v]) for i in range(len(table)) for v in model.words}
    total = sum(grid.values())
    grid = {cell: p / total for cell, p in grid.items()}
    token_filter = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    joint = config.sampling_method == "joint"
    if joint:
        grid = filtered(grid, **token_filter)
    slots = {i: sum(p for (j, _), p in grid.items() if j == i) for i in range(len(table))}
    if not joint:
        slots = filtered(slots, config.slot_temperature, config.slot_top_k, config.slot_top_p)
    tokens = {}
    for i in slots:
        row = {v: p for (j, v), p in grid.items() if j == i}
        tokens[i] = filtered(row, **token_filter) if not joint else filtered(row)
    law: dict = {}

    def draw(chosen: tuple, probability: float):
        free = {i: p for i, p in slots.items() if p > 0 and all(abs(i - j) > 1 for j, _ in chosen)}
        if len(chosen) == min(config.insertions_per_step, room) or not free:
            new = list(written)
            for slot, token in sorted(chosen, reverse=True):
                new.insert(slot, token)
            law[tuple(new)] = law.get(tuple(new), 0.0) + probability
            return
        for slot, p in free.items():
            for token, q in tokens[slot].items():
                draw((*chosen, (slot, token)), probability * p / sum(free.values()) * q)

    draw((), 1.0)
    return law


def exact_law(model: TableModel, config: ILMGenerationConfig, max_new_tokens: int) -> dict:
    """Law of the finished sequence, by enumerating every path."""
    finished: dict = {}
    open_: dict = {(): 1.0}
    while open_:
        grown: dict = {}
        for written, p in open_.items():
            stop = model.probability_of_stopping(written)
            if config.stopping == "threshold":
                stop = float(stop >= config.stopping_threshold)
            stop = 1.0 if len(written) == max_new_tokens else stop
            finished[written] = finished.get(written, 0.0) + p * stop
            p *= 1 - stop
            if p == 0:
                continue
            for new, q in step_law(model, written, config, max_new_tokens - len(written)).items():
                grown[new] = grown.get(new, 0.0) + p * q
        open_ = grown
    return finished


def all_subsets(length: int, size: int):
    return list(itertools.combinations(range(length), size))

"""The slow twin of the insertion language model."""

import functools
import math

import numpy as np
import torch
from torch import nn

from tests.modeling.naive import BOS, draw, dropped_at_random, filtered, in_grid, make_canvas, padded, small_model
from xlm_hf.modeling.ilm import ILMConfig, ILMForInsertionLM, ILMOutput
from xlm_hf.modeling.ilm.generation_ilm import ILMGenerationConfig, ILMGenerationMixin
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds

LADDER = ("gather", "rows", "width", "head")
slow_collation = dropped_at_random
make_model = functools.partial(small_model, ILMForInsertionLM)


def slow_loss(model, batch, block=None, dense=True, stop_loss_weight=1.0):
    """Sum over the sequences of the mean of -log p(slot, token) over the dropped tokens, plus the stopping loss."""
    ids, mask = padded(batch, block)
    outputs = model(ids, attention_mask=mask)
    rows, columns = in_grid(batch["slot_index"], batch)
    is_slot = torch.zeros(ids.shape, dtype=torch.bool).index_put((rows, columns), torch.tensor(True))
    missing = batch["num_dropped"] > 0
    # A row that lacks nothing has no slots; whatever its softmax runs over, its loss is 0.
    logits = outputs.logits.masked_fill(~(is_slot | ~missing[:, None])[..., None], -torch.inf)
    at = rows[batch["target_slots"]], columns[batch["target_slots"]], batch["target_ids"]
    shares = (1.0 / batch["num_dropped"][at[0]]).to(logits.dtype)
    if dense:
        targets = torch.zeros_like(logits).index_put(at, shares, accumulate=True)
        log_probabilities = logits.flatten(1).log_softmax(dim=-1).view_as(logits).masked_fill(targets == 0, 0.0)
        token_losses = -(targets * log_probabilities).sum(dim=(1, 2))
    else:
        means = logits.new_zeros(len(ids)).index_add(0, at[0], logits[at] * shares)
        token_losses = torch.where(missing, logits.flatten(1).logsumexp(dim=-1) - means, 0.0)
    stop_losses = torch.nn.functional.cross_entropy(outputs.stop_logits, missing.long(), reduction="sum")
    return token_losses.sum() + stop_loss_weight * stop_losses


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=(), stopping_threshold=0.5):
    """One token a step into any slot from the last token of the prompt on, until the stopping head ends the row."""
    B, P = prompts.shape
    seeds = row_seeds(seed, B, prompts.device)
    ids, _columns = make_canvas(prompts, max_new_tokens, model.config.pad_token_id)
    lengths, finished = torch.full((B,), P), torch.zeros(B, dtype=torch.bool)
    for step in range(max_new_tokens + 1):
        rows = (~finished if "rows" in savings else torch.ones_like(finished)).nonzero().squeeze(-1)
        width = int(lengths[rows].max()) if "width" in savings else ids.shape[1]
        seen, ends, columns = ids[rows, :width], lengths[rows, None], torch.arange(width)
        slots = (columns >= P - 1) & (columns < ends)
        index = {"slot_index": slots.flatten().nonzero().squeeze(-1)} if "head" in savings else {}
        outputs = model(seen, attention_mask=columns < ends, **index)
        if stopping_threshold is not None:
            finished[rows] |= outputs.stop_logits.softmax(dim=-1)[:, 0] >= stopping_threshold
        finished |= lengths == ids.shape[1]
        if finished.all():
            break
        if index:
            grid = outputs.logits.new_full((*seen.shape, outputs.logits.shape[-1]), -torch.inf)
            grid[slots] = outputs.logits
        else:
            grid = outputs.logits.masked_fill(~slots[..., None], -torch.inf)
        if "gather" not in savings:
            grid = grid.flatten(1).log_softmax(dim=-1).view_as(grid)
        uniforms = [uniform(seeds[rows], step, 0, n) if do_sample else None for n in (0, 1)]
        slot = draw(grid.logsumexp(dim=-1) if do_sample else grid.amax(dim=-1), uniforms[0])
        token = draw(grid[torch.arange(len(rows)), slot], uniforms[1])
        for row, position, word in zip(rows.tolist(), (slot + 1).tolist(), token.tolist(), strict=True):
            if not finished[row]:
                ids[row, position + 1 :] = ids[row, position:-1].clone()
                ids[row, position] = word
        lengths += (~finished).long()
    return ids


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


def step_law(model: TableModel, written: tuple[int, ...], config: ILMGenerationConfig, capacity: int) -> dict:
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
        if len(chosen) == min(config.insertions_per_step, capacity) or not free:
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

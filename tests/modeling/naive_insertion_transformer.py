"""The slow twin of the Insertion Transformer."""

import functools
import itertools
import math
import random

import numpy as np
import torch
from torch import nn

from tests.modeling.naive import BOS, EOS, PAD, draw, filtered, in_grid, make_canvas, padded, small_model, stack
from xlm_hf.modeling.insertion_transformer import (
    InsertionTransformerConfig,
    InsertionTransformerForInsertionLM,
    InsertionTransformerGenerationConfig,
)
from xlm_hf.modeling.insertion_transformer.generation_insertion_transformer import InsertionTransformerGenerationMixin
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds
from xlm_hf.modules.vocabulary_head import LanguageModelOutput

LADDER = ("gather", "rows", "width", "head")
make_model = functools.partial(small_model, InsertionTransformerForInsertionLM)


def slow_targets(text, is_dropped, temperature=None, goes_on=False):
    """What each slot of a text lacks, slot after slot: a list of (token, weight) for each."""
    slots = [[]]
    for token, dropped in zip(text, is_dropped, strict=True):
        if dropped:
            slots[-1].append(token)
        else:
            slots.append([])
    result = []
    for number, missing in enumerate(slots):
        if missing:
            middle = (len(missing) - 1) / 2
            scores = [-abs(i - middle) / temperature if temperature else 0.0 for i in range(len(missing))]
            shares = [math.exp(score - max(scores)) for score in scores]
            result.append([(token, share / sum(shares)) for token, share in zip(missing, shares, strict=True)])
        else:
            result.append([] if goes_on and number == len(slots) - 1 else [(EOS, 1.0)])
    return result


def slow_loss(model, batch, block=None, dense=True):
    """Sum over the documents, and in each the mean over its slots, of the cross-entropy of what they lack."""
    ids, mask = padded(batch, block)
    logits = model(ids, attention_mask=mask).logits
    rows, columns = in_grid(batch["slot_index"][batch["target_slots"]], batch)
    at, weights = (rows, columns, batch["target_ids"]), batch["target_weights"].to(logits.dtype)
    if not dense:
        return (weights * (logits.logsumexp(dim=-1)[rows, columns] - logits[at])).sum()
    targets = torch.zeros_like(logits).index_put(at, weights, accumulate=True)
    return -(targets * logits.log_softmax(dim=-1).masked_fill(targets == 0, 0.0)).sum()


def slow_collation(examples, vocab_size, dense):
    """Drop n ~ U{0..L} tokens of each target, and note what each slot lacks."""
    rows, entries, weights = [], [], []
    for number, example in enumerate(examples):
        target, prompt = example["target_ids"], [*example["prompt_ids"], BOS]
        dropped = set(random.sample(range(len(target)), random.randint(0, len(target))))
        slots = slow_targets(target, [i in dropped for i in range(len(target))])
        rows.append(prompt + [token for i, token in enumerate(target) if i not in dropped])
        for slot, lacks in enumerate(slots):
            entries += [(number, len(prompt) - 1 + slot, token) for token, _ in lacks]
            weights += [weight / len(slots) for _, weight in lacks]
    ids = stack(rows, PAD)
    batch = {"input_ids": ids, "attention_mask": ids != PAD, "targets": torch.tensor(entries)}
    if dense:
        grid = torch.zeros(*ids.shape, vocab_size)
        batch["targets"] = grid.index_put(tuple(torch.tensor(entries).T), torch.tensor(weights), accumulate=True)
    return batch


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=()):
    """A token into every slot from the last token of the prompt on, until all slots of a row are at their end."""
    B, P = prompts.shape
    seeds, end = row_seeds(seed, B, prompts.device), model.config.eos_token_id
    ids, _columns = make_canvas(prompts, max_new_tokens, model.config.pad_token_id)
    lengths, finished = torch.full((B,), P), torch.zeros(B, dtype=torch.bool)
    for step in itertools.count():
        rows = (~finished if "rows" in savings else torch.ones_like(finished)).nonzero().squeeze(-1)
        width = int(lengths[rows].max()) if "width" in savings else ids.shape[1]
        seen, ends, columns = ids[rows, :width], lengths[rows, None], torch.arange(width)
        slots = (columns >= P - 1) & (columns < ends)
        index = {"logits_index": slots.flatten().nonzero().squeeze(-1)} if "head" in savings else {}
        logits = model(seen, attention_mask=columns < ends, **index).logits
        of_slots = logits if index else logits[slots]
        numbers = uniform(seeds[rows, None], step, columns - (P - 1)) if do_sample else torch.zeros(slots.shape)
        tokens, scores = torch.zeros(slots.shape, dtype=torch.int64), torch.zeros(slots.shape)
        if "gather" in savings:
            tokens[slots] = draw(of_slots, numbers[slots] if do_sample else None)
            chosen = of_slots.gather(1, tokens[slots][:, None])[:, 0]
            scores[slots] = chosen - of_slots.logsumexp(dim=-1)
        else:
            log_probabilities = logits.log_softmax(dim=-1)
            tokens = draw(log_probabilities, numbers if do_sample else None)
            scores = log_probabilities.gather(2, tokens[..., None])[..., 0]
        for r, row in enumerate(rows.tolist()):
            given = [c for c in range(P - 1, int(lengths[row])) if int(tokens[r, c]) != end]
            if finished[row] or not given:
                finished[row] = True
                continue
            best = sorted(given, key=lambda c, r=r: -float(scores[r, c]))[: ids.shape[1] - int(lengths[row])]
            for c in sorted(best, reverse=True):
                ids[row, c + 2 :] = ids[row, c + 1 : -1].clone()
                ids[row, c + 1] = tokens[r, c]
            lengths[row] += len(best)
            finished[row] = lengths[row] == ids.shape[1]
        if finished.all():
            return ids[:, : int(lengths.max())]


class TableModel(nn.Module, InsertionTransformerGenerationMixin):
    """A table in place of the network: random logits for every sequence over a few words and the end."""

    words = (5, 6)

    def __init__(self):
        super().__init__()
        self.config = InsertionTransformerConfig(vocab_size=8, max_position_embeddings=64)
        self.generation_config = InsertionTransformerGenerationConfig()
        self.device = torch.device("cpu")
        self.table = functools.cache(self.logits)

    def logits(self, written: tuple[int, ...]) -> np.ndarray:
        """(len(written) + 1, 8) logits of the slots."""
        logits = np.random.default_rng([len(written), *written]).normal(scale=1.5, size=(len(written) + 1, 8))
        logits[:, [i for i in range(8) if i not in (*self.words, EOS)]] = -np.inf
        return logits

    def forward(self, input_ids, attention_mask, logits_index, head_function):
        grid = torch.zeros(*input_ids.shape, 8)
        for row, start in enumerate((input_ids == BOS).int().argmax(dim=-1).tolist()):
            written = tuple(input_ids[row, start + 1 :][attention_mask[row, start + 1 :]].tolist())
            table = self.table(written)
            grid[row, start : start + len(table)] = torch.from_numpy(table).float()
        drawn = head_function(grid.flatten(0, 1)[logits_index], nn.Identity(), None)
        return LanguageModelOutput(head_output=drawn)


class HalvingModel(TableModel):
    """Knows one text, and the middle of what each slot lacks."""

    text = tuple(range(9, 9 + 15))

    def __init__(self):
        super().__init__()
        self.config.vocab_size = 32

    def forward(self, input_ids, attention_mask, logits_index, head_function):
        grid = torch.full((*input_ids.shape, 32), -5.0)
        for row, start in enumerate((input_ids == BOS).int().argmax(dim=-1).tolist()):
            written = input_ids[row, start + 1 :][attention_mask[row, start + 1 :]].tolist()
            bounds = [-1, *map(self.text.index, written), len(self.text)]
            for slot, (low, high) in enumerate(itertools.pairwise(bounds)):
                grid[row, start + slot, self.text[(low + high) // 2] if high - low > 1 else EOS] = 5.0
        drawn = head_function(grid.flatten(0, 1)[logits_index], nn.Identity(), None)
        return LanguageModelOutput(head_output=drawn)


def step_law(model: TableModel, written: tuple[int, ...], config, capacity: int) -> dict:
    """Law of the sequence after one step, None for the end, by enumerating what every slot may draw."""
    options = []
    for row in model.table(written):
        shifted = {v: row[v] - (config.end_penalty if v == EOS else 0.0) for v in (*model.words, EOS)}
        total = sum(math.exp(x) for x in shifted.values())
        law = {v: math.exp(x) / total for v, x in shifted.items()}
        drawn = filtered(law, config.temperature, config.top_k, config.top_p)
        options.append([(v, p, law[v]) for v, p in drawn.items()])
    result: dict = {}
    for draws in itertools.product(*options):
        probability = math.prod(p for _, p, _ in draws)
        given = [(-score, slot, v) for slot, (v, _, score) in enumerate(draws) if v != EOS]
        given = sorted(given)[: min(config.insertions_per_step or capacity, capacity)]
        new = list(written)
        for _, slot, token in sorted(given, key=lambda item: -item[1]):
            new.insert(slot, token)
        key = tuple(new) if given else None
        result[key] = result.get(key, 0.0) + probability
    return result


def exact_law(model: TableModel, config, max_new_tokens: int) -> dict:
    """Law of the finished sequence, by enumerating every path."""
    finished: dict = {}
    open_: dict = {(): 1.0}
    while open_:
        grown: dict = {}
        for written, p in open_.items():
            if len(written) == max_new_tokens:
                finished[written] = finished.get(written, 0.0) + p
                continue
            for new, q in step_law(model, written, config, max_new_tokens - len(written)).items():
                if new is None:
                    finished[written] = finished.get(written, 0.0) + p * q
                else:
                    grown[new] = grown.get(new, 0.0) + p * q
        open_ = grown
    return finished

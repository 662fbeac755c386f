"""Slow, plain counterparts of flexible masked diffusion, for its tests: everything is enumerated."""

import itertools
import math
import random
from functools import cache

import numpy as np
import torch
from torch import nn

from tests.modeling.naive import draw, grid_of_losses, in_grid, make_canvas, padded, stack, with_targets
from xlm_hf.modeling.flexmdm import FlexMDMConfig, FlexMDMForFlexibleMaskedDiffusion, FlexMDMGenerationConfig
from xlm_hf.modeling.flexmdm.generation_flexmdm import FlexMDMGenerationMixin
from xlm_hf.modeling.flexmdm.modeling_flexmdm import FlexMDMOutput
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.modules.vocabulary_head import head_fields

PAD, MASK, EOS, BOS, FIRST_WORD = 0, 2, 3, 4, 7
WORDS = (7, 8)
VOCABULARY = 9
ABSENT, MASKED, CLEAN = range(3)
LADDER = ("gather", "rows", "width", "head")


def slow_loss(model, batch, block=None, dense=True):
    """Weighted cross-entropies of the masks, and n - c - c log n of the gaps."""
    ids, mask = padded(batch, block)
    outputs = model(ids, attention_mask=mask, times=batch["times"])
    losses = grid_of_losses(outputs.logits, in_grid(batch["logits_index"], batch), batch["target_ids"], dense)
    n, at = outputs.expected_counts, in_grid(batch["gap_index"], batch)
    counts = torch.zeros_like(n).index_put(at, batch["gap_counts"].to(n.dtype))
    is_gap = torch.zeros_like(counts, dtype=torch.bool).index_put(at, torch.tensor(True))
    deviances = (n - counts - torch.special.xlogy(counts, n)).where(is_gap, 0.0)
    return batch["unmasking_weights"] @ losses.sum(dim=1) + batch["insertion_weights"] @ deviances.sum(dim=1)


def slow_collation(examples, vocab_size, dense):
    """At a time t, a token that came at a later time s, uniform in (0, 1), is a mask with probability t / s."""
    rows, labels, gaps = [], [], []
    for example in examples:
        t, row = random.random() ** 2, [*example["prompt_ids"], BOS]
        label, counts = [-100] * len(row), [0] * len(row)
        for token in example["target_ids"]:
            came_at = random.random()
            if came_at < t:
                counts[-1] += 1
                continue
            is_mask = random.random() * came_at < t
            row.append(MASK if is_mask else token)
            label.append(token if is_mask else -100)
            counts.append(0)
        rows.append(row)
        labels.append(label)
        gaps.append(counts)
    return {**with_targets(rows, labels, vocab_size, dense), "gap_counts": stack(gaps, 0)}


def grow(ids, turns_at, rates, prompt, free, seed, step):
    """Insert masks into one row, from the right, by the cumulative rates of its gaps; how many there are."""
    numbers = torch.arange(len(ids) - prompt + 1)
    at_most = torch.special.gammaincc(numbers.double() + 1, rates[-1:])
    num = int((at_most <= uniform(seed, step, 0, 1)).sum())
    below = uniform(seed, step, numbers, 2)[:num] * rates[-1:]
    slots = sorted(torch.searchsorted(rates, below, right=True).tolist())[:free]
    for at in reversed([prompt + slot for slot in slots]):
        for values, new in ((ids, MASK), (turns_at, -1.0)):
            values[at + 1 :] = values[at:-1].clone()
            values[at] = new
    return len(slots)


def commit_due(outputs, is_due, uniforms, savings):
    """Tokens for the masks that are due."""
    if "head" not in savings and "gather" not in savings:
        return draw(outputs.logits.log_softmax(dim=-1), uniforms)[is_due]
    logits = outputs.logits if "head" in savings else outputs.logits[is_due]
    return draw(logits, None if uniforms is None else uniforms[is_due])


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=(), num_steps=None):
    """Tau-leaping: masks that are due become tokens, then as many come into each gap as its Poisson rate says.

    Insertions are made one after the other, from the right.
    """
    (B, P), N = prompts.shape, num_steps or max_new_tokens
    seeds = row_seeds(seed, B, prompts.device)
    ids, columns = make_canvas(prompts, max_new_tokens, model.config.pad_token_id)
    lengths, finished = torch.full((B,), P), torch.zeros(B, dtype=torch.bool)
    turns_at = torch.zeros(ids.shape, dtype=torch.float64)
    for step in range(N + 1):
        now, then = 1 - step / N, max(1 - (step + 1) / N, 0.0)
        due = (ids == MASK) & ((turns_at >= then) | (step == N))
        grows = ~finished & (lengths < ids.shape[1]) & (step < N)
        called = ~finished if "rows" not in savings else ~finished & (due.any(dim=1) | grows | (step == N))
        rows = called.nonzero().squeeze(-1)
        if finished.all() or (not len(rows) and step == N):
            break
        if not len(rows):
            continue
        width = int(lengths[rows].max()) if "width" in savings else ids.shape[1]
        seen, is_due, mask = ids[rows, :width], due[rows, :width], columns[rows, :width] < lengths[rows, None]
        gaps, index = mask & (columns[rows, :width] >= P - 1), {}
        if "head" in savings:
            index = {"logits_index": is_due.flatten().nonzero()[:, 0], "gap_index": gaps.flatten().nonzero()[:, 0]}
        outputs = model(seen, attention_mask=mask, times=torch.full((len(rows),), now), **index)
        expected = outputs.expected_counts
        if index:
            expected = torch.zeros(seen.shape).masked_scatter(gaps, expected)
        uniforms = uniform(seeds[rows, None], step, torch.arange(-P, width - P), 0) if do_sample else None
        ids[rows, :width] = seen.masked_scatter(is_due, commit_due(outputs, is_due, uniforms, savings))
        for row, counts in zip(rows.tolist(), expected.double(), strict=True):
            if grows[row]:
                rates = (counts[P - 1 : lengths[row]] * (now - then) / now).cumsum(dim=0)
                lengths[row] += grow(ids[row], turns_at[row], rates, P, ids.shape[1] - lengths[row], seeds[row], step)
                for column in (turns_at[row] == -1).nonzero().squeeze(-1).tolist():
                    came, turns = (uniform(seeds[row], step, column - P, which) for which in (4, 5))
                    turns_at[row, column] = turns * (then + came * (now - then))
            is_over = then == 0 or lengths[row] == ids.shape[1]
            finished[row] |= step == N or (is_over and not (ids[row] == MASK).any())
    return ids[:, : int(lengths.max())]


class SpecialIds:
    """What the collators read of a tokenizer."""

    pad_token_id, mask_token_id, eos_token_id, bos_token_id, unk_token_id = PAD, MASK, EOS, BOS, 6
    all_special_ids = list(range(FIRST_WORD))

    def __init__(self, vocab_size: int = VOCABULARY):
        self.vocab_size = vocab_size

    def __len__(self):
        return self.vocab_size


class Immediate:
    """An insertion schedule by which everything is there from the start."""

    def mask_probability(self, t):
        return torch.zeros_like(t)

    alpha_prime = mask_probability
    hazard = mask_probability

    def alpha(self, t):
        return torch.ones_like(t)

    inverse = alpha


def random_law(longest=2, seed=1):
    """A law of texts of 0 to `longest` words."""
    texts = [text for length in range(longest + 1) for text in itertools.product(WORDS, repeat=length)]
    return dict(zip(texts, np.random.default_rng(seed).dirichlet(np.ones(len(texts)) * 0.8), strict=True))


def gauss(num):
    """Nodes and weights of a quadrature over (0, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    return (nodes + 1) / 2, weights / 2


def shares(t, insertion="linear", unmasking="linear"):
    """Probabilities that a token is absent, a mask and clean at time t, by quadrature over the time when it came."""
    insertion = insertion if isinstance(insertion, Immediate) else make_schedule(insertion)
    unmasking = make_schedule(unmasking)
    t = torch.as_tensor(t, dtype=torch.float64)
    absent = float(insertion.mask_probability(t))
    nodes, weights = gauss(200)
    # Of the tokens that came the share of the schedule is uniform; s^2 keeps the quadrature good at its end.
    share = torch.from_numpy(absent + (1 - absent) * nodes**2)
    of_nodes = weights * 2 * nodes * (1 - absent)
    came_at = insertion.inverse(1 - share)
    masked = float(
        (torch.from_numpy(of_nodes) * unmasking.mask_probability(t) / unmasking.mask_probability(came_at)).sum()
    )
    return absent, masked, 1 - absent - masked


def linear_shares(t):
    """The same in closed form, for two linear schedules."""
    masked = -t * math.log(t) if t > 0 else 0.0
    return t, masked, 1 - t - masked


def states(text, probabilities):
    """Every state of a text: what is there, the numbers missing in the gaps, masks with their words, probability."""
    for kinds in itertools.product(range(3), repeat=len(text)):
        there, gaps, hidden, p = [], [0], [], 1.0
        for kind, word in zip(kinds, text, strict=True):
            p *= probabilities[kind]
            if kind == ABSENT:
                gaps[-1] += 1
                continue
            if kind == MASKED:
                hidden.append((len(there), word))
            there.append(MASK if kind == MASKED else word)
            gaps.append(0)
        if p > 0:
            yield tuple(there), gaps, hidden, p


class ExactTables:
    """The exact conditionals of a law over texts: E[count | x_t, t] and p(word | x_t, t)."""

    def __init__(self, law, shares_at=linear_shares):
        self.law, self.shares_at = law, shares_at
        self.at = cache(self._at)

    def _at(self, t):
        counts, words, mass = {}, {}, {}
        for text, p in self.law.items():
            for there, gaps, hidden, q in states(text, self.shares_at(t)):
                mass[there] = mass.get(there, 0.0) + p * q
                counts[there] = counts.get(there, 0.0) + p * q * np.array(gaps, float)
                table = words.setdefault(there, np.zeros((len(there), len(WORDS))))
                for i, word in hidden:
                    table[i, WORDS.index(word)] += p * q
        for there in mass:
            counts[there] = counts[there] / mass[there]
            words[there] = words[there] / np.maximum(words[there].sum(axis=-1, keepdims=True), 1e-300)
        return counts, words

    def tables(self, there, t):
        """Expected counts (n + 1,) and probabilities of the words (n, 2) for a state."""
        # Where nothing is missing any more: the limit.
        counts, words = self.at(max(t, 1e-15))
        if there not in counts:
            # A longer state than any text has: the discretised sampler gets there.
            return np.zeros(len(there) + 1), np.full((len(there), len(WORDS)), 1 / len(WORDS))
        return counts[there] * (t > 0), words[there]


class RandomTables:
    """Random conditionals, consistent with no law."""

    def tables(self, there, t):
        """See `ExactTables`."""
        rng = np.random.default_rng([len(there), *there])
        rates, words = rng.gamma(1.0, size=len(there) + 1), rng.dirichlet(np.ones(len(WORDS)), size=len(there))
        return rates * t * (1.5 - t), words


class TableModel(nn.Module, FlexMDMGenerationMixin):
    """Tables in place of the network."""

    def __init__(self, tables, **options):
        super().__init__()
        self.config = FlexMDMConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **options)
        self.generation_config = FlexMDMGenerationConfig()
        self.device = torch.device("cpu")
        self.insertion_schedule = make_schedule(self.config.insertion_schedule)
        self.unmasking_schedule = make_schedule(self.config.unmasking_schedule)
        self.tables = tables
        self.count_probabilities = None

    def forward(self, input_ids, attention_mask, times, logits_index, gap_index, head_function=None):
        # Many rows are alike: each is looked up once.
        columns = (times[:, None].double(), attention_mask.double(), input_ids.double())
        rows, which = torch.unique(torch.cat(columns, dim=1), dim=0, return_inverse=True)
        L, R = input_ids.shape[1], len(rows)
        logits = torch.full((R, L, VOCABULARY), -torch.inf, dtype=torch.float64)
        expected = torch.zeros(R, L, dtype=torch.float64)
        for row, (t, *values) in enumerate(rows.tolist()):
            ids, present = values[L:], int(sum(values[:L]))
            start = ids.index(BOS) + 1
            there = tuple(map(int, ids[start : L if values[L - 1] else values[:L].index(0.0, start)]))
            assert present >= len(there)
            counts, words = self.tables.tables(there, t)
            expected[row, start - 1 : start + len(there)] = torch.from_numpy(counts)
            with np.errstate(divide="ignore"):
                found = torch.from_numpy(np.log(words)).reshape(-1, len(WORDS))
            logits[row, start : start + len(there), list(WORDS)] = found
        logits, expected = logits[which].flatten(0, 1), expected[which].flatten()
        count_logits = None
        if self.count_probabilities is not None:
            count_logits = self.count_probabilities(expected[gap_index]).log()
        return FlexMDMOutput(
            **head_fields(logits[logits_index], nn.Identity(), None, head_function),
            expected_counts=expected[gap_index],
            count_logits=count_logits,
        )


def exact_bound(tables, text, shares_at=linear_shares, hazards=lambda t: (1 / t, 1 / t), num=40):
    """The bound for a text, by summing over its states and quadrature over v in t = v^4."""
    total = 0.0
    for v, weight in zip(*gauss(num), strict=True):
        t = v**4
        for_masks, for_gaps = hazards(t)
        for there, gaps, hidden, p in states(text, shares_at(t)):
            counts, words = tables.tables(there, t)
            nll = -sum(math.log(words[i, WORDS.index(word)]) for i, word in hidden)
            deviance = sum(n - c - (c * math.log(n) if c else 0.0) for n, c in zip(counts, gaps, strict=True))
            total += weight * 4 * v**3 * p * (for_masks * nll + for_gaps * deviance)
    return total


def make_model(**kwargs):
    """A tiny network in which everything matters."""
    torch.manual_seed(11)
    options = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"max_position_embeddings": 24, "suppress_tokens": list(range(FIRST_WORD)), "initializer_range": 0.4}
    model = FlexMDMForFlexibleMaskedDiffusion(FlexMDMConfig(**options | kwargs)).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "time_token.projection" in name:
            parameter.data.normal_(std=0.3)
    # A rate near 1 in every gap: enough comes, and not too much.
    if model.config.gap_head == "rate":
        model.gap_head.classifier.weight.data.mul_(0.1)
        model.gap_head.classifier.bias.data.fill_(1.5)
    return model

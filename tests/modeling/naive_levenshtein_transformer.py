"""The slow twin of the Levenshtein Transformer."""

import functools
import itertools
import math
import random

import numpy as np
import torch
from torch import nn
from torch.nn.functional import logsigmoid

from tests.modeling.naive import BOS, MASK, PAD, draw, filtered, grid_of_losses, in_grid, padded, small_model, stack
from xlm_hf.modeling.levenshtein_transformer import (
    LevenshteinTransformerConfig,
    LevenshteinTransformerForEditLM,
    LevenshteinTransformerGenerationConfig,
)
from xlm_hf.modeling.levenshtein_transformer.generation_levenshtein_transformer import (
    LevenshteinTransformerGenerationMixin,
)
from xlm_hf.modeling.levenshtein_transformer.modeling_levenshtein_transformer import LevenshteinTransformerOutput
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds
from xlm_hf.modules.vocabulary_head import head_fields

LADDER = ("gather", "rows", "width", "head")
make_model = functools.partial(small_model, LevenshteinTransformerForEditLM, max_placeholders=5)


def num_common(source, target):
    """Length of a longest common subsequence, by trying every subsequence of the source."""
    for size in range(min(len(source), len(target)), 0, -1):
        for chosen in itertools.combinations(source, size):
            rest = iter(target)
            if all(token in rest for token in chosen):
                return size
    return 0


def oracle(source, target):
    """Which tokens stay in the source, and which of the target need not be inserted: with the fewest edits.

    From the end on, an insertion is made where it is one of the fewest edits, or else a deletion.
    """

    @functools.cache
    def edits(i, j):
        if i == 0 or j == 0:
            return i + j
        kept = edits(i - 1, j - 1) if source[i - 1] == target[j - 1] else math.inf
        return min(edits(i - 1, j) + 1, edits(i, j - 1) + 1, kept)

    stays, is_there, i, j = [False] * len(source), [False] * len(target), len(source), len(target)
    while i or j:
        if j and edits(i, j - 1) < edits(i, j):
            j -= 1
        elif i and edits(i - 1, j) < edits(i, j):
            i -= 1
        else:
            i, j = i - 1, j - 1
            stays[i] = is_there[j] = True
    return stays, is_there


def gap_counts(is_missing):
    """How many tokens are missing in each gap between those of a text that are there."""
    counts = [0]
    for missing in is_missing:
        if missing:
            counts[-1] += 1
        else:
            counts.append(0)
    return counts


def slow_loss(model, batch, block=None, dense=True):
    """Three cross-entropies: numbers of placeholders, their tokens, and what is wrong once they are filled."""
    ids, mask = padded(batch, block)
    kept = {"input_ids": batch["kept_ids"], "attention_mask": batch["kept_mask"]}
    kept_ids, kept_mask = padded(kept, block)
    scores = model(kept_ids, attention_mask=kept_mask).placeholder_logits.log_softmax(dim=-1)
    is_known = batch["gap_counts"] >= 0
    counts = batch["gap_counts"][is_known].clamp(max=scores.shape[-1] - 1)
    rows, columns = in_grid(batch["gap_index"][is_known], batch)
    loss = -scores[rows, columns, counts].sum()

    logits, at = model(ids, attention_mask=mask).logits, in_grid(batch["logits_index"], batch)
    loss = loss + grid_of_losses(logits, at, batch["target_ids"], dense).sum()

    edited, edited_mask = ids.clone(), mask
    if "edited_ids" in batch:
        third = {"input_ids": batch["edited_ids"].clone(), "attention_mask": batch["edited_mask"]}
        edited, edited_mask = padded(third, block)
    for row, column in zip(*(x.tolist() for x in at), strict=True):
        if edited[row, column] == MASK:
            edited[row, column] = logits[row, column].argmax()
    scores = model(edited, attention_mask=edited_mask).deletion_logits
    rows, columns = in_grid(batch["token_index"], batch)
    for document in range(len(batch["sequence_tokens"])):
        own = batch["token_documents"] == document
        tokens = edited[rows[own], columns[own]].tolist()
        stays, _ = oracle(tokens, batch["text_ids"][batch["text_documents"] == document].tolist())
        signs = torch.tensor([1.0 if stay else -1.0 for stay in stays], dtype=scores.dtype)
        loss = loss - logsigmoid(-signs * scores[rows[own], columns[own]]).sum()
    return loss


def slow_collation(examples, vocab_size, dense):
    """The views of a text that lacks n ~ U{0..L} tokens: without them, and with placeholders."""
    kept, filled, counts, entries = [], [], [], []
    for number, example in enumerate(examples):
        target, prompt = example["target_ids"], [*example["prompt_ids"], BOS]
        missing = set(random.sample(range(len(target)), random.randint(0, len(target))))
        kept.append(prompt + [token for i, token in enumerate(target) if i not in missing])
        filled.append(prompt + [MASK if i in missing else token for i, token in enumerate(target)])
        counts.append(gap_counts([i in missing for i in range(len(target))]))
        entries += [(number, len(prompt) + i, target[i]) for i in sorted(missing)]
    ids, views = stack(filled, PAD), stack(kept, PAD)
    batch = {"input_ids": ids, "attention_mask": ids != PAD, "kept_ids": views, "kept_mask": views != PAD}
    batch |= {"counts": stack(counts, -100), "targets": torch.tensor(entries)}
    if dense:
        grid = torch.zeros(*ids.shape, vocab_size)
        batch["targets"] = grid.index_put(tuple(torch.tensor(entries).T), torch.ones(()), accumulate=True)
    return batch


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=()):
    """Rounds of deletions, placeholders and tokens, text by text, until a round changes nothing."""
    (B, P), is_open = prompts.shape, [True] * len(prompts)
    seeds, texts, before = row_seeds(seed, B, prompts.device), [[] for _ in range(B)], None
    for step in range(3 * model.generation_config.max_rounds):
        phase, rows = step % 3, [row for row in range(B) if is_open[row] or "rows" not in savings]
        before = [list(text) for text in texts] if phase == 0 else before
        if not rows:
            break
        width = max(len(texts[row]) for row in rows) if "width" in savings else max_new_tokens
        written = torch.tensor([texts[row] + [PAD] * (width - len(texts[row])) for row in rows]).view(len(rows), width)
        ids, columns = torch.cat((prompts[rows], written.long()), dim=1), torch.arange(P + width)
        mask = columns < torch.tensor([[P + len(texts[row])] for row in rows])
        wanted = (mask & (columns >= P), mask & (columns >= P - 1), ids == MASK)[phase]
        name = ("token_index", "gap_index", "logits_index")[phase]
        index = {name: wanted.flatten().nonzero().squeeze(-1)} if "head" in savings else {}
        outputs = model(ids, attention_mask=mask, **index)
        found = (outputs.deletion_logits, outputs.placeholder_logits, outputs.logits)[phase]
        if index:
            found = found.new_zeros(*ids.shape, *found.shape[1:]).index_put((wanted,), found)
        if phase == 2:
            uniforms = uniform(seeds[rows, None], step, columns - P) if do_sample else None
            if "gather" in savings:
                drawn = draw(found[wanted], None if uniforms is None else uniforms[wanted])
                found = torch.zeros_like(ids).masked_scatter(wanted, drawn)
            else:
                found = draw(found.log_softmax(dim=-1), uniforms)
        for row, scores in zip(rows, found, strict=True):
            if not is_open[row]:
                continue
            text, scores = texts[row], scores[P - (phase == 1) :]
            if phase == 0:
                texts[row] = [token for token, score in zip(text, scores.tolist(), strict=False) if score <= 0]
            elif phase == 1:
                counts = scores.argmax(dim=-1).tolist()
                texts[row] = with_placeholders(text, counts[: len(text) + 1], max_new_tokens)
            else:
                texts[row] = [new if old == MASK else old for old, new in zip(text, scores.tolist(), strict=False)]
            is_open[row] = phase == 0 or texts[row] != before[row]
    return torch.cat((prompts, stack(texts, PAD).long()), dim=1)


def with_placeholders(text, counts, capacity):
    """The text with as many masks in its gaps; of those that exceed the capacity the last are left out."""
    free, row = capacity - len(text), []
    for number, count in enumerate(counts):
        row += [MASK] * min(count, free) + list(text[number : number + 1])
        free -= min(count, free)
    return row


class TableModel(nn.Module, LevenshteinTransformerGenerationMixin):
    """A table in place of the network: random scores for every sequence over a few words."""

    words = (8, 9)

    def __init__(self, **options):
        super().__init__()
        self.config = LevenshteinTransformerConfig(
            vocab_size=10, max_position_embeddings=64, suppress_tokens=list(range(8)), max_placeholders=2
        )
        self.generation_config = LevenshteinTransformerGenerationConfig(**options)
        self.device = torch.device("cpu")
        self.table = functools.cache(self.scores)

    def scores(self, text):
        """Of a text of n tokens: deletion logits (n,), placeholder logits (n + 1, 3), logits (n, 10)."""
        # Of these tables every start leads to several texts, of one length or another, in some rounds.
        rng, n = np.random.default_rng([9, len(text), *text]), len(text)
        deletions, logits, counts = rng.normal(size=n), rng.normal(size=(n, 10)), rng.normal(size=(n + 1, 3))
        logits[:, [i for i in range(10) if i not in self.words]] = -np.inf
        return deletions, counts, logits

    def forward(
        self, input_ids, attention_mask, token_index=None, gap_index=None, logits_index=None, head_function=None
    ):
        B, L = input_ids.shape
        grids = [torch.zeros(B, L, *shape) for shape in ((), (3,), (10,))]
        for row, start in enumerate((input_ids == BOS).int().argmax(dim=-1).tolist()):
            text = tuple(input_ids[row, start + 1 :][attention_mask[row, start + 1 :]].tolist())
            for grid, values, first in zip(grids, self.table(text), (start + 1, start, start + 1), strict=True):
                grid[row, first : first + len(values)] = torch.from_numpy(values).float()
        fields = {}
        if token_index is not None:
            fields["deletion_logits"] = grids[0].flatten()[token_index]
        if gap_index is not None:
            fields["placeholder_logits"] = grids[1].flatten(0, 1)[gap_index]
        if logits_index is not None:
            fields.update(head_fields(grids[2].flatten(0, 1)[logits_index], nn.Identity(), None, head_function))
        return LevenshteinTransformerOutput(**fields)


def exact_law(model, config, capacity, start=()):
    """Law of the finished text, by enumerating what the placeholders of every round may become."""
    law, texts = {}, {tuple(start): 1.0}
    for number in range(config.max_rounds):
        after = {}
        for text, p in texts.items():
            kept = tuple(token for token, score in zip(text, model.table(text)[0], strict=True) if score <= 0)
            canvas = tuple(with_placeholders(kept, model.table(kept)[1].argmax(axis=-1), capacity))
            choices = []
            for token, row in zip(canvas, model.table(canvas)[2], strict=True):
                weights = {v: math.exp(row[v]) for v in model.words}
                total = sum(weights.values())
                drawn = filtered(
                    {v: w / total for v, w in weights.items()}, config.temperature, config.top_k, config.top_p
                )
                choices.append(drawn if token == MASK else {token: 1.0})
            for tokens in itertools.product(*choices):
                q = math.prod(choice[token] for choice, token in zip(choices, tokens, strict=True))
                ends = tokens == text or number + 1 == config.max_rounds
                (law if ends else after).setdefault(tokens, 0.0)
                (law if ends else after)[tokens] += p * q
        texts = after
    return law

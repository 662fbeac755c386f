"""The slow twin of the left-to-right language model."""

import functools
import itertools
import math

import numpy as np
import torch
from torch import nn

from tests.modeling.naive import (
    BOS,
    EOS,
    PAD,
    cross_entropies,
    draw,
    filtered,
    logits_at,
    make_canvas,
    small_model,
    with_targets,
)
from xlm_hf.modeling.arlm import ARLMConfig, ARLMForCausalLM
from xlm_hf.modeling.arlm.modeling_arlm import ARLMOutput
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds
from xlm_hf.modules.vocabulary_head import head_fields

LADDER = ("gather", "width", "head")
make_model = functools.partial(small_model, ARLMForCausalLM, max_position_embeddings=32)


def slow_loss(model, batch, block=None, dense=True):
    """Sum of the cross-entropies of the next tokens."""
    return cross_entropies(model, batch, block, dense).sum()


def slow_collation(examples, vocab_size, dense):
    """Nothing is corrupted."""
    rows = [[*e["prompt_ids"], BOS, *e["target_ids"]] for e in examples]
    labels = [[-100] * len(e["prompt_ids"]) + [*e["target_ids"], EOS] for e in examples]
    return with_targets(rows, labels, vocab_size, dense)


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=()):
    """One token after the other, every step from the start."""
    seeds = row_seeds(seed, len(prompts), prompts.device)
    ids, columns = make_canvas(prompts, max_new_tokens, model.config.pad_token_id)
    for step in range(max_new_tokens):
        end = prompts.shape[1] + step
        seen = ids[:, :end] if "width" in savings else ids
        last = columns[:, : seen.shape[1]] == end - 1
        logits = logits_at(model, seen, last if "head" in savings else None)
        if "gather" not in savings:
            logits = logits.log_softmax(dim=-1)
        logits = logits if "head" in savings else logits[:, end - 1]
        ids[:, end] = draw(logits, uniform(seeds, step) if do_sample else None)
    return ids


class TableModel(ARLMForCausalLM):
    """A table in place of the network: the exact conditionals of a random law over the texts of few words.

    The law is over all texts of at most `longest` of the `words`, each with a probability of its own; what the model
    says after a prefix is found by summing over all texts that begin with it.
    """

    words = (5, 6, 7)

    def __init__(self, longest=3, seed=0):
        super().__init__(
            ARLMConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1, pad_token_id=PAD)
        )
        self.generation_config.return_dict_in_generate = True
        texts = [text for n in range(longest + 1) for text in itertools.product(self.words, repeat=n)]
        weights = np.random.default_rng(seed).exponential(size=len(texts)) ** 2
        self.law = {(*text, EOS): float(p) for text, p in zip(texts, weights / weights.sum(), strict=True)}
        self.conditional = functools.cache(self.conditional)

    def conditional(self, prefix: tuple[int, ...]) -> dict[int, float]:
        """p(next token | prefix), by enumeration."""
        following: dict[int, float] = {}
        for text, p in self.law.items():
            if text[: len(prefix)] == prefix and len(text) > len(prefix):
                following[text[len(prefix)]] = following.get(text[len(prefix)], 0.0) + p
        total = sum(following.values())
        return {token: p / total for token, p in following.items()}

    def forward(
        self, input_ids, attention_mask=None, logits_index=None, logits_to_keep=0, head_function=None, **kwargs
    ):
        rows, L = input_ids.shape
        positions = range(rows * L) if logits_index is None else logits_index.tolist()
        if logits_to_keep:
            positions = [position for position in positions if position % L >= L - logits_to_keep]
        logits = torch.full((len(positions), 8), -torch.inf)
        logits[:, EOS] = 0.0
        ids = input_ids.tolist()
        for number, position in enumerate(positions):
            row = ids[position // L][: position % L + 1]
            # Behind the end of a text, and before [BOS], anything will do.
            if BOS in row and EOS not in row:
                for token, p in self.conditional(tuple(row[row.index(BOS) + 1 :])).items():
                    logits[number, token] = math.log(p)
                if EOS not in self.conditional(tuple(row[row.index(BOS) + 1 :])):
                    logits[number, EOS] = -torch.inf
        if logits_index is None:
            logits = logits.view(rows, -1, 8)
        return ARLMOutput(**head_fields(logits, nn.Identity(), None, head_function))


def exact_law(model: TableModel, max_new_tokens: int, **filters) -> dict:
    """Law of what is written, by enumerating every path."""
    finished: dict = {}
    open_: dict = {(): 1.0}
    for _ in range(max_new_tokens):
        grown: dict = {}
        for prefix, p in open_.items():
            for token, q in filtered(model.conditional(prefix), **filters).items():
                (finished if token == EOS else grown)[(*prefix, token)] = p * q
        open_ = grown
    return {**finished, **open_}

"""Slow, plain counterparts of the left-to-right language model, for its tests."""

import functools
import itertools
import math
import random

import numpy as np
import torch
from torch import nn

from xlm_hf.modeling.arlm import ARLMConfig, ARLMForCausalLM
from xlm_hf.modeling.arlm.modeling_arlm import ARLMOutput
from xlm_hf.modules.vocabulary_head import head_fields

PAD, EOS, BOS, FIRST_WORD = 0, 3, 4, 7


class SpecialIds:
    """What the collators read of a tokenizer."""

    pad_token_id, eos_token_id, bos_token_id, mask_token_id = PAD, EOS, BOS, None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __len__(self):
        return self.vocab_size


def make_examples(num, vocab_size, max_prompt=6, max_target=8, seed=0):
    rng = random.Random(seed)

    def words(high):
        return [rng.randrange(FIRST_WORD, vocab_size) for _ in range(rng.randint(0, high))]

    return [
        {"prompt_ids": words(max_prompt), "target_ids": words(max_target), "example_id": 1000 + i} for i in range(num)
    ]


def make_model(vocab_size=20, **kwargs):
    torch.manual_seed(11)
    config = ARLMConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "suppress_tokens": list(range(FIRST_WORD)),
            "initializer_range": 0.4,
            **kwargs,
        }
    )
    return ARLMForCausalLM(config).eval()


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
        places = range(rows * L) if logits_index is None else logits_index.tolist()
        if logits_to_keep:
            places = [place for place in places if place % L >= L - logits_to_keep]
        logits = torch.full((len(places), 8), -torch.inf)
        logits[:, EOS] = 0.0
        ids = input_ids.tolist()
        for number, place in enumerate(places):
            row = ids[place // L][: place % L + 1]
            # Behind the end of a text, and before [BOS], anything will do.
            if BOS in row and EOS not in row:
                for token, p in self.conditional(tuple(row[row.index(BOS) + 1 :])).items():
                    logits[number, token] = math.log(p)
                if EOS not in self.conditional(tuple(row[row.index(BOS) + 1 :])):
                    logits[number, EOS] = -torch.inf
        if logits_index is None:
            logits = logits.view(rows, -1, 8)
        return ARLMOutput(**head_fields(logits, nn.Identity(), None, head_function))


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


def batch_of(prompts, side="left"):
    rows = [[*prompt, BOS] for prompt in prompts]
    width = max(map(len, rows))
    padded = [[PAD] * (width - len(r)) + r if side == "left" else r + [PAD] * (width - len(r)) for r in rows]
    return torch.tensor(padded)


def written(output, prompt_width):
    """What each row wrote, `[EOS]` included."""
    return [tuple(t for t in row if t != PAD) for row in output.sequences[:, prompt_width:].tolist()]

"""Collation as a loop over the rows: the same corruptions, drawn from Python's generator, in lists.

`dense` adds what the dense losses are given: targets of the size of the logits.
"""

import random

import torch
from torch.nn.functional import one_hot

PAD, CLS, MASK, EOS, BOS = 0, 1, 2, 3, 4


def _stack(rows: list[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def insertion(examples: list[dict], vocab_size: int, dense: bool) -> dict[str, torch.Tensor]:
    """Drop n ~ U{0..L} tokens of each target, and note for each which kept token it stood behind."""
    rows, entries = [], []
    for number, example in enumerate(examples):
        target, prompt = example["target_ids"], [CLS, *example["prompt_ids"], BOS]
        dropped = set(random.sample(range(len(target)), random.randint(0, len(target))))
        row = list(prompt)
        for place, token in enumerate(target):
            if place in dropped:
                entries.append((number, len(row) - 1, token))
            else:
                row.append(token)
        rows.append(row)
    ids = _stack(rows, PAD)
    batch = {"input_ids": ids, "attention_mask": ids != PAD, "targets": torch.tensor(entries)}
    if dense:
        grid = torch.zeros(*ids.shape, vocab_size)
        batch["targets"] = grid.index_put(tuple(torch.tensor(entries).T), torch.ones(()), accumulate=True)
    return batch


def masking(examples: list[dict], vocab_size: int, dense: bool) -> dict[str, torch.Tensor]:
    """Mask each token of a target with probability t ~ U(0, 1)."""
    rows, labels = [], []
    for example in examples:
        share, prompt = random.random(), [*example["prompt_ids"], BOS]
        row, label = list(prompt), [-100] * len(prompt)
        for token in [*example["target_ids"], EOS]:
            masked = random.random() < share
            row.append(MASK if masked else token)
            label.append(token if masked else -100)
        rows.append(row)
        labels.append(label)
    return _with_targets(rows, labels, vocab_size, dense)


def left_to_right(examples: list[dict], vocab_size: int, dense: bool) -> dict[str, torch.Tensor]:
    """Nothing is corrupted."""
    rows = [[*e["prompt_ids"], BOS, *e["target_ids"]] for e in examples]
    labels = [[-100] * len(e["prompt_ids"]) + [*e["target_ids"], EOS] for e in examples]
    return _with_targets(rows, labels, vocab_size, dense)


def _with_targets(rows, labels, vocab_size: int, dense: bool) -> dict[str, torch.Tensor]:
    ids, labels = _stack(rows, PAD), _stack(labels, -100)
    if dense:
        labels = one_hot(labels.clamp(min=0), vocab_size).float() * (labels >= 0)[..., None]
    return {"input_ids": ids, "attention_mask": ids != PAD, "targets": labels}


COLLATIONS = {"ilm": insertion, "arlm": left_to_right, "mlm": masking, "mdlm": masking}

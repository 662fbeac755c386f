"""What the slow twins of several families share: random examples, a small model, dense losses, plain draws.

A family's twin, `naive_<family>.py`, is its mathematics written plainly. The tests hold the family to it, and the
benchmarks measure the family against it. It has

    slow_loss(model, batch, block, dense): the loss of the collator's batch with the vocabulary head at every position
        and rows padded to `block` columns. *dense* has targets of the size of the logits and a log-softmax over
        everything, else logsumexp and gather take their place.
    slow_collation(examples, vocab_size, dense): the corruption of the training collator as a loop over the rows, with
        draws of its own; `dense` adds targets of the size of the logits.
    slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings, ...): all rows in every step, nothing cached.
        It takes prompts of one length without padding, and draws with the numbers that `generate` draws with: the same
        seed writes the same.
    LADDER: the savings that the sampler can make, in the order in which the ablation adds them. None of them is
        *dense*, the first alone is *plain*.
            gather: only what is written is normalised and drawn, not a log-softmax and a draw everywhere.
            rows: rows that are finished, or in which a step of the process writes nothing, leave the batch.
            width: columns that are still empty are cut off.
            head: the vocabulary head is applied only where its logits are used.
    exact laws: what a sampler writes, enumerated with a table in place of the network.

Loss and sampler share the library's backbone, so that what is compared is everything around it.
"""

import random
from collections import Counter

import torch
from torch.nn.functional import one_hot, pad

PAD, CLS, MASK, EOS, BOS, SEP, UNK, FIRST_WORD = range(8)


class SpecialIds:
    """What the collators read of a tokenizer."""

    pad_token_id, cls_token_id, mask_token_id, eos_token_id, bos_token_id, unk_token_id = PAD, CLS, MASK, EOS, BOS, UNK
    all_special_ids = list(range(FIRST_WORD))

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


def small_model(model_class, vocab_size=20, max_position_embeddings=24, **options):
    """A model with seeded weights far enough from 0 that its distributions are not uniform."""
    torch.manual_seed(11)
    config = {
        **{"vocab_size": vocab_size, "max_position_embeddings": max_position_embeddings},
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.4},
        **{"suppress_tokens": list(range(FIRST_WORD)), **options},
    }
    model = model_class(model_class.config_class(**config)).eval()
    model.generation_config.return_dict_in_generate = True
    return model


def batch_of(prompts, side="left", start=(), end=(BOS,)):
    return stack([[*start, *prompt, *end] for prompt in prompts], PAD, side)


def stack(rows, fill, side="right"):
    width = max(map(len, rows))
    return torch.tensor(
        [row + [fill] * (width - len(row)) if side == "right" else [fill] * (width - len(row)) + row for row in rows]
    )


def written(output, prompt_width):
    """What each row wrote, `[EOS]` included."""
    return [tuple(t for t in row if t != PAD) for row in output.sequences[:, prompt_width:].tolist()]


def until_end(ids):
    return tuple(ids[: ids.index(EOS) + 1] if EOS in ids else ids)


def check_histogram(texts, law):
    """A chi-square test of what was drawn; cells with few expected draws are pooled, as the test asks."""
    # Here, because the benchmarks import this file and need no SciPy.
    from scipy.stats import chisquare

    num, counts = len(texts), Counter(texts)
    assert abs(sum(law.values()) - 1) < 1e-6
    assert set(counts) <= {x for x, p in law.items() if p > 0}
    common = [x for x, p in law.items() if p * num >= 8]
    observed = [counts[x] for x in common] + [num - sum(counts[x] for x in common)]
    expected = [law[x] * num for x in common] + [num * (1 - sum(law[x] for x in common))]
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-4


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


def padded(batch, block=None):
    """Ids and mask of a batch, padded on the right to `block` columns."""
    missing = block - batch["input_ids"].shape[1] if block else 0
    return pad(batch["input_ids"], (0, missing)), pad(batch["attention_mask"], (0, missing))


def in_grid(index, batch):
    """Rows and columns of flat indices into a batch; padding on the right does not move them."""
    width = batch["input_ids"].shape[1]
    return index // width, index % width


def cross_entropies(model, batch, block, dense, **inputs):
    """Cross-entropies of the targets, as a (B, L) grid that is 0 elsewhere."""
    ids, mask = padded(batch, block)
    at = in_grid(batch["logits_index"], batch)
    return grid_of_losses(model(ids, attention_mask=mask, **inputs).logits, at, batch["target_ids"], dense)


def grid_of_losses(logits, at, targets, dense):
    """Cross-entropies of targets at rows and columns, of which several may be one position, summed in a (B, L) grid."""
    if not dense:
        losses = logits.logsumexp(dim=-1)[at] - logits[(*at, targets)]
        return torch.zeros_like(logits[..., 0]).index_put(at, losses, accumulate=True)
    grid = torch.zeros_like(logits).index_put((*at, targets), torch.ones((), dtype=logits.dtype), accumulate=True)
    log_probabilities = logits.log_softmax(dim=-1).masked_fill(grid == 0, 0.0)
    return -(grid * log_probabilities).sum(dim=-1)


def dropped_at_random(examples, vocab_size, dense):
    """Drop n ~ U{0..L} tokens of each target, and note for each which kept token it stood behind."""
    rows, entries = [], []
    for number, example in enumerate(examples):
        target, row = example["target_ids"], [CLS, *example["prompt_ids"], BOS]
        dropped = set(random.sample(range(len(target)), random.randint(0, len(target))))
        for position, token in enumerate(target):
            if position in dropped:
                entries.append((number, len(row) - 1, token))
            else:
                row.append(token)
        rows.append(row)
    ids = stack(rows, PAD)
    batch = {"input_ids": ids, "attention_mask": ids != PAD, "targets": torch.tensor(entries)}
    if dense:
        grid = torch.zeros(*ids.shape, vocab_size)
        batch["targets"] = grid.index_put(tuple(torch.tensor(entries).T), torch.ones(()), accumulate=True)
    return batch


def masked_at_random(examples, vocab_size, dense):
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
    return with_targets(rows, labels, vocab_size, dense)


def with_targets(rows, labels, vocab_size, dense):
    """A batch of rows and of what each position shall become, -100 where there is no loss."""
    ids, labels = stack(rows, PAD), stack(labels, -100)
    if dense:
        labels = one_hot(labels.clamp(min=0), vocab_size).float() * (labels >= 0)[..., None]
    return {"input_ids": ids, "attention_mask": ids != PAD, "targets": labels}


def draw(logits, uniforms):
    """Tokens of (..., V) logits: the inverse of the cumulative distribution at `uniforms`, or without them argmax."""
    if uniforms is None:
        return logits.argmax(dim=-1)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    threshold = uniforms[..., None].float() * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def make_canvas(prompts, max_new_tokens, fill):
    """Prompts with `max_new_tokens` positions behind each, and the number of each column."""
    ids = pad(prompts, (0, max_new_tokens), value=fill)
    return ids, torch.arange(ids.shape[1]).expand_as(ids)


def logits_at(model, ids, wanted):
    """Logits (B, L, V), or with `wanted` (B, L) the (S, V) of those positions in reading order."""
    index = {} if wanted is None else {"logits_index": wanted.flatten().nonzero().squeeze(-1)}
    return model(ids, attention_mask=torch.ones_like(ids), **index).logits


def commit(ids, chosen, seen, logits, uniforms, savings):
    """Write at `chosen` what is drawn from the logits of the positions `seen`."""
    logits = logits.flatten(0, -2)
    uniforms = None if uniforms is None else uniforms[seen]
    among = chosen[seen]
    if "gather" in savings:
        ids[chosen] = draw(logits[among], None if uniforms is None else uniforms[among])
    else:
        ids[chosen] = draw(logits.log_softmax(dim=-1), uniforms)[among]

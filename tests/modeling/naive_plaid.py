"""The slow twin of Gaussian diffusion."""

import itertools
import math
import random

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutput

from tests.modeling.naive import (
    BOS,
    EOS,
    FIRST_WORD,
    UNK,
    commit,
    in_grid,
    make_canvas,
    padded,
    small_model,
    with_targets,
)
from xlm_hf.modeling.plaid import PlaidConfig, PlaidForGaussianDiffusion, PlaidLoss
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds
from xlm_hf.modules.rotary_transformer import take

LADDER = ("gather", "head")
WORDS = (7, 8, 9)
TWO_VECTORS = [[-1.0], [1.0]]


def make_model(*args, **options):
    options = {"suppress_tokens": [i for i in range(FIRST_WORD) if i != UNK], "embedding_size": 4, **options}
    model = small_model(PlaidForGaussianDiffusion, *args, **options)
    for name, parameter in model.named_parameters():
        if "modulation" in name or "time_token.projection" in name:
            parameter.data.normal_(std=0.3)
    return model


def slow_collation(examples, vocab_size, dense, size=16):
    """A normal vector for each token of a target; the targets are all of it."""
    rows, labels, noise = [], [], []
    for example in examples:
        prompt, target = [*example["prompt_ids"], BOS], [*example["target_ids"], EOS]
        rows.append(prompt + target)
        labels.append([-100] * len(prompt) + target)
        noise.append([[random.gauss(0, 1) for _ in range(size)] for _ in target])
    return with_targets(rows, labels, vocab_size, dense) | {"noise": [torch.tensor(x) for x in noise]}


def slow_loss(model, batch, block=None, dense=True):
    """The bound, or with `noise_beta` the cross-entropy, from all probabilities, by plain differentiation."""
    ids, mask = padded(batch, block)
    missing = ids.shape[1] - batch["input_ids"].shape[1]
    inputs = {
        "attention_mask": mask,
        "is_canvas": pad(batch["is_canvas"], (0, missing)),
        "noise": pad(batch["noise"], (0, 0, 0, missing)),
        **{name: batch[name] for name in ("times", "time_index")},
    }
    vectors = model.table()
    if model.config.self_conditioning:
        with torch.no_grad():
            # Logits are read in float32.
            before = model(ids, **inputs).logits.float().softmax(dim=-1).to(vectors.dtype) @ vectors
        shown = inputs["is_canvas"] & batch["self_conditioned"][:, None]
        inputs["expected"] = before * shown[..., None]
    log_p = model(ids, **inputs).logits[in_grid(batch["logits_index"], batch)].log_softmax(dim=-1)
    p = log_p.exp()
    documents, targets, level = (
        batch["target_documents"],
        batch["target_ids"],
        model.schedule(batch["times"].to(p.dtype)),
    )
    weights = batch["weights"] if "weights" in batch else batch["loss_weights"]
    sums = [p.new_zeros(()) for _ in range(len(weights))]
    for row, (document, target) in enumerate(zip(documents.tolist(), targets.tolist(), strict=True)):
        if batch["is_reconstruction"][document]:
            sums[document] = sums[document] - log_p[row, target]
        else:
            error = (vectors[target] - p[row] @ vectors).square().sum()
            sums[document] = sums[document] + level.slope[document] * (-level.gamma[document]).exp() * error / 2
    total = sum(weight * x for weight, x in zip(weights, sums, strict=True))
    if "weights" not in batch:
        return total
    variance = torch.sigmoid(level.end)
    per_token = (1 - variance + vectors.shape[1] * (variance - 1 - variance.log())) / 2
    for number, length in enumerate(batch["canvas_lengths"].tolist()):
        total = total + length * per_token
        if not batch["is_reconstruction"][number]:
            total = total + weights[number] * sums[number].detach() ** 2 / length * level.score[number]
    return total


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=(), num_steps=None, score_temperature=1.0):
    """The reverse process on all vectors of all rows, drawn with the numbers of `generate`."""
    seeds = row_seeds(seed, len(prompts), prompts.device)[:, None, None]
    ids, columns = make_canvas(prompts, max_new_tokens, -1)
    canvas, n, size = ids == -1, num_steps or max_new_tokens, model.config.embedding_size

    def normal(step, which):
        numbers = uniform(seeds, torch.tensor(step), columns[..., None], which, torch.arange(size))
        return torch.special.ndtri(numbers + 2.0**-54)

    z, before = normal(0, 3), torch.zeros(*ids.shape, size, dtype=torch.float64)
    for step in range(n + 1):
        t, s = ((n - min(step + i, n)) / n for i in (0, 1))
        index = {"logits_index": canvas.flatten().nonzero()[:, 0]} if "head" in savings else {}
        seen = canvas if "head" in savings else torch.ones_like(canvas)
        state = {"latents": z, "expected": before, "is_canvas": canvas, "times": torch.full((len(ids),), t).double()}
        shown = ids.masked_fill(canvas, 0)
        logits = model(shown, attention_mask=torch.ones_like(ids), **state, **index).logits.flatten(0, -2)
        new = torch.zeros_like(before)
        new[seen] = (logits.softmax(dim=-1) @ model.table()).double()
        before = new * canvas[..., None]
        gamma_t, gamma_s = model.schedule(torch.tensor([t, s], dtype=model.table().dtype)).gamma.double()
        (a_t, s_t), (a_s, s_s) = [(torch.sigmoid(-g).sqrt(), torch.sigmoid(g).sqrt()) for g in (gamma_t, gamma_s)]
        c = 1 - torch.exp(gamma_s - gamma_t)
        if step < n:
            noise = (z - a_t * before) / s_t / score_temperature
            clean = (z - s_t * noise) / a_t
            z = a_s / a_t * (1 - c) * z + c * a_s * clean + c.sqrt() * s_s * normal(step, 4)
    draws = uniform(seeds[..., 0], torch.tensor(n), columns, 1) if do_sample else None
    commit(ids, canvas, seen, logits, draws, savings)
    return ids


class ExactBackbone(nn.Module):
    """In place of the layers: log p(word at l | the other noisy vectors), exact for a joint law of the canvas."""

    def __init__(self, owner, joint, num_words):
        super().__init__()
        self.embed_tokens = nn.Embedding(owner.config.vocab_size, owner.config.hidden_size)
        self.embed_tokens.weight.data.zero_()
        self.owner, self.joint, self.num_words = [owner], joint, num_words
        self.length = round(math.log(len(joint), num_words))

    def forward(self, ids, inputs_embeds, timesteps, output_index=None, **_):
        (owner,), size = self.owner, self.owner[0].config.embedding_size
        gamma = timesteps.double()[:, None, None]
        signal, variance = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma)
        z = inputs_embeds[:, 1:, :size].double() * (signal**2 / size + variance).sqrt()
        vectors = owner.table()[WORDS[0] : WORDS[0] + self.num_words].double()
        scores = signal / variance * z @ vectors.T
        hidden = torch.zeros(*inputs_embeds.shape[:2], owner.config.hidden_size, dtype=torch.float64)
        x = texts(self.num_words, self.length)
        for at in range(self.length):
            others = [j for j in range(self.length) if j != at]
            of_texts = self.joint.log() + sum((scores[:, j][:, x[:, j]] for j in others), 0 * scores[:, :1, 0])
            for word in range(self.num_words):
                hidden[:, 1 + at, WORDS[0] + word] = of_texts[:, x[:, at] == word].logsumexp(dim=-1)
        return BaseModelOutput(last_hidden_state=take(hidden, output_index))


def texts(num_words, length):
    """All texts (N^L, L), as numbers of words."""
    return torch.tensor(list(itertools.product(range(num_words), repeat=length)))


def exact_model(joint, vectors, **options):
    """A model whose prediction is exact for a law `joint` (N^L,) of canvases, with `vectors` (N, size) of the words."""
    num_words, size = len(vectors), len(vectors[0])
    config = PlaidConfig(
        **{"vocab_size": 10, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"max_position_embeddings": 16, "pad_token_id": WORDS[0], "eos_token_id": None},
        **{"suppress_tokens": [i for i in range(10) if not WORDS[0] <= i < WORDS[0] + num_words]},
        **{"embedding_size": size, "noise_schedule": "linear", **options},
    )
    model = PlaidForGaussianDiffusion(config).double().eval()
    model.generation_config.return_dict_in_generate = True
    with torch.no_grad():
        model.vectors.weight[WORDS[0] : WORDS[0] + num_words] = 3 * torch.tensor(vectors, dtype=torch.float64)
        model.vector_proj.weight.copy_(torch.eye(12, size))
        model.expected_proj.weight.zero_()
        model.lm_head.weight.copy_(torch.eye(10, 12))
    model.model = ExactBackbone(model, joint, num_words)
    return model


def hermite(num_nodes, num_dims):
    """Nodes (K, dims) and weights (K,) of a mean over normal vectors."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    weights = weights / weights.sum()
    grid = np.stack(np.meshgrid(*[nodes] * num_dims, indexing="ij"), -1).reshape(-1, num_dims)
    product = np.stack(np.meshgrid(*[weights] * num_dims, indexing="ij"), -1).reshape(-1, num_dims).prod(-1)
    kept = product > 1e-14
    return torch.from_numpy(grid[kept]), torch.from_numpy(product[kept])


def exact_nelbo(model, text, num_times=48, num_nodes=48):
    """The bound of a text (L,) of ids by quadrature over times and noise, through the family's own loss."""
    length, size = len(text), model.config.embedding_size
    noise, of_noise = hermite(num_nodes, length * size)
    nodes, of_times = np.polynomial.legendre.leggauss(num_times)
    times, of_times = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(of_times / 2)
    K, T = len(noise), num_times
    weights = torch.cat((torch.outer(of_times, of_noise).flatten(), of_noise))
    D = K * (T + 1)
    batch = {
        "input_ids": torch.tensor([BOS, *text]).expand(D, -1),
        "attention_mask": torch.ones(D, 1 + length, dtype=torch.bool),
        "times": torch.cat((times.repeat_interleave(K), torch.zeros(K, dtype=torch.float64))),
        "time_index": torch.arange(D),
        "is_canvas": (torch.arange(1 + length) > 0).expand(D, -1),
        "noise": pad(noise.repeat(T + 1, 1).view(D, length, size), (0, 0, 1, 0)),
        "self_conditioned": torch.zeros(D, dtype=torch.bool),
        "logits_index": (torch.arange(D)[:, None] * (1 + length) + torch.arange(1, 1 + length)).flatten(),
        "target_ids": torch.tensor(text).repeat(D),
        "target_documents": torch.arange(D).repeat_interleave(length),
        "is_reconstruction": torch.arange(D) >= K * T,
        "weights": weights,
        "canvas_lengths": torch.full((D,), length),
        "sequence_tokens": torch.full((D,), length),
        "given_length": torch.zeros(D, dtype=torch.bool),
    }
    with torch.no_grad():
        metrics = PlaidLoss()(model, batch).metrics
    return {
        "prior": float(metrics["prior"][0]) / D,
        **{name: float(metrics[name][0]) for name in ("diffusion", "reconstruction")},
    }


def chain_law(model, num_steps, num_points=801, width=7.0):
    """Law (2,) of one word of two with the vectors -1 and 1, after the steps of the sampler: a chain on a fine grid."""
    z = torch.linspace(-width, width, num_points, dtype=torch.float64)
    log_odds = model.model.joint.log().diff()

    def expected(gamma):
        # p(1) - p(-1) given z.
        signal, variance = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma)
        return torch.tanh(signal * z / variance + log_odds / 2)

    gammas = model.schedule(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)).gamma
    law = torch.exp(-(z**2) / 2)
    for gamma_t, gamma_s in itertools.pairwise(gammas):
        (a_t, _), (a_s, s_s) = [(torch.sigmoid(-g).sqrt(), torch.sigmoid(g).sqrt()) for g in (gamma_t, gamma_s)]
        c = 1 - torch.exp(gamma_s - gamma_t)
        mean = a_s / a_t * (1 - c) * z + c * a_s * expected(gamma_t)
        steps = torch.exp(-((z[None] - mean[:, None]) ** 2) / (2 * c * s_s**2))
        law = (law / law.sum()) @ (steps / steps.sum(dim=1, keepdim=True))
    of_one = float((law / law.sum() * (1 + expected(gammas[-1])) / 2).sum())
    return torch.tensor([1 - of_one, of_one])

"""The slow twin of GIDD."""

import itertools
import random

import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot

from tests.modeling.naive import (
    BOS,
    EOS,
    FIRST_WORD,
    MASK,
    UNK,
    commit,
    in_grid,
    make_canvas,
    padded,
    small_model,
    with_targets,
)
from xlm_hf.modeling.gidd import GIDDConfig, GIDDForInterpolatingDiffusion, GIDDGenerationConfig
from xlm_hf.modeling.gidd.generation_gidd import GIDDGenerationMixin
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.modules.vocabulary_head import LanguageModelOutput, head_fields

LADDER = ("gather", "head")
WORDS = (7, 8, 9)
# States of a position, by number: the three words and the mask.
STATES = torch.tensor([*WORDS, MASK])


def slow_collation(examples, vocab_size, dense):
    """Noise each token of a target with probability t ~ U(0, 1), by a mask or a word; the targets are all of it."""
    rows, labels = [], []
    for example in examples:
        t, prompt = random.random(), [*example["prompt_ids"], BOS]
        target, noisy = [*example["target_ids"], EOS], []
        for token in target:
            noise = MASK if random.random() < 0.8 else random.randrange(vocab_size)
            noisy.append(noise if random.random() < t else token)
        rows.append(prompt + noisy)
        labels.append([-100] * len(prompt) + target)
    return with_targets(rows, labels, vocab_size, dense)


def make_model(*args, **options):
    # The unknown word is a word: texts may hold it, and so may noise.
    options = {"suppress_tokens": [i for i in range(FIRST_WORD) if i != UNK], **options}
    model = small_model(GIDDForInterpolatingDiffusion, *args, **options)
    for name, parameter in model.named_parameters():
        if "modulation" in name or "time_token.projection" in name:
            parameter.data.normal_(std=0.3)
    return model


def writable_ids(config):
    return [i for i in range(config.vocab_size) if i not in config.suppressed_ids]


def shares(t, config):
    """alpha_t, m_t and U_t of arXiv 2503.04482, section 3.2."""
    odds = config.uniform_share / (1 - config.uniform_share)
    c = odds * 2**config.gamma * (t * (1 - t)) ** (config.gamma / 2)
    return (1 - t) / (1 + c), t / (1 + c), c / (1 + c)


def divergences(predicted, x, z, alpha, u):
    """KL(q || p') + r - 1 - log r with one-hot vectors; `predicted` (..., N), numbers x and z (...), N for the mask."""
    num_ids = predicted.shape[-1]
    q = alpha[..., None] * one_hot(x, num_ids) + u[..., None]
    ours = alpha[..., None] * predicted + u[..., None]
    divergence = torch.special.xlogy(q, q / ours).sum(dim=-1)
    index = z.clamp(max=num_ids - 1)[..., None]
    r = torch.where(z == num_ids, 1.0, (q.gather(-1, index) / ours.gather(-1, index))[..., 0])
    return divergence + r - 1 - r.log()


def rates(predicted, x, z, t, config):
    """Rate of the bound in t (...): theorem 1 with the weight from its definition, its derivatives by autograd."""
    num_ids, at = predicted.shape[-1], t.detach().requires_grad_()
    with torch.enable_grad():
        alpha, m, total = shares(at, config)
        of_noise = torch.where(z == num_ids, m, total / num_ids)
        slope = torch.autograd.grad(of_noise.sum(), at, retain_graph=True)[0]
        of_alpha = torch.autograd.grad(alpha.log().sum(), at)[0]
    alpha, u, of_noise = alpha.detach(), (total / num_ids).detach(), of_noise.detach()
    weight = (slope - of_alpha * of_noise) / (of_noise + alpha * (x == z))
    return weight * divergences(predicted, x, z, alpha, u)


def slow_loss(model, batch, block=None, dense=True):
    """Sum over the canvas of weight x divergence, in plain sums over the vocabulary."""
    ids, mask = padded(batch, block)
    given = {"is_given": batch["is_given"]} if "is_given" in batch else {}
    rows, columns = in_grid(batch["logits_index"], batch)
    writable = writable_ids(model.config)
    logits = model(ids, attention_mask=mask, timesteps=batch["timesteps"], **given).logits[rows, columns]
    number = torch.full((model.config.vocab_size,), len(writable))
    number[writable] = torch.arange(len(writable))
    x, z = number[batch["target_ids"]], number[ids[rows, columns]]
    alpha, u = (batch[name][batch["target_documents"]].to(logits.dtype) for name in ("alpha", "uniform"))
    if "weights" not in batch:
        # Bayes' rule for the token by all positions: its own noisy one, unless it is a mask, has evidence.
        own = torch.cat((alpha[:, None] * torch.eye(len(writable))[z.clamp(max=len(writable) - 1)] + u[:, None],), 1)
        logits = logits[:, writable] + torch.where((z == len(writable))[:, None], 0.0, own.log())
        return (logits.logsumexp(dim=-1) - logits.gather(1, x[:, None])[:, 0]).sum()
    weights = batch.get("loss_weights", batch["weights"])
    if model.config.uniform_share == 0:
        return (weights * alpha * -logits[:, writable].log_softmax(dim=-1).gather(1, x[:, None])[:, 0]).sum()
    return (weights * divergences(logits[:, writable].softmax(dim=-1), x, z, alpha, u)).sum()


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=(), num_steps=None):
    """The reverse process, its posterior as a mixture, drawn with the numbers of `generate`."""
    seeds = row_seeds(seed, len(prompts), prompts.device)[:, None]
    ids, columns = make_canvas(prompts, max_new_tokens, model.config.mask_token_id)
    canvas = torch.arange(ids.shape[1]).expand_as(ids) >= prompts.shape[1]
    writable, mask_id = torch.tensor(writable_ids(model.config)), model.config.mask_token_id
    n, num_ids = num_steps or max_new_tokens, len(writable)
    schedule = make_schedule(model.config.noise_schedule)

    def numbers(step, which):
        return uniform(seeds, torch.tensor(step), columns, which)

    for step in range(n):
        t, s = (schedule.mask_probability(torch.tensor(x / n, dtype=torch.float64)) for x in (n - step, n - step - 1))
        (alpha_t, m_t, u_t), (alpha_s, m_s, u_s) = shares(t, model.config), shares(s, model.config)
        index = {"logits_index": canvas.flatten().nonzero()[:, 0]} if "head" in savings else {}
        told = t.float().expand(len(ids))
        logits = model(ids, attention_mask=torch.ones_like(ids), timesteps=told, **index).logits.flatten(0, -2)
        seen = canvas if "head" in savings else torch.ones_like(canvas)
        if not do_sample:
            logits = one_hot(logits.argmax(dim=-1), logits.shape[-1]).float().log()
        own = torch.zeros(ids.shape, dtype=torch.float64)
        own[seen] = logits.softmax(dim=-1).gather(-1, ids[seen][:, None])[:, 0].double()
        a = alpha_t / alpha_s
        noise = torch.where(ids == mask_id, m_t - a * m_s, (u_t - a * u_s) / num_ids)
        keep = a * torch.where(ids == mask_id, m_s, alpha_s * own + u_s / num_ids)
        parts = [keep, noise * alpha_s, noise * u_s, noise * m_s]
        ends = torch.stack(parts).cumsum(dim=0) / sum(parts)
        part = (ends[:-1] <= numbers(step, 2)).sum(dim=0)
        new = ids.clone()
        commit(new, canvas & (part == 1), seen, logits, numbers(step, 3) if do_sample else None, savings)
        new = torch.where(canvas & (part == 2), writable[(numbers(step, 4) * num_ids).long()], new)
        ids = new.masked_fill(canvas & (part == 3), mask_id)
    return ids


class TableModel(nn.Module, GIDDGenerationMixin):
    """A table in place of the network: p(word at l | canvas, t) over three words, the N = 3 ids of the noise.

    Args:
        joint: law of the whole canvas (3^L,), in the order of `texts`; the table then holds its exact leave-one-out
            conditionals given the noisy canvas. None draws a table at random, which is consistent with no joint law.
        options: of the configuration.
    """

    def __init__(self, joint=None, **options):
        super().__init__()
        self.config = GIDDConfig(
            **{"vocab_size": 10, "max_position_embeddings": 16, "suppress_tokens": list(range(7))},
            **{"pad_token_id": WORDS[0], "eos_token_id": None, **options},
        )
        self.generation_config = GIDDGenerationConfig()
        self.device, self.joint, self.times = torch.device("cpu"), joint, []

    def table(self, z, t):
        """Leave-one-out probabilities (R, L, 3), float64, for canvases z (R, L), numbers of states, at times t (R,)."""
        length = z.shape[1]
        if self.joint is None:
            generator = torch.Generator().manual_seed(length)
            shape = (2, 4**length, length, 3)
            level, slope = torch.randn(shape, dtype=torch.float64, generator=generator)
            number = (z * 4 ** torch.arange(length - 1, -1, -1)).sum(dim=-1)
            return (1.5 * level[number] + 2 * t[:, None, None] * slope[number]).softmax(dim=-1)
        x = texts(length)
        likelihoods = of_noise(x, z[:, None], t[:, None, None], self.config)  # (R, 3^L, L)
        predicted = torch.empty(*z.shape, 3, dtype=torch.float64)
        for i, word in itertools.product(range(length), range(3)):
            others = [j for j in range(length) if j != i]
            predicted[:, i, word] = (self.joint * likelihoods[..., others].prod(dim=-1))[:, x[:, i] == word].sum(dim=-1)
        return predicted / predicted.sum(dim=-1, keepdim=True)

    def forward(self, input_ids, attention_mask, timesteps, logits_index, head_function=None, **kwargs):
        self.times.append(timesteps)
        start = int((input_ids[0] == BOS).nonzero()) + 1
        canvas = input_ids[:, start:]
        z = (canvas[..., None] == STATES).long().argmax(dim=-1)
        logits = torch.full((*input_ids.shape, 10), -torch.inf)
        logits[:, start:, list(WORDS)] = self.table(z, timesteps.double()).log().float()
        return LanguageModelOutput(
            **head_fields(logits.flatten(0, 1)[logits_index], nn.Identity(), self.config.suppressed_ids, head_function)
        )


def texts(length):
    """All texts (3^L, L), as numbers of words."""
    return torch.tensor(list(itertools.product(range(3), repeat=length)))


def canvases(length):
    """All canvases (4^L, L), as numbers of states."""
    return torch.tensor(list(itertools.product(range(4), repeat=length)))


def of_noise(x, z, t, config):
    """q_t(z | x) of words x and states z."""
    alpha, m, total = shares(t, config)
    return torch.where(z == 3, m, alpha * (z == x) + total / 3)


def random_joint(length, seed=0):
    weights = torch.from_numpy(np.random.default_rng(seed).gamma(0.7, size=3**length))
    return weights / weights.sum()


def noised(predicted, t, config):
    """Laws (..., 4) at t of what has the laws `predicted` (..., 3) as a text."""
    alpha, m, total = (torch.as_tensor(x, dtype=torch.float64) for x in shares(t, config))
    return torch.cat((alpha * predicted + total / 3, m.expand(*predicted.shape[:-1], 1)), dim=-1)


def posterior(predicted, z, t, s, config):
    """Laws (R, L, 4) of the states at s by Bayes' rule from the whole matrix of the step; z (R, L) are numbers."""
    (alpha_t, m_t, u_t), (alpha_s, m_s, u_s) = shares(t, config), shares(s, config)
    a = alpha_t / alpha_s
    noise = torch.tensor([*[(u_t - a * u_s) / 3] * 3, m_t - a * m_s], dtype=torch.float64)
    step = a * torch.eye(4, dtype=torch.float64) + noise
    law = step.T[z] * noised(predicted, s, config)
    total = law.sum(dim=-1, keepdim=True)
    # A state that no noise gives stays.
    return torch.where(total > 0, law / total, one_hot(z, 4).double())


def step_matrix(laws):
    """Probabilities (R, 4^L) of the canvases whose positions have the laws (R, L, 4)."""
    return laws.gather(2, canvases(laws.shape[1]).T.expand(len(laws), -1, -1)).prod(dim=1)


def chain_law(model, length, times, share=lambda t, s: 0.0, corrected=0):
    """Law (4^L,) of the canvas after the steps between `times`, from 1 to 0.

    `share` (t, s) of the positions go to time 0 and to s by new noise. `corrected` times one position of each canvas,
    any alike, is drawn anew at s.
    """
    z, eye, config = canvases(length), torch.eye(4, dtype=torch.float64), model.config
    law = torch.zeros(4**length, dtype=torch.float64)
    law[-1] = 1.0
    for t, s in itertools.pairwise(times):
        predicted = model.table(z, torch.full((len(z),), t, dtype=torch.float64))
        renoised = noised(posterior(predicted, z, t, 0.0, config)[..., :3], s, config)
        law = law @ step_matrix(share(t, s) * renoised + (1 - share(t, s)) * posterior(predicted, z, t, s, config))
        for _ in range(corrected if s > 0 else 0):
            new = noised(model.table(z, torch.full((len(z),), s, dtype=torch.float64)), s, config)
            matrix = torch.zeros(len(z), len(z), dtype=torch.float64)
            for i in range(length):
                laws = eye[z].clone()
                laws[:, i] = new[:, i]
                matrix += step_matrix(laws) / length
            law = law @ matrix
    return law


def correction_law(model, law, length, rounds, patience, temperature, t=0.01):
    """Law (4^L,) of finished canvases of the law `law` after their self-correction, by all of its states."""
    states = {(z, -1, 0): p for z, p in zip(map(tuple, canvases(length).tolist()), law.tolist(), strict=True) if p > 0}
    done = {}

    def add(where, key, p):
        where[key] = where.get(key, 0.0) + p

    for number in range(rounds):
        following = {}
        for (z, best, stale), p in states.items():
            predicted = model.table(torch.tensor([z]), torch.tensor([t], dtype=torch.float64))[0]
            drawn = (predicted.log() / temperature).softmax(dim=-1)
            agreement = int((predicted.argmax(dim=-1) == torch.tensor(z)).sum())
            if agreement == length:
                add(done, z, p)
                continue
            best, stale = (agreement, 0) if agreement > best else (best, stale + 1)
            for new in itertools.product(range(3), repeat=length):
                changed = [i for i in range(length) if new[i] != z[i]]
                after = list(z)
                if changed:
                    at = max(changed, key=lambda i: float(drawn[i, new[i]]))
                    after[at] = new[at]
                q = p * float(torch.stack([drawn[i, new[i]] for i in range(length)]).prod())
                ended = stale >= patience or number + 1 == rounds
                add(done if ended else following, tuple(after) if ended else (tuple(after), best, stale), q)
        states = following
    result = torch.zeros(4**length, dtype=torch.float64)
    for z, p in done.items():
        result[int((torch.tensor(z) * 4 ** torch.arange(length - 1, -1, -1)).sum())] += p
    return result


def as_dict(law, length):
    """A law (4^L,) by the ids of the canvases; without those that are impossible."""
    named = zip(canvases(length).tolist(), law.tolist(), strict=True)
    return {tuple(STATES[i].item() for i in z): p for z, p in named if p > 0}


def exact_nelbo(model, length, num_nodes=60):
    """The bounds (3^L,) of all texts: sums over all noisy ones, and quadrature over t, dense near both ends."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(num_nodes))
    u, weights = (nodes + 1) / 2, weights / 2
    scale = u**4 + (1 - u) ** 4
    z, total = canvases(length), torch.zeros(3**length, dtype=torch.float64)
    for t, weight in zip(u**4 / scale, weights * 4 * (u * (1 - u)) ** 3 / scale**2, strict=True):
        predicted = model.table(z, t.expand(len(z)))
        for number, x in enumerate(texts(length)):
            p = of_noise(x, z, t, model.config).prod(dim=-1)
            # Without uniform noise other words are impossible, and their rates infinite.
            rate = rates(predicted, x.expand_as(z), z, t.expand(len(z), length), model.config).sum(dim=-1)
            total[number] += weight * (p * rate.where(p > 0, 0.0)).sum()
    return total

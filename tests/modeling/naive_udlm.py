"""The slow twin of uniform diffusion."""

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
    UNK,
    commit,
    in_grid,
    make_canvas,
    padded,
    small_model,
    with_targets,
)
from xlm_hf.modeling.udlm import UDLMConfig, UDLMForUniformDiffusion, UDLMGenerationConfig
from xlm_hf.modeling.udlm.generation_udlm import UDLMGenerationMixin
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds
from xlm_hf.modules.vocabulary_head import LanguageModelOutput, head_fields

LADDER = ("gather", "head")
WORDS = (7, 8, 9)


def slow_collation(examples, vocab_size, dense):
    """Replace each token of a target with probability t ~ U(0, 1) by any word; the targets are all of it."""
    rows, labels = [], []
    for example in examples:
        t, prompt = random.random(), [*example["prompt_ids"], BOS]
        target = [*example["target_ids"], EOS]
        noisy = [random.randrange(vocab_size) if random.random() < t else token for token in target]
        rows.append(prompt + noisy)
        labels.append([-100] * len(prompt) + target)
    return with_targets(rows, labels, vocab_size, dense)


def make_model(*args, **options):
    # The unknown word is a word: texts may hold it, and so may noise.
    options = {"suppress_tokens": [i for i in range(FIRST_WORD) if i != UNK], **options}
    model = small_model(UDLMForUniformDiffusion, *args, **options)
    for name, parameter in model.named_parameters():
        if "modulation" in name or "time_token.projection" in name:
            parameter.data.normal_(std=0.3)
    return model


def writable_ids(config):
    return [i for i in range(config.vocab_size) if i not in config.suppressed_ids]


def rates(predicted, x, z, alpha):
    """Rate of the bound in the time 1 - alpha: arXiv 2412.10193, equation 16, with one-hot vectors and plain sums.

    `predicted` (..., N), and x, z (...) are numbers among the N ids.
    """
    num_ids = predicted.shape[-1]
    own = one_hot(x, num_ids).to(predicted.dtype)
    true, ours = num_ids * alpha * own + 1 - alpha, num_ids * alpha * predicted + 1 - alpha
    true_z, ours_z = true.gather(-1, z[..., None]), ours.gather(-1, z[..., None])
    logs = (true / true_z * torch.log(ours_z * true / (ours * true_z))).sum(dim=-1)
    return (num_ids / ours_z[..., 0] - num_ids / true_z[..., 0] + logs) / (num_ids * alpha[..., 0])


def slow_loss(model, batch, block=None, dense=True):
    """Sum over the canvas of weight x rate of the bound, or with `noise_beta` of the denoiser's cross-entropies."""
    ids, mask = padded(batch, block)
    given = {"is_given": batch["is_given"]} if "is_given" in batch else {}
    rows, columns = in_grid(batch["logits_index"], batch)
    writable = writable_ids(model.config)
    logits = model(ids, attention_mask=mask, alpha=batch["alpha"], **given).logits[rows, columns]
    number = torch.full((model.config.vocab_size,), -1)
    number[writable] = torch.arange(len(writable))
    x, z = number[batch["target_ids"]], number[ids[rows, columns]]
    noise = batch["noise"][batch["target_documents"]].to(logits.dtype)
    # What is 0 or 1 in float32 makes differences of infinities here.
    logits, alpha = logits[:, writable], (1 - noise)[:, None].clamp(1e-6, 1 - 1e-7)
    evidence = torch.log1p(len(writable) * (1 - noise) / noise)[:, None] * one_hot(z, len(writable))
    is_denoiser = model.config.prediction_type == "denoiser"
    if "weights" not in batch:
        logits = logits if is_denoiser else logits + evidence
        losses = logits.logsumexp(dim=-1) - logits.gather(1, x[:, None])[:, 0]
        return (losses * batch["loss_weights"][batch["target_documents"]]).sum()
    logits = logits - evidence if is_denoiser else logits
    return (rates(logits.softmax(dim=-1), x, z, alpha) * batch["weights"][batch["target_documents"]]).sum()


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=(), num_steps=None):
    """The reverse process of the linear schedule, its posterior as a mixture, drawn with the numbers of `generate`."""
    seeds = row_seeds(seed, len(prompts), prompts.device)[:, None]
    ids, columns = make_canvas(prompts, max_new_tokens, -1)
    canvas, writable = ids == -1, torch.tensor(writable_ids(model.config))
    n, num_ids = num_steps or max_new_tokens, len(writable)

    def numbers(step, which):
        return uniform(seeds, torch.tensor(step), columns, which)

    def any_id(numbers):
        return writable[(numbers * num_ids).long()]

    ids[canvas] = any_id(numbers(0, 0))[canvas]
    for step in range(n):
        alpha_t, alpha_s = torch.tensor([1 - (n - step) / n, 1 - (n - step - 1) / n], dtype=torch.float64)
        told = alpha_t.float().expand(len(ids))
        index = {"logits_index": canvas.flatten().nonzero()[:, 0]} if "head" in savings else {}
        logits = model(ids, attention_mask=torch.ones_like(ids), alpha=told, **index).logits.flatten(0, -2)
        seen = canvas if "head" in savings else torch.ones_like(canvas)
        if not do_sample:
            logits = one_hot(logits.argmax(dim=-1), logits.shape[-1]).float().log()
        own = torch.zeros(ids.shape, dtype=torch.float64)
        own[seen] = logits.softmax(dim=-1).gather(-1, ids[seen][:, None])[:, 0].double()
        den = num_ids * alpha_t * own + 1 - alpha_t
        keep = (num_ids * alpha_t * own + alpha_t / alpha_s - alpha_t) / den
        predicted, u = (alpha_s - alpha_t) / den, numbers(step, 2)
        chosen = canvas & (u >= keep) & (u < keep + predicted)
        replaced = canvas & (u >= keep + predicted)
        new = ids.clone()
        commit(new, chosen, seen, logits, numbers(step, 3) if do_sample else None, savings)
        ids = torch.where(replaced, any_id(numbers(step, 4)), new)
    return ids


class TableModel(nn.Module, UDLMGenerationMixin):
    """A table in place of the network: p(word at l | canvas, alpha) over three words, the N = 3 ids of the noise.

    Args:
        joint: law of the whole canvas (3^L,), in the order of `canvases`; the table then holds its exact leave-one-out
            conditionals given the noisy canvas. None draws a table at random, which is consistent with no joint law.
        prediction_type: "denoiser" gives the same predictions as a denoiser's.
    """

    def __init__(self, joint=None, prediction_type="leave_one_out", noise_schedule="log_linear"):
        super().__init__()
        self.config = UDLMConfig(
            **{"vocab_size": 10, "max_position_embeddings": 16, "suppress_tokens": list(range(7))},
            **{"pad_token_id": WORDS[0], "eos_token_id": None},
            **{"prediction_type": prediction_type, "noise_schedule": noise_schedule},
        )
        self.generation_config = UDLMGenerationConfig()
        self.device, self.joint, self.alphas = torch.device("cpu"), joint, []

    def table(self, z, alpha):
        """Leave-one-out probabilities (R, L, 3), float64, for canvases z (R, L), numbers of words, at alpha (R,)."""
        length = z.shape[1]
        if self.joint is None:
            generator = torch.Generator().manual_seed(length)
            shape = (2, 3**length, length, 3)
            level, slope = torch.randn(shape, dtype=torch.float64, generator=generator)
            number = (z * 3 ** torch.arange(length - 1, -1, -1)).sum(dim=-1)
            return (1.5 * level[number] + 2 * alpha[:, None, None] * slope[number]).softmax(dim=-1)
        x = canvases(length)
        of_noise = (1 - alpha)[:, None, None] / 3 + alpha[:, None, None] * (z[:, None] == x)  # (R, 3^L, L)
        predicted = torch.empty(*z.shape, 3, dtype=torch.float64)
        for i, word in itertools.product(range(length), range(3)):
            others = [j for j in range(length) if j != i]
            predicted[:, i, word] = (self.joint * of_noise[..., others].prod(dim=-1))[:, x[:, i] == word].sum(dim=-1)
        return predicted / predicted.sum(dim=-1, keepdim=True)

    def forward(self, input_ids, attention_mask, alpha, logits_index, head_function=None):
        self.alphas.append(alpha)
        start = int((input_ids[0] == BOS).nonzero()) + 1
        z, alpha = input_ids[:, start:] - WORDS[0], alpha.double()
        scores = self.table(z, alpha).log()
        if self.config.prediction_type == "denoiser":
            scores += torch.log1p(3 * alpha / (1 - alpha).clamp(min=1e-7))[:, None, None] * one_hot(z, 3)
        logits = torch.full((*input_ids.shape, 10), -torch.inf)
        logits[:, start:, list(WORDS)] = scores.float()
        return LanguageModelOutput(
            **head_fields(logits.flatten(0, 1)[logits_index], nn.Identity(), self.config.suppressed_ids, head_function)
        )


def canvases(length):
    """All canvases (3^L, L), as numbers of words."""
    return torch.tensor(list(itertools.product(range(3), repeat=length)))


def random_joint(length, seed=0):
    weights = torch.from_numpy(np.random.default_rng(seed).gamma(0.7, size=3**length))
    return weights / weights.sum()


def step_matrix(laws):
    """Probabilities (R, 3^L) of the canvases whose positions have the laws (R, L, 3)."""
    length = laws.shape[1]
    return laws.gather(2, canvases(length).T.expand(len(laws), -1, -1)).prod(dim=1)


def posterior(predicted, z, alpha_t, alpha_s):
    """Laws (R, L, 3) of the words at s by Bayes' rule from the whole matrix of the step; z (R, L) are numbers."""
    step = alpha_t / alpha_s * torch.eye(3, dtype=torch.float64) + (1 - alpha_t / alpha_s) / 3
    law = step.T[z] * (alpha_s * predicted + (1 - alpha_s) / 3)
    return law / law.sum(dim=-1, keepdim=True)


def chain_law(
    model, length, times, alpha=lambda t: 1 - t, share=lambda t, s: 0.0, corrected=0, order="random", greedy=False
):
    """Law (3^L,) of the canvas after the steps between `times`, from 1 to 0.

    `share` (t, s) of the positions go to time 0 and to s by new noise. `corrected` times one position of each canvas,
    any alike or the least probable, is drawn anew at s. `greedy` takes the most probable words in the last step.
    """
    z, eye = canvases(length), torch.eye(3, dtype=torch.float64)
    law = torch.full((3**length,), 3.0**-length, dtype=torch.float64)
    for t, s in itertools.pairwise(times):
        a_t, a_s = alpha(t), alpha(s)
        predicted = model.table(z, torch.full((len(z),), a_t, dtype=torch.float64))
        renoised = a_s * posterior(predicted, z, a_t, 1.0) + (1 - a_s) / 3
        laws = share(t, s) * renoised + (1 - share(t, s)) * posterior(predicted, z, a_t, a_s)
        law = law @ step_matrix(eye[predicted.argmax(dim=-1)] if greedy and s == 0 else laws)
        for _ in range(corrected if s > 0 else 0):
            predicted = model.table(z, torch.full((len(z),), a_s, dtype=torch.float64))
            own, new = predicted.gather(2, z[..., None])[..., 0], a_s * predicted + (1 - a_s) / 3
            matrix = torch.zeros(len(z), len(z), dtype=torch.float64)
            for i in range(length):
                laws = eye[z].clone()
                laws[:, i] = new[:, i]
                chosen = torch.full((len(z), 1), 1 / length) if order == "random" else own.argmin(-1)[:, None] == i
                matrix += chosen * step_matrix(laws)
            law = law @ matrix
    return law


def as_dict(law, length):
    """A law (3^L,) by the ids of the canvases."""
    return {tuple(WORDS[i] for i in z): p for z, p in zip(canvases(length).tolist(), law.tolist(), strict=True)}


def exact_nelbo(model, length, num_nodes=80):
    """The bounds (3^L,) for all canvases: sums over all noisy ones, and quadrature over t, dense near both ends."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(num_nodes))
    u, weights = (nodes + 1) / 2, weights / 2
    scale = u**2 + (1 - u) ** 2
    z, total = canvases(length), torch.zeros(3**length, dtype=torch.float64)
    for t, weight in zip(u**2 / scale, weights * 2 * u * (1 - u) / scale**2, strict=True):
        predicted = model.table(z, (1 - t).expand(len(z)))
        alpha = (1 - t).expand(len(z), length, 1)
        for number, x in enumerate(z):
            p = ((1 - t) * (z == x) + t / 3).prod(dim=-1)
            total[number] += weight * (p * rates(predicted, x.expand_as(z), z, alpha).sum(dim=-1)).sum()
    return total

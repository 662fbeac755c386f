import itertools

import numpy as np
import pytest
import torch

from xlm_hf.modeling.gidd.kernel_gidd import MixedKernel
from xlm_hf.modeling.sedd.generation_sedd import AbsorbingKernel
from xlm_hf.modules.kernels import MASK, PREDICTED, UNIFORM, UniformKernel, draw_part
from xlm_hf.modules.noise_schedules import make_schedule

WRITABLE, MASK_ID, V = [1, 2, 4], 3, 5  # id 0 is never written
IDS = torch.tensor(WRITABLE)
KERNELS = {
    "absorbing": AbsorbingKernel(schedule=make_schedule("cosine"), mask_token_id=MASK_ID),
    "uniform": UniformKernel(schedule=make_schedule("linear"), writable_ids=IDS),
    "mixed": MixedKernel(uniform_share=0.2, mask_token_id=MASK_ID, writable_ids=IDS),
    "mixed, other shape": MixedKernel(uniform_share=0.4, gamma=2.0, mask_token_id=MASK_ID, writable_ids=IDS),
    "mixed without uniform noise": MixedKernel(mask_token_id=MASK_ID, writable_ids=IDS),
}


def matrix(kernel, t, s=0.0):
    """Q[y, z] = q(z at t | y at s) over all V ids, dense: the chain's own product law from its shares at 0, s and t."""

    def noise(shares):
        row = np.zeros(V)
        row[WRITABLE] += float(shares.uniform) / len(WRITABLE)
        row[MASK_ID] += float(shares.mask)
        return row

    at_t, at_s = (kernel.shares(torch.tensor(x, dtype=torch.float64)) for x in (t, s))
    ratio = float(at_t.alpha) / float(at_s.alpha)
    return ratio * np.eye(V) + (noise(at_t) - ratio * noise(at_s))


@pytest.mark.parametrize("name", KERNELS)
def test_the_steps_of_a_kernel_compose(name):
    whole = matrix(KERNELS[name], 0.3) @ matrix(KERNELS[name], 0.7, 0.3)
    rows = [*WRITABLE]
    np.testing.assert_allclose(whole[rows], matrix(KERNELS[name], 0.7)[rows], atol=1e-12)
    np.testing.assert_allclose(whole[rows].sum(axis=-1), 1.0)
    assert (whole[rows] >= -1e-15).all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.8), (0.6, 0.4), (0.6, 0.0), (1e-3, 5e-4), (1.0, 0.0)])
def test_the_mixture_is_the_posterior_of_the_dense_chain(name, t, s):
    """p(z_s | z_t) by Bayes' rule from dense matrices, against the four parts put together."""
    kernel, step = KERNELS[name], matrix(KERNELS[name], t, s)
    marginal = np.ones(3) @ matrix(kernel, t)[WRITABLE]
    states = [z for z in range(V) if marginal[z] > 1e-12]
    for z, seed in itertools.product(states, range(3)):
        predicted = np.zeros(V)
        predicted[WRITABLE] = np.random.default_rng(seed).dirichlet([0.3] * 3)
        bayes = step[:, z] * (predicted @ matrix(kernel, s))
        probability = torch.tensor([predicted[z]])
        parts = kernel.posterior(
            torch.tensor([z]), probability, *(torch.tensor([x], dtype=torch.float64) for x in (t, s))
        )
        keep, from_network, uniform, mask = parts[0].tolist()
        assert keep + from_network + uniform + mask == pytest.approx(1.0)
        mixture = from_network * predicted
        mixture[z] += keep
        mixture[WRITABLE] += uniform / 3
        mixture[MASK_ID] += mask
        np.testing.assert_allclose(mixture, bayes / bayes.sum(), rtol=1e-9, atol=1e-12)


def test_posteriors_survive_single_precision_and_large_vocabularies():
    """x_theta in float32 at N = 50,257, close to both ends: against the same in float64."""
    kernel = UniformKernel(schedule=make_schedule("linear"), writable_ids=torch.arange(50_257))
    probabilities = torch.tensor([1e-12, 1e-5, 0.5, 1 - 1e-7], dtype=torch.float64)
    for t, s in ((0.999, 0.99), (1e-3, 0.0), (0.5, 0.499)):
        times = [torch.tensor(x, dtype=torch.float64) for x in (t, s)]
        exact = kernel.posterior(torch.arange(4), probabilities, *times)
        single = kernel.posterior(torch.arange(4), probabilities.float(), *times)
        torch.testing.assert_close(single, exact, rtol=1e-6, atol=1e-12)
        alpha_t, alpha_s = 1 - t, 1 - s
        den = 50_257 * alpha_t * probabilities + 1 - alpha_t
        torch.testing.assert_close(exact[:, PREDICTED], (alpha_s - alpha_t) / den, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(
            exact[:, UNIFORM], (1 - alpha_t / alpha_s) * (1 - alpha_s) / den, rtol=1e-9, atol=1e-15
        )


def test_a_clean_token_of_an_absorbing_kernel_stays_and_a_mask_moves_by_the_shares():
    kernel = KERNELS["absorbing"]
    t, s = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    parts = kernel.posterior(torch.tensor([1, 2, MASK_ID]), torch.tensor([0.0, 0.4, 0.0]), t, s)
    assert parts[:2].tolist() == [[1.0, 0.0, 0.0, 0.0]] * 2
    stays = (kernel.shares(s).mask / kernel.shares(t).mask).item()
    assert parts[2, PREDICTED].item() == pytest.approx(1 - stays)
    assert parts[2, MASK].item() + parts[2, 0].item() == pytest.approx(stays)


def test_parts_replacements_and_priors_are_drawn_by_their_uniforms():
    parts = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.9999])
    assert draw_part(parts.expand(8, 4), uniforms).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    draws = torch.tensor([[0.0, 0.34, 0.67, 0.999999]])
    assert KERNELS["uniform"].prior(draws).tolist() == [[1, 2, 4, 4]]
    assert KERNELS["mixed"].prior(draws).tolist() == KERNELS["absorbing"].prior(draws).tolist() == [[MASK_ID] * 4]


def test_the_uniform_share_of_the_mixed_kernel_peaks_in_the_middle():
    shares = KERNELS["mixed"].shares(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(shares.uniform, torch.tensor([0.0, 0.2, 0.0], dtype=torch.float64))
    torch.testing.assert_close(shares.alpha + shares.mask + shares.uniform, torch.ones(3, dtype=torch.float64))
    assert shares.alpha.tolist()[::2] == [1.0, 0.0]

"""The published uniform diffusion: recorded results of its authors' code are met."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import xlm_hf
from xlm_hf.modeling.udlm import UDLMLoss
from xlm_hf.modeling.udlm.curriculum_udlm import uniform_noise
from xlm_hf.modeling.udlm.loss_udlm import UniformBound
from xlm_hf.modules.kernels import UniformKernel
from xlm_hf.modules.noise_schedules import make_schedule

FOLDER = Path(__file__).parents[1] / "fixtures" / "published"
# The same, as the authors' published config.json has it.
PUBLISHED = {"vocab_size": 29, "hidden_dim": 64, "n_blocks": 2, "n_heads": 4, "model_length": 16, "cond_dim": 64}


def recorded():
    tensors = load_file(FOLDER / "duo.safetensors")
    weights = {key.removeprefix("param."): tensor for key, tensor in tensors.items() if key.startswith("param.")}
    return tensors, weights


@pytest.mark.parametrize(("source", "is_published"), [("duo", False), ("duo", True), ("udlm", True)])
def test_recorded_results_are_met(source, is_published):
    tensors, weights = recorded()
    config = json.loads((FOLDER / "duo.json").read_text())
    if is_published:
        weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
        config = PUBLISHED | {"dropout": 0.1, "model_type": source.upper()}
    model = xlm_hf.convert_checkpoint(family="udlm", source=source, state_dict=weights, config=config)
    noisy, alpha = tensors["in.xt"], tensors["out.alpha"][:, 0]
    logits = model(noisy, alpha=alpha).logits
    torch.testing.assert_close(logits, tensors["out.logits"], rtol=1e-5, atol=1e-5)
    soft = (torch.arange(48), torch.arange(29).expand(48, -1), tensors["in.soft_input"].softmax(-1).flatten(0, 1))
    logits = model(noisy, alpha=alpha, soft_tokens=soft).logits
    torch.testing.assert_close(logits, tensors["out.logits_soft_input"], rtol=1e-5, atol=1e-5)
    items = {
        "input_ids": noisy,
        "alpha": alpha,
        "noise": 1 - alpha,
        "logits_index": torch.arange(48),
        "target_ids": tensors["in.x0"].flatten(),
        "target_documents": torch.arange(3).repeat_interleave(16),
        "weights": -tensors["out.dalpha"][:, 0],
        "canvas_lengths": torch.full((3,), 16),
        "sequence_tokens": torch.full((3,), 16),
        "given_length": torch.zeros(3, dtype=torch.bool),
    }
    output = UDLMLoss()(model, items)
    torch.testing.assert_close(output.sequence_nats, tensors["out.nll_per_token"].sum(-1), rtol=1e-5, atol=1e-5)
    prompts = torch.tensor([[1, 28], [2, 28]])
    written = model.generate(prompts, seed=1, max_new_tokens=6, do_sample=True, num_steps=3).sequences
    assert torch.equal(written[:, :2], prompts)


def test_recorded_bounds_and_posteriors_are_met():
    tensors = load_file(FOLDER / "uniform.safetensors")
    logits, x, z, t = (tensors[f"nelbo.in.{name}"] for name in ("logits", "x0", "xt", "t"))

    def per_token(alpha, slope):
        noise = (1 - alpha).expand_as(x).flatten()
        filled = logits.flatten(0, 1).clone()
        kind = UniformBound(x.flatten(), torch.ones_like(noise), z.flatten(), noise)
        return kind.losses_and_gradient_(filled, 17)[0].view_as(x) * -slope

    for schedule in ("loglinear", "cosine"):
        alpha, slope, alpha_s = (tensors[f"nelbo.out.{schedule}_{name}"] for name in ("alpha", "dalpha", "alpha_s"))
        expected = tensors[f"nelbo.out.{schedule}_duo_nll_per_token"]
        torch.testing.assert_close(per_token(alpha, slope), expected, rtol=1e-9, atol=1e-9)
        kernel, p = UniformKernel(schedule=make_schedule("linear"), writable_ids=torch.arange(17)), logits.softmax(-1)
        own = p.gather(-1, z[..., None])[..., 0]
        keep, predicted, uniform, _ = kernel.posterior(z, own, 1 - alpha, 1 - alpha_s).unbind(-1)
        law = predicted[..., None] * p + uniform[..., None] / 17
        law = law.scatter_add(-1, z[..., None], keep[..., None])
        torch.testing.assert_close(law, tensors[f"nelbo.out.{schedule}_posterior_x_theta"], rtol=1e-9, atol=1e-9)
    for name in ("udlm_nll_per_token", "duo_nll_per_token_alpha_1_minus_t"):
        expected = tensors[f"nelbo.out.{name}"]
        torch.testing.assert_close(per_token(1 - t[:, None], -1.0), expected, rtol=1e-9, atol=1e-9)


def test_the_recorded_noise_of_the_curriculum_is_met():
    tensors = load_file(FOLDER / "uniform.safetensors")
    noise, slope = map(torch.from_numpy, uniform_noise(tensors["curriculum.in.gamma"].numpy(), 29))
    torch.testing.assert_close(1 - noise, tensors["curriculum.out.alpha_quad"], rtol=0, atol=1e-10)
    torch.testing.assert_close(-1.75 * slope, tensors["curriculum.out.dalpha_series"], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(-slope * 28 / 29, tensors["curriculum.out.grad_prob_quad"], rtol=1e-7, atol=1e-10)

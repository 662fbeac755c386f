"""The published score entropy diffusion: recorded results of its authors' code are met."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import xlm_hf
from tests.modeling.naive_sedd import log_scores
from xlm_hf.modeling.sedd import SEDDGenerationConfig, SEDDLoss
from xlm_hf.modeling.sedd.generation_sedd import ScoreMove
from xlm_hf.modeling.sedd.loss_sedd import RawNoiseScores

FOLDER = Path(__file__).parents[1] / "fixtures" / "published"


def recorded(kernel):
    tensors = load_file(FOLDER / f"sedd_{kernel}.safetensors")
    weights = {key.removeprefix("param."): tensor for key, tensor in tensors.items() if key.startswith("param.")}
    return tensors, weights, json.loads((FOLDER / f"sedd_{kernel}.json").read_text())


@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_recorded_results_are_met(kernel):
    tensors, weights, config = recorded(kernel)
    model = xlm_hf.convert_checkpoint(family="sedd", source="sedd", state_dict=weights, config=config)
    assert model.config.kernel == kernel
    x, z, sigma = tensors["in.x0"], tensors["in.xt"], tensors["out.sigma"]
    alpha = torch.exp(-sigma.double())
    logits = model(z, alpha=alpha).logits[..., :29]
    is_scaled = model.config.scaled_scores
    scores = log_scores(
        logits.double(), z.clamp(max=28), alpha[:, None, None], kernel, is_scaled and kernel == "absorb"
    )
    expected = tensors["out.log_score"][..., :29].double()
    # Where a clean token stands, an absorbing graph asks for no score.
    seen = z == 29 if kernel == "absorb" else torch.ones_like(z, dtype=torch.bool)
    torch.testing.assert_close(scores[seen], expected[seen], rtol=1e-5, atol=2e-5)
    masked = seen.flatten().nonzero()[:, 0]
    documents, noise = masked // 16, 1 - alpha.float()
    # The rate in sigma times its derivative; ours is in 1 - alpha, at masks times 1 - alpha.
    weights = tensors["out.dsigma"] * alpha.float() / (noise if kernel == "absorb" else 1)
    batch = {
        "input_ids": z,
        "alpha": alpha,
        "noise": noise,
        "logits_index": masked,
        "target_ids": x.flatten()[masked],
        "target_documents": documents,
        "weights": weights,
        "canvas_lengths": torch.full((3,), 16),
        "sequence_tokens": torch.full((3,), 16),
        "given_length": torch.zeros(3, dtype=torch.bool),
    }
    if kernel == "absorb":
        output = SEDDLoss()(model, batch)
        torch.testing.assert_close(output.sequence_nats, tensors["out.loss"], rtol=1e-5, atol=1e-5)
    else:
        kind = RawNoiseScores(x.flatten(), torch.ones(48).double(), z.flatten(), (1 - alpha)[documents])
        losses, _ = kind.losses_and_gradient_(logits.detach().double().flatten(0, 1).clone(), 29)
        entropies = losses * alpha[documents]
        torch.testing.assert_close(entropies, tensors["out.score_entropy"].flatten().double(), rtol=1e-4, atol=1e-4)
    prompts = torch.tensor([[1, 28], [2, 28]])
    written = model.generate(prompts, seed=1, max_new_tokens=6, do_sample=True, num_steps=3).sequences
    assert torch.equal(written[:, :2], prompts)
    assert 29 not in written


def test_recorded_analytic_steps_are_met():
    """Of uniform noise, the law that a step draws from."""
    tensors, _, _ = recorded("uniform")
    z, sigma, change = tensors["in.xt"], tensors["out.sigma"].double(), tensors["out.dsigma_step"][:, 0].double()
    expected = tensors["out.analytic_probs"]

    class Kernel:
        mask_token_id = None

        @staticmethod
        def shares(t):
            return type("Shares", (), {"alpha": torch.exp(-t)})

    of_rows = {"t": sigma, "s": sigma - change}
    times = {name: value.repeat_interleave(16) for name, value in of_rows.items()}
    options = {"uniforms": torch.zeros(7, 48), "num_ids": 29, "is_scaled": False, "noise_eps": 0}
    move = ScoreMove(Kernel(), SEDDGenerationConfig(do_sample=True), z.flatten(), **times, **options)
    made, law = move.law(tensors["out.log_score"].flatten(0, 1)).float(), expected.flatten(0, 1).clamp(min=0)
    torch.testing.assert_close(made, law, rtol=1e-4, atol=1e-5)
    assert math.isclose(float(made.sum()), float(law.sum()), rel_tol=1e-4)

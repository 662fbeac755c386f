"""The published GIDD: recorded results of its authors' code are met."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import xlm_hf
from xlm_hf.modeling.gidd import GIDDLoss
from xlm_hf.modeling.gidd.collator_gidd import bound_weights
from xlm_hf.modeling.gidd.kernel_gidd import MixedKernel
from xlm_hf.objectives.row_functions import CrossEntropy, HybridBound

FOLDER = Path(__file__).parents[1] / "fixtures" / "published"


@pytest.fixture(scope="module")
def recorded():
    return load_file(FOLDER / "gidd.safetensors")


def converted(recorded, **changes):
    weights = {key.removeprefix("param."): tensor for key, tensor in recorded.items() if key.startswith("param.")}
    config = json.loads((FOLDER / "gidd.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    return xlm_hf.convert_checkpoint(family="gidd", source="gidd", state_dict=weights, config=config)


def at_times(t, num_ids, uniform_share):
    """alpha and U / N of `MixedKernel` at times t, and the share of noise in a token that is kept."""
    alpha, mask, total = MixedKernel(uniform_share=uniform_share).shares(t)
    return alpha, mask, total / num_ids, total / num_ids / (alpha + total / num_ids)


def test_recorded_logits_bounds_and_steps_are_met(recorded):
    model = converted(recorded)
    assert (model.config.uniform_share, model.config.gamma, model.config.mask_token_id) == (0.1, 1.0, 29)
    x, z, t = (recorded[f"in.{name}"] for name in ("x0", "z", "t"))
    logits = model(z, timesteps=t).logits
    torch.testing.assert_close(logits[..., :29], recorded["out.logits"][..., :29], rtol=1e-5, atol=1e-5)
    assert (logits[..., 29] == -torch.inf).all()
    times = t.double()[:, None].expand(z.shape)
    alpha, _, u, share = at_times(times, 29, 0.1)
    weights = bound_weights(times.numpy(), share.numpy(), 1.0, (z == 29).numpy(), (z == x).numpy())
    batch = {
        "input_ids": z,
        "timesteps": t,
        "logits_index": torch.arange(48),
        "target_ids": x.flatten(),
        "target_documents": torch.arange(48),
        "weights": torch.from_numpy(weights).flatten().float(),
        "alpha": alpha.flatten().float(),
        "uniform": u.flatten().float(),
        "canvas_lengths": torch.ones(48, dtype=torch.int64),
        "sequence_tokens": torch.ones(48, dtype=torch.int64),
        "given_length": torch.zeros(48, dtype=torch.bool),
    }
    # Every token as a document of its own.
    nats = GIDDLoss()(model, batch).sequence_nats.view(z.shape)
    torch.testing.assert_close(nats, recorded["out.elbo_per_token"], rtol=1e-5, atol=1e-5)
    p = model(z, timesteps=torch.full((3,), 0.6)).logits.softmax(dim=-1)
    kernel = MixedKernel(uniform_share=0.1, mask_token_id=29, writable_ids=torch.arange(29))
    t, s = (torch.tensor(value, dtype=torch.float64) for value in (0.6, 0.5))
    keep, predicted, uniform, mask = kernel.posterior(z, p.gather(-1, z[..., None])[..., 0], t, s).unbind(-1)
    law = predicted[..., None] * p
    law[..., :29] += uniform[..., None] / 29
    law[..., 29] += mask
    law = law.scatter_add(-1, z[..., None], keep[..., None])
    expected = recorded["out.q_st"].double()
    torch.testing.assert_close(law, expected / expected.sum(dim=-1, keepdim=True), rtol=1e-5, atol=1e-5)
    written = model.generate(torch.tensor([[1, 28], [2, 28]]), seed=1, max_new_tokens=6, num_steps=3).sequences
    assert 29 not in written


@pytest.mark.parametrize("uniform_share", [0.0, 0.1])
def test_recorded_weights_and_losses_are_met(recorded, uniform_share):
    """Published weights of the bound, cut off and not, and the losses by them."""
    process = {name.removeprefix("process."): x for name, x in recorded.items() if name.startswith("process.")}
    x, logits = process["in.x0"], process["in.logits"].clone()
    z, own = process[f"in.pu{uniform_share}_z"], {}
    for name, tensor in process.items():
        own[name.removeprefix(f"out.pu{uniform_share}_")] = tensor
    t = process["in.t"][:, None].expand(x.shape)
    alpha, mask, u, share = at_times(t, 14, uniform_share)
    torch.testing.assert_close(alpha[:, :1], own["alpha"], rtol=0, atol=1e-7)
    torch.testing.assert_close(mask[:, 0], own["beta_pi"][:, 14], rtol=0, atol=1e-7)
    is_mask, is_kept = z == 14, z == x
    weights = torch.from_numpy(bound_weights(t.numpy(), share.numpy(), 1.0, is_mask.numpy(), is_kept.numpy()))
    # Without uniform noise the published code keeps a trace of it, by which it replaces tokens.
    known = is_mask | is_kept | (uniform_share > 0)
    torch.testing.assert_close(weights[known], own["elbo_weights"][known], rtol=1e-6, atol=1e-6)
    logits[..., 14] = -torch.inf
    rows = logits.flatten(0, 1)
    if uniform_share:
        bound = HybridBound(x.flatten(), torch.ones(48, dtype=torch.float64), z.flatten(), alpha.flatten(), u.flatten())
        losses = bound.losses_and_gradient_(rows, 14)[0].view(x.shape)
    else:
        losses = alpha * CrossEntropy(x.flatten(), torch.ones(48, dtype=torch.float64)).losses_and_gradient_(rows, 14)[
            0
        ].view(x.shape)
    torch.testing.assert_close((weights * losses)[known], own["elbo_per_token"][known], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        (weights.clamp(max=2) * losses)[known], own["clip_loss_per_token"][known], rtol=1e-5, atol=1e-5
    )
    # Of the published "dynamic" weights those of kept tokens are of another time.
    dynamic = own["dynamic_loss_weights"]
    changed = known & ~is_kept
    torch.testing.assert_close((2 * t * (1 - t) * weights)[changed], dynamic[changed], rtol=1e-6, atol=1e-6)


def test_what_is_missing_is_named(recorded):
    for name in ("p_uniform", "vocab_size"):
        with pytest.raises(ValueError, match=f"config has no '{name}'"):
            converted(recorded, **{name: None})
    with pytest.raises(ValueError, match="config has no 'hidden_size': did you mean 'hidden_siz'"):
        converted(recorded, hidden_size=None, hidden_siz=64)

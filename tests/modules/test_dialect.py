"""One dialect of `generate` for the diffusion families: every sampler of each with every option that they share."""

from dataclasses import fields

import pytest
import torch

from tests.modeling import naive_bd3lm, naive_gidd, naive_mdlm, naive_plaid, naive_sedd, naive_udlm
from tests.modeling.naive import BOS, MASK, PAD, batch_of

MODELS = {
    "mdlm": naive_mdlm.make_model,
    "bd3lm": lambda: naive_bd3lm.make_model(block_length=4),
    "udlm": naive_udlm.make_model,
    "udlm, denoiser": lambda: naive_udlm.make_model(prediction_type="denoiser"),
    "gidd": naive_gidd.make_model,
    "sedd, masks": naive_sedd.make_model,
    "plaid": naive_plaid.make_model,
    "sedd, noise": lambda: naive_sedd.make_model(kernel="uniform"),
}
PROMPTS, SEEDS = [[8, 9, 10], [11], [12, 13, 14, 15]], [3, 1, 4]
BLANKS = [[8, MASK, 10, MASK, MASK], [MASK, 11, MASK]]
OPTIONS = {
    "plain": {},
    "greedy": {"do_sample": False},
    "filters": {"temperature": 0.7, "top_k": 6, "top_p": 0.9},
    "suppressed": {"suppress_tokens": [8, 9]},
    "guided": {"guidance_scale": 2.0},
    "blocks": {"block_length": 2},
}


def cells():
    for family, make in MODELS.items():
        samplers = make().generation_config_class.samplers
        for sampler, kind in samplers.items():
            if family == "sedd, noise" and sampler == "confidence":
                continue
            for name in OPTIONS:
                # A canvas of noise is written whole: what is not yet reached would be noise all the same.
                if name != "blocks" or "block_length" in {field.name for field in fields(kind)}:
                    yield pytest.param(family, sampler, name, id=f"{family}-{sampler}-{name}")


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in MODELS.items()}


@pytest.mark.parametrize(("family", "sampler", "name"), cells())
def test_every_sampler_takes_every_option(models, family, sampler, name):
    """Prompts stay, nothing that is suppressed is written, and a row decodes alone as in a batch."""
    model, options = models[family], {"do_sample": True, "sampler": sampler, **OPTIONS[name]}
    width, forbidden = batch_of(PROMPTS).shape[1], {*model.config.suppressed_ids, *options.get("suppress_tokens", ())}
    output = model.generate(batch_of(PROMPTS), seed=SEEDS, max_new_tokens=6, **options)
    assert torch.equal(output.sequences[:, :width], batch_of(PROMPTS))
    assert not forbidden & set(output.sequences[:, width:].unique().tolist()) - {PAD}
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(batch_of([prompt]), seed=SEEDS[row : row + 1], max_new_tokens=6, **options)
        own = alone.sequences[0, len(prompt) + 1 :].tolist()
        assert own == output.sequences[row, width:][: len(own)].tolist()
    if name == "guided":
        plain = model.generate(batch_of(PROMPTS), seed=SEEDS, max_new_tokens=6, **{**options, "guidance_scale": None})
        assert not torch.equal(plain.sequences, output.sequences)
        assert (output.nfe % 2 == 0).all()
        return
    filled = model.generate(batch_of(BLANKS, end=()), seed=SEEDS[:2], **options).sequences
    for row, blanks in enumerate(BLANKS):
        own = filled[row][filled[row] != PAD].tolist() if PAD not in blanks else filled[row].tolist()
        given = filled[row][-len(blanks) :].tolist()
        assert [t for t, b in zip(given, blanks, strict=True) if b != MASK] == [b for b in blanks if b != MASK]
        assert MASK not in own
        assert BOS not in own
        assert not forbidden & {t for t, b in zip(given, blanks, strict=True) if b == MASK} - {PAD}


@pytest.mark.parametrize("family", MODELS)
def test_an_option_of_another_sampler_is_refused_by_name(models, family):
    model = models[family]
    with pytest.raises(ValueError, match=r"num_stepps.*did you mean 'num_steps'"):
        model.generate(batch_of(PROMPTS), num_stepps=3)
    with pytest.raises(ValueError, match="sampler"):
        model.generate(batch_of(PROMPTS), sampler="no such sampler")

"""Generation as on an accelerator: one wait for it in a step, and shapes of which there are few."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import GenerationMixin

from tests.host_reads import HostReads, as_on_an_accelerator
from xlm_hf.families import families
from xlm_hf.testing import FamilyCase

# Those whose loop is transformers' own make a step as transformers does.
FAMILIES = [name for name, family in families().items() if not issubclass(family.model_class, GenerationMixin)]
# What may stand in the options of one family or of another.
OPTIONS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "half as many steps": {"num_steps": 0.5},  # of one for each token
    "half as many steps, by a rule": {"num_steps": 0.5, "sampler": "confidence"},
    "half as many steps, by a rule in blocks": {"num_steps": 0.5, "sampler": "confidence", "block_length": 3},
    "by confidence": {"confidence_threshold": 0.3},
    "by entropy": {"entropy_bound": 0.5, "order": "entropy"},
    "in blocks": {"block_length": 2},
    "remasking": {"sampler": "remdm", "remasking": "conf", "do_sample": True},
    "first hitting": {"sampler": "first_hitting"},
    "several insertions": {"insertions_per_step": 2, "do_sample": True},
    "filtered": {"do_sample": True, "top_p": 0.9},
}


def has(family, options):
    """Whether a family has the options, and more than one sampler if they choose one."""
    config_class = families()[family].model_class.generation_config_class
    samplers = config_class.samplers if len(config_class.samplers) > 1 else ()
    return set(options) <= set(config_class.option_names()) and options.get("sampler", "") in ("", *samplers)


CASES = [(family, name) for family in FAMILIES for name, options in OPTIONS.items() if has(family, options)]


def options_of(model, name, num_tokens):
    """The options `name` for so many tokens a row."""
    options, known = {**OPTIONS[name], "max_new_tokens": num_tokens}, model.generation_config
    if "num_steps" in options:
        options["num_steps"] = int(options["num_steps"] * num_tokens)
    if not all(hasattr(known, option) for option in options):
        options.setdefault("sampler", "confidence")
    if hasattr(known, "max_rounds"):
        # More tokens take no more rounds.
        options["max_rounds"] = num_tokens // 4
    if hasattr(known, "stopping_threshold"):
        options["stopping_threshold"] = None
    return options


def recorded(model, prompt, options):
    """Decode as on an accelerator: the reads of the host, and the shapes of every call of the layers."""
    shapes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((tuple(args[0].shape), len(kwargs["output_index"]))),
        with_kwargs=True,
    )
    with as_on_an_accelerator(), HostReads() as reads:
        model.generate(**prompt, seed=[3, 1, 4], **options)
    hook.remove()
    return reads.found, shapes


def prompts_of(case, model):
    prompt = case.collator("seq2seq_prediction", model)(case.examples()[:3])
    del prompt["example_id"]
    return prompt


@pytest.mark.parametrize("family", families())
def test_what_leaves_nothing_to_write_is_refused_in_one_sentence(family):
    model = FamilyCase(family).model()
    with pytest.raises(ValueError, match="input_ids has 0 rows and needs at least 1"):
        model.generate(torch.zeros(0, 3, dtype=torch.int64))
    every = list(range(model.config.vocab_size))
    num = len(set(every) - set(model.config.suppressed_ids or ()))
    with pytest.raises(ValueError, match=f"suppress_tokens has all {num} ids that the model writes"):
        model.generate(suppress_tokens=every)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_step_waits_once_for_its_device(family, name):
    case = FamilyCase(family)
    model = case.model()
    (few, some_steps), (more, more_steps) = (
        recorded(model, prompts_of(case, model), options_of(model, name, num_tokens)) for num_tokens in (4, 12)
    )
    assert len(more_steps) > len(some_steps)
    assert len(more) - len(few) == len(more_steps) - len(some_steps), sorted(set(more))


def rounded(most):
    return {most, *(2**power for power in range(most.bit_length()) if 2**power <= most)}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_shapes_are_powers_of_two_or_the_largest(family, name):
    case = FamilyCase(family)
    model = case.model()
    prompts, num_tokens = prompts_of(case, model), 12
    options = options_of(model, name, num_tokens)
    if hasattr(model.generation_config, "use_cache"):
        # With a cache a call gets a part of the rows; how many shapes that has is in the family's own tests.
        options["use_cache"] = False
    _, shapes = recorded(model, prompts, options)
    for (rows, length), looked_at in shapes:
        written = length - prompts["input_ids"].shape[1]
        assert rows in rounded(3)
        assert written in {0, *rounded(num_tokens)}
        # The classes of a stopping head are read off one more position of each row.
        assert {looked_at, looked_at - rows} & {0, *rounded(rows * length), rows * (written + 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_for_each_shape_and_none_for_another_decode(family):
    case = FamilyCase(family, "model.num_hidden_layers=1")
    model = case.model()
    prompts, options = prompts_of(case, model), options_of(model, "sampled", 8)
    expected = model.generate(**prompts, seed=[3, 1, 4], **options).sequences
    _, shapes = recorded(model, prompts, options)
    torch._dynamo.reset()
    graphs = CompileCounter()
    model.model.compile(dynamic=False, fullgraph=True, backend=graphs)
    with as_on_an_accelerator(), torch._dynamo.config.patch(recompile_limit=64):
        assert torch.equal(model.generate(**prompts, seed=[3, 1, 4], **options).sequences, expected)
        assert graphs.frame_count == len(set(shapes))
        with torch._dynamo.config.patch(error_on_recompile=True):
            model.generate(**prompts, seed=[3, 1, 4], **options)
    torch._dynamo.reset()

"""transformers' own tests of models, `tests/test_modeling_common.py`, over every family.

Their code is not ours and not here: it lies in the source distribution of the installed version.

    pip download --no-deps --no-binary :all: transformers==VERSION
    tar xzf transformers-VERSION.tar.gz
    pip install parameterized
    TRANSFORMERS_TESTS=transformers-VERSION/tests pytest -m slow tests/test_transformers_suite.py

Without `TRANSFORMERS_TESTS` the tests are skipped, and say so.
"""

import functools
import importlib.util
import inspect
import os
import re
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers.models.auto import modeling_auto

from xlm_hf.families import families

SOURCE = os.environ.get("TRANSFORMERS_TESTS")
pytestmark = pytest.mark.slow

# Tests that are skipped, and why.
SKIPPED = {
    "test_generation_tester_mixin_inheritance": "the source distribution leaves out the tests that it asks for; "
    "tests/test_generate_arguments.py has a table of all arguments of generate"
}
# Of single families.
SKIPPED_OF = {
    "plaid": dict.fromkeys(
        ("test_inputs_embeds", "test_inputs_embeds_matches_input_ids"),
        "the model sees a second table of vectors by the ids, which it needs beside inputs_embeds",
    )
}
# For what reasons the suite itself may skip a test, and why that is no defect. Beside them are tests that need an
# accelerator, DeepSpeed or a package that is not installed, which it skips before they begin.
REASONS = {
    "_keep_in_fp32_modules": "all parts of a model have one precision",
    "prioritized model": "the suite runs these for a choice of its own",
    "sequence-to-sequence": "no family has an encoder and a decoder",
    "decoder-only": "only the left-to-right family predicts the next token",
    "position embeddings": "rotary positions have no table that could be resized",
    "omposite|subconfigs": "a model has one configuration",
    "grouped_mm|sparse experts|router_logits": "there are no experts",
    "sliding window": "every token sees the whole row",
    "TP plan": "the models are small enough for one device",
    "No conversion found": "weights have the same names in memory and in a file",
    "RoPE": "rotary positions have a base and no scaling",
    "Do not take a cache": "a bidirectional model has none",
    "non standard Cache": "a cache may hold the inputs of a short convolution too",
    "does not support SDPA": "about models that are made of several",
    "support output_attentions": "attention weights come from eager attention, see tests/modules",
    "float16 not supported": "of this device",
}


def load_suite():
    """The module `test_modeling_common`, with empty classes for what a source distribution leaves out."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [SOURCE]
    sys.modules["transformers_tests"] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        if not (Path(SOURCE) / f"{name.replace('.', '/')}.py").exists():
            folder = f"transformers_tests.{name.split('.')[0]}"
            sys.modules[folder] = types.ModuleType(folder)
            sys.modules[folder].__path__ = []
            sys.modules[f"transformers_tests.{name}"] = stub = types.ModuleType(f"transformers_tests.{name}")
            setattr(stub, mixin, type(mixin, (), {}))
    return importlib.import_module("transformers_tests.test_modeling_common")


class ModelTester:
    """What the suite asks of a family: a tiny configuration and inputs."""

    batch_size, seq_length = 3, 8
    hidden_size, num_hidden_layers, num_attention_heads, is_training = 32, 2, 4, True

    def __init__(self, family):
        self.family = family

    def prepare_config_and_inputs_for_common(self):
        config = self.family.config_class(
            vocab_size=40,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=32,
            suppress_tokens=[],
            # The suite compares logits, and takes no -inf.
            softmax_over_suppressed=True,
            **self._conditioning(),
        )
        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(7, 40, shape, generator=torch.Generator().manual_seed(0))
        ids[:, 0], ids[:, 2] = getattr(config, "cls_token_id", 5), config.bos_token_id
        inputs = {"input_ids": ids, "attention_mask": torch.ones(shape).long()}
        return config, inputs

    def _conditioning(self):
        """Where vectors go in, there is no `[BOS]` to tell the time."""
        return {"conditioning": "adaln"} if self.family.config_class().conditioning == "token" else {}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


def at_half_time(forward):
    """A forward pass that is told a time where its family needs one, of which the suite knows nothing."""
    names = {"alpha", "times", "time_left", "timesteps"} & inspect.signature(forward).parameters.keys()

    @functools.wraps(forward)
    def timed(self, *args, **kwargs):
        if names:
            tokens = next(x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
            kwargs = {**dict.fromkeys(names, torch.full((len(tokens),), 0.5, device=tokens.device)), **kwargs}
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    # A model that takes noise is one of images to the suite.
    kept = [parameter for name, parameter in signature.parameters.items() if name != "noise"]
    timed.__signature__ = signature.replace(parameters=kept)
    return timed


def case_of(name, family, suite):
    """A test case of the suite for one family."""

    def set_up(self):
        self.model_tester = ModelTester(family)
        patch = mock.patch.object(family.model_class, "forward", at_half_time(family.model_class.forward))
        patch.start()
        self.addCleanup(patch.stop)

    def skip_test(self, reason):
        assert any(re.search(pattern, reason) for pattern in REASONS), f"skipped for another reason: {reason}"
        raise unittest.SkipTest(reason)

    members = {"setUp": set_up, "skipTest": skip_test, "all_model_classes": (family.model_class,)}
    members |= {
        test: unittest.skip(reason)(lambda self: None)
        for test, reason in {**SKIPPED, **SKIPPED_OF.get(name, {})}.items()
    }
    return type(f"Test_{name}", (suite.ModelTesterMixin, unittest.TestCase), members)


if SOURCE is None:

    def test_the_suite_of_transformers():
        pytest.skip("TRANSFORMERS_TESTS names no folder with the tests of a source distribution of transformers")

elif importlib.util.find_spec("parameterized") is None:

    def test_the_suite_of_transformers():
        pytest.skip("transformers' tests need the package parameterized: install it")

else:
    common = load_suite()
    # By these tables the suite decides which tests are for a model.
    for name, family in families().items():
        modeling_auto.MODEL_MAPPING_NAMES[name] = family.model_class.__name__
        for auto_class, table in (
            ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
            ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ):
            # The others of them have no labels.
            if (
                auto_class in family.auto_classes
                and "labels" in inspect.signature(family.model_class.forward).parameters
            ):
                table[name] = family.model_class.__name__
        globals()[f"Test_{name}"] = case_of(name, family, common)

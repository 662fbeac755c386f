"""Mistakes, from tables and at random: each ends in one sentence that names the option and what it must be."""

import inspect
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests.commands import call
from tests.modeling.naive import SpecialIds
from xlm_hf.building import build_evaluation_sets, check_config, compose
from xlm_hf.cli import _check_options, main
from xlm_hf.commands import compare
from xlm_hf.commands.generate import _examples_from_file
from xlm_hf.families import families
from xlm_hf.metrics import load_metric
from xlm_hf.modeling.bd3lm import BD3LMCollator
from xlm_hf.modeling.edit_flow import EditFlowCollator
from xlm_hf.modeling.flexmdm import FlexMDMCollator
from xlm_hf.modeling.gidd import GIDDCollator
from xlm_hf.modeling.ilm import ILMCollator, ILMLoss
from xlm_hf.modeling.mdlm import MDLMCollator
from xlm_hf.modeling.mlm import MLMCollator
from xlm_hf.modeling.sedd import SEDDCollator
from xlm_hf.modeling.udlm import UDLMCollator
from xlm_hf.modules.checked_options import annotations_of
from xlm_hf.modules.noise_schedules import NOISE_SCHEDULES, make_schedule
from xlm_hf.tasks import load_task
from xlm_hf.tasks.corpora import locate
from xlm_hf.tasks.tokenizers import byte_tokenizer
from xlm_hf.training.arguments import XLMTrainingArguments
from xlm_hf.training.checkpoints import resolve_checkpoint

NAN, INF = math.nan, math.inf
INT, NUMBER, BOOL = "must be an integer", "must be a finite number", "must be true or false"
ONE, ZERO, MORE = "must be at least 1", "must be at least 0", "must be greater than 0"
SHARE, PART = "must be in (0, 1]", "must be in [0, 1)"


def refused(words, call, *args, **options):
    """That a call is refused in one sentence with these words."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(*args, **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


CONFIG = [
    *(
        (name, value, words)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for value, words in ((0, ONE), (-4, ONE), (2.5, INT), ("8", INT), (True, INT), (None, INT))
    ),
    *(("max_position_embeddings", value, words) for value, words in ((0, ONE), (1e3, INT), ("x", INT))),
    *(
        (name, value, words)
        for name in ("attention_dropout", "hidden_dropout_prob")
        for value, words in ((1.0, PART), (-0.1, PART), (NAN, NUMBER), ("0.1", NUMBER))
    ),
    *(("layer_norm_eps", value, words) for value, words in ((0.0, MORE), (NAN, NUMBER), (INF, NUMBER), (True, NUMBER))),
    *(("rope_theta", value, words) for value, words in ((0, MORE), (-1.0, MORE), (INF, NUMBER))),
    *(("partial_rotary_factor", value, words) for value, words in ((1.5, "in [0, 1]"), (NAN, NUMBER))),
    *((name, 1, BOOL) for name in ("learned_positions", "final_layer_norm", "tie_word_embeddings", "lm_head_bias")),
    *(("suppress_tokens", value, words) for value, words in (([-1], ZERO), (5, "a list of"), ([1.5], "a list of"))),
    ("intermediate_size", 0, ONE),
    ("conv_kernel_size", -1, ZERO),
    ("initialization", "xavier", "must be one of normal, fan_in"),
    ("initializer_range", -0.1, ZERO),
    ("conditioning", "adalnn", "must be one of"),
    ("hidden_act", "gleu", "is not one of"),
    ("hidden_act", 5, "must be a string"),
    ("backbone", "rotray", "must be one of"),
    ("backbone_config", [], "must be a dictionary"),
    ("backbone_config", {}, "needs a model_type"),
    ("lora", 5, "must be a dictionary"),
    ("pad_token_id", -1, ZERO),
    *(("bos_token_id", value, INT) for value in ("x", 2.5)),
    *(
        (name, value, f"{name} is {value} and vocab_size 32000")
        for name in ("pad_token_id", "bos_token_id")
        for value in (32000, 10**9)
    ),
    ("vocab_size", 4, "bos_token_id is 4 and vocab_size 4"),
    ("pad_token_id", None, INT),
]


@pytest.mark.parametrize("family", ["mdlm", "ilm"])
@pytest.mark.parametrize(("name", "value", "words"), CONFIG)
def test_options_of_configurations(family, name, value, words):
    refused(words, families()[family].config_class, **{name: value})


GENERATION = [
    *(
        (name, value, words)
        for name in ("max_new_tokens", "max_length")
        for value, words in ((0, ONE), (-3, ONE), (2.5, INT), ("8", INT), (NAN, INT), (True, INT))
    ),
    *(
        ("temperature", value, words)
        for value, words in ((0, MORE), (-1, MORE), (NAN, NUMBER), (INF, NUMBER), ("1", NUMBER))
    ),
    *(("top_p", value, words) for value, words in ((0, SHARE), (1.5, SHARE), (NAN, NUMBER), ("x", NUMBER))),
    *(("top_k", value, words) for value, words in ((-1, "must be at least"), (2.5, INT), ("all", INT))),
    *(
        (name, value, BOOL)
        for name in ("do_sample", "return_history", "return_dict_in_generate")
        for value in (1, "no")
    ),
    *(("suppress_tokens", value, "must be a list of integers") for value in (5, [1.5], ["x"], "12", [None])),
    *(("pad_token_id", value, words) for value, words in ((-1, ZERO), (1.5, INT))),
    ("eos_token_id", ["x"], "must be an integer or a list"),
    ("temprature", 1.0, "did you mean 'temperature'"),
]


@pytest.mark.parametrize("family", ["mdlm", "arlm", "ilm"])
@pytest.mark.parametrize(("name", "value", "words"), GENERATION)
def test_options_of_generation(family, name, value, words):
    refused(words, families()[family].model_class.generation_config_class, **{name: value})


SAMPLERS = [
    *(("mdlm", {"num_steps": value}, words) for value, words in ((0, ONE), (2.5, INT), (True, INT))),
    ("mdlm", {"block_length": 0}, ONE),
    ("mdlm", {"noise_schedule": 5}, "must be a string or a dictionary"),
    ("mdlm", {"noise_schedule": "linea"}, "did you mean 'linear'"),
    ("mdlm", {"sampler": 5}, "sampler must be one of"),
    ("mdlm", {"sampler": "remdm", "eta": 0}, SHARE),
    ("mdlm", {"sampler": "remdm", "eta": NAN}, NUMBER),
    ("mdlm", {"sampler": "remdm", "remasking": "none"}, "must be one of cap, rescale, conf"),
    ("mdlm", {"guidance_scale": NAN}, NUMBER),
    ("mdlm", {"eta": 0.5}, "has no option 'eta'"),
    *(("mlm", {"order": value}, "must be one of random, confidence") for value in ("left", 5, None)),
    *(("mlm", {"entropy_bound": value}, words) for value, words in ((-1, ZERO), (NAN, NUMBER), ("x", NUMBER))),
    ("mlm", {"confidence_threshold": 1.5}, SHARE),
    ("mlm", {"num_steps": 2, "entropy_bound": 1.0}, "unset all but one"),
    *(("ilm", {"insertions_per_step": value}, words) for value, words in ((0, ONE), (1.5, INT), (None, INT))),
    ("ilm", {"sampling_method": "both"}, "must be one of joint, two_stage"),
    ("ilm", {"slot_temperature": 0}, MORE),
    ("ilm", {"stopping_threshold": 2}, SHARE),
    ("udlm", {"corrector_steps": -1}, ZERO),
    ("udlm", {"corrector_steps": 1.5}, INT),
    ("udlm", {"corrector_positions": 0}, ONE),
    ("udlm", {"greedy_tail": 1}, BOOL),
    ("udlm", {"sampler": "psi", "loop_time": 0}, SHARE),
    ("flexmdm", {"counts": "poisson"}, "must be one of independent, rounded"),
    ("flexmdm", {"insertion_steps": 0}, ONE),
    ("edit_flow", {"num_steps": 0}, ONE),
    ("sedd", {"num_steps": "x"}, INT),
    ("bd3lm", {"use_cache": 1}, BOOL),
    *(("arlm", {name: -1}, "must be at least") for name in ("min_length", "num_beams", "no_repeat_ngram_size")),
    *(("arlm", {name: NAN}, NUMBER) for name in ("length_penalty", "repetition_penalty", "typical_p", "min_p")),
    ("arlm", {"bad_words_ids": [5]}, "must be a list"),
    ("arlm", {"early_stopping": "sometimes"}, "must be true or false or one of never"),
]


@pytest.mark.parametrize(("family", "options", "words"), SAMPLERS)
def test_options_of_samplers(family, options, words):
    refused(words, families()[family].model_class.generation_config_class, **options)


COLLATORS = [
    *(
        (cls, {"max_length": value}, words)
        for cls in (MDLMCollator, ILMCollator)
        for value, words in ((0, ONE), (2.5, INT), ("x", INT))
    ),
    *(
        (ILMCollator, {name: value}, words)
        for name, value, words in (("packing", 1, BOOL), ("seed", "x", INT), ("kind", 5, "string"))
    ),
    *(
        (cls, {"canvas_length": value}, words)
        for cls in (MDLMCollator, MLMCollator, UDLMCollator, SEDDCollator, GIDDCollator)
        for value, words in ((0, ONE), (1.5, INT))
    ),
    *(
        (cls, {"condition_dropout": value}, words)
        for cls in (MDLMCollator, EditFlowCollator)
        for value, words in ((1.0, PART), (NAN, NUMBER))
    ),
    *(
        (cls, {name: value}, words)
        for cls, name in (
            (MLMCollator, "mask_beta"),
            (ILMCollator, "drop_beta"),
            (FlexMDMCollator, "noise_beta"),
            (UDLMCollator, "noise_beta"),
        )
        for value, words in ((0, MORE), (NAN, NUMBER), ("x", NUMBER))
    ),
    (BD3LMCollator, {"block_length": 0}, ONE),
    (BD3LMCollator, {"masking": "exakt"}, "must be one of exact, bernoulli"),
    (BD3LMCollator, {"mask_range": [0.1]}, "must be a list of 2"),
    (BD3LMCollator, {"mask_range": [0.8, 0.3]}, "low < high"),
    (BD3LMCollator, {"mask_range": "ab"}, "must be a list of 2"),
    (SEDDCollator, {"kernel": "absorbing"}, "must be one of absorb, uniform"),
    (UDLMCollator, {"noising": 5}, "must be one of"),
    (UDLMCollator, {"curriculum": {"temperature": 0}}, MORE),
    (UDLMCollator, {"noise_schedule": ["linear"]}, "must be a string or a dictionary"),
    (GIDDCollator, {"gamma": 3}, "must be in (0, 2]"),
    (GIDDCollator, {"uniform_share": 1}, PART),
    (EditFlowCollator, {"noise_length": 0}, ONE),
]


@pytest.mark.parametrize(("cls", "options", "words"), COLLATORS)
def test_options_of_collators(cls, options, words):
    refused(words, cls, SpecialIds(40), **{"max_length": 32, "kind": "seq2seq", **options})


SCHEDULES = [
    ("cosin", "did you mean 'cosine'"),
    (5, "must be a string or a dictionary"),
    (None, "must be a string or a dictionary"),
    ({}, "does not exist"),
    ({"name": "polynomial", "power": 0}, MORE),
    ({"name": "polynomial", "power": NAN}, NUMBER),
    ({"name": "polynomial", "power": "2"}, NUMBER),
    ({"name": "polynomial", "powr": 2}, "did you mean 'power'"),
    ({"name": "log_linear", "eps": 1}, PART),
    ({"name": "clipped", "low": 0.5, "high": 0.2}, "low < high"),
    ({"name": "clipped", "low": NAN}, NUMBER),
    ({"name": "geometric", "sigma_min": 30.0}, "sigma_min must be in"),
    ({"name": "geometric", "sigma_max": INF}, NUMBER),
    ({"name": "linear", "mirrored": "yes"}, BOOL),
]


@pytest.mark.parametrize(("schedule", "words"), SCHEDULES)
def test_schedules(schedule, words):
    refused(words, make_schedule, schedule)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop_loss_weight": -1}, ZERO),
        ({"stop_loss_weight": NAN}, NUMBER),
        ({"stop_loss_weight": "1"}, NUMBER),
        ({"stop_class_weights": [1.0]}, "must be a list of 2"),
        ({"stop_class_weights": [1.0, -1.0]}, ZERO),
        ({"stop_class_weights": 1.0}, "must be a list of 2"),
    ],
)
def test_options_of_losses(options, words):
    refused(words, ILMLoss, **options)


TRAINER = [
    *(
        (name, value, words)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
        for value, words in ((0, ONE), (2.5, INT), ("x", INT))
    ),
    *(
        (name, value, words)
        for name in ("learning_rate", "weight_decay", "max_grad_norm")
        for value, words in ((-1, ZERO), (NAN, NUMBER), (INF, NUMBER))
    ),
    *(("max_steps", value, words) for value, words in ((0, ONE), (-5, ONE), (2.5, INT))),
    *((name, 0, MORE) for name in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "adam_epsilon")),
    *((name, 1.0, PART) for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor", "ema_decay")),
    *((name, 0, ONE) for name in ("keep_every", "static_length", "save_total_limit")),
    *((name, -1, ZERO) for name in ("seed", "dataloader_num_workers", "tracked_predictions", "shown_predictions")),
    *((name, "yes", BOOL) for name in ("use_ema", "save_on_exception", "remove_unused_columns")),
    ("muon_learning_rate", 0, MORE),
    ("ema_decay", NAN, NUMBER),
    ("train_sampling_strategy", "sequential", "must be one of random, group_by_length"),
]


@pytest.mark.parametrize(("name", "value", "words"), TRAINER)
def test_arguments_of_the_trainer(name, value, words, tmp_path):
    refused(words, XLMTrainingArguments, output_dir=str(tmp_path), use_cpu=True, **{name: value})


TASKS = [
    *(
        ("star_easy", {name: value}, words)
        for name in ("degree", "num_train", "num_labels")
        for value, words in ((0, ONE), (2.5, INT), ("x", INT), (None, INT))
    ),
    ("star_easy", {"min_arm_length": 1}, "must be at least 2"),
    ("star_easy", {"max_arm_length": 2}, "must be at least"),
    ("star_easy", {"path_format": "node"}, "must be one of edges, nodes"),
    ("star_easy", {"blank_rate": NAN}, NUMBER),
    ("star_easy", {"edit_rate": 2}, SHARE),
    ("star_easy", {"seed": -1}, ZERO),
    ("star_easy", {"dgree": 2}, "did you mean 'degree'"),
    ("star_esy", {}, "did you mean 'star_easy'"),
    *(
        ("text", {"path": "x", name: value}, words)
        for name, value, words in (
            ("max_length", 0, ONE),
            ("max_length", 1.5, INT),
            ("vocab_size", 0, ONE),
            ("validation_fraction", NAN, NUMBER),
            ("validation_fraction", 1, PART),
            ("test_fraction", -0.1, PART),
            ("protocol", "packd", "must be one of"),
            ("sample_by", "word", "must be one of"),
            ("long_documents", 5, "must be one of"),
            ("streaming", 1, BOOL),
            ("document_masks", "no", BOOL),
            ("num_proc", 0, ONE),
            ("mixture", {"a": 1}, "must be a list"),
            ("mixture", [5], "must be a list"),
            ("seed", 0.5, INT),
            ("text_column", 5, "must be a string"),
        )
    ),
    ("text", {"path": 5}, "must be a string"),
    ("sorting", {"length": 0}, ONE),
    ("maze", {"size": 1.5}, INT),
    ("addition", {"num_digits": "x"}, INT),
    ("countdown", {"num_numbers": 0}, ONE),
    ({"degree": 2}, {}, "needs `_target_`"),
    ({"_target_": "nope.nope"}, {}, "cannot be imported"),
]


@pytest.mark.parametrize(("task", "options", "words"), TASKS)
def test_options_of_tasks(task, options, words):
    refused(words, load_task, task, **options)


ENTRY = {"name": "a", "collator": "seq2seq", "stages": ["test"], "split": "test", "loss": True}
ENTRIES = [
    ({"stages": ["tset"]}, "must be a list of one of validation, test"),
    ({"stages": "test"}, "must be a list of"),
    ({"loss": 5}, BOOL),
    ({"num_draws": 0}, ONE),
    ({"num_samples": -3}, ONE),
    ({"num_samples": 2.5}, INT),
    ({"metrics": "exact_match"}, "must be a list of"),
    ({"metrics": [5]}, "must be a list of"),
    ({"mertics": []}, "did you mean 'metrics'"),
    ({"name": 5}, "must be a string"),
]


@pytest.mark.parametrize(("change", "words"), ENTRIES)
def test_entries_of_the_evaluation(change, words):
    refused(words, build_evaluation_sets, [{**ENTRY, **change}], None, None, None)


def test_an_entry_of_the_evaluation_that_lacks_something():
    for name in ("name", "collator", "stages"):
        entry = {key: value for key, value in ENTRY.items() if key != name}
        refused(f"needs a value for {name!r}", build_evaluation_sets, [entry], None, None, None)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("exact_mtch", "did you mean 'exact_match'"),
        ({"nme": "star_path"}, "needs `name` or `_target_`"),
        ({"name": "exact_match", "x": 1}, "has no option 'x'"),
        ({"_target_": "nope.nope"}, "cannot be imported"),
    ],
)
def test_metrics(metric, words):
    refused(words, load_metric, metric)


def test_nothing_is_left_to_be_written():
    config = families()["mdlm"].config_class(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = families()["mdlm"].model_class(config)
    refused("suppress_tokens has all 7 ids", model.generate, max_new_tokens=2, suppress_tokens=list(range(8)))


PROMPTS = [
    (b"[5]", "line 1: '5' is not an object"),
    (b'"just a string"', "line 1: 'just a string' is not an object"),
    (b'{"prompt": "a"}\n{"prompt": ', "line 2, column"),
    (b'{"prompt": "a"}\n\n{"promt": "b"}', "line 3 has no `prompt`"),
    (b'{"prompt": "caf\xe9"}', "is not UTF-8: line 1 has the byte 0xe9"),
    (b'{"prompt": ["a", "b"]}', "line 1: prompt must be a string and is ['a', 'b']"),
    (b'{"prompt": null}', "line 1: prompt must be a string and is None"),
    (b'{"prompt": NaN}', "line 1: prompt must be a string and is nan"),
    (b'{"prompt": 5}', "line 1: prompt must be a string and is 5"),
    (b'{"prompt_ids": null}', "line 1: prompt_ids must be a list of integers and is None"),
    (b'{"prompt_ids": "12"}', "line 1: prompt_ids must be a list of integers"),
    (b'{"prompt_ids": [7.5, 8]}', "line 1: prompt_ids must be a list of integers"),
    (b'{"prompt_ids": [[7, 8]]}', "line 1: prompt_ids must be a list of integers"),
    (b'{"prompt": "a"}\n{"prompt_ids": [-1, 8]}', "line 2: prompt_ids must be in [0, 262)"),
    (b'{"input_ids": [99999]}', "line 1: input_ids must be in [0, 262)"),
    (b"", "is empty"),
]


@pytest.mark.parametrize(("content", "words"), PROMPTS)
def test_files_of_prompts(content, words, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    refused(words, _examples_from_file, OmegaConf.create({"prompts": str(file)}), byte_tokenizer())


@pytest.mark.parametrize(
    "content", ['{"prompt": "ab"}\n\n{"prompt": "c"}\n', '\ufeff{"prompt": "ab"}\r\n{"prompt": "c", "id": 7}']
)
def test_lines_of_prompts_end_at_line_feeds_and_blank_ones_do_not_count(content, tmp_path):
    file, tokenizer = tmp_path / "prompts.txt", byte_tokenizer()
    file.write_text(content + '\n{"prompt": "a\u2028b"}', encoding="utf-8", newline="")
    examples, kind = _examples_from_file(OmegaConf.create({"prompts": str(file)}), tokenizer)
    assert kind == "seq2seq"
    assert [tokenizer.decode(example["prompt_ids"]) for example in examples] == ["ab", "c", "a\u2028b"]


# Of a run's config: what any job refuses, before it does anything.
TARGETS = ("json.dumps", "os.abort", "json", "builtins.dict", "math.pi", "xlm_hf.tasks.Task")
NODES = [
    *(
        (f"{node}._target_", value, f"must be the {node} of")
        for node in ("loss", "collator", "model")
        for value in TARGETS
    ),
    *((f"{node}._target_", "nope.nope", "cannot be imported") for node in ("loss", "collator", "model", "task")),
    *((f"{node}._target_", 5, "cannot be imported") for node in ("loss", "collator", "model", "task")),
    ("model._target_", "transformers.BertConfig", "must be the model of a family"),
    ("model._target_", "xlm_hf.modeling.ilm.ILMForInsertionLM", "must be the model of a family"),
    ("loss._target_", "xlm_hf.modeling.ilm.ILMCollator", "must be the loss of a family"),
    ("collator._target_", "xlm_hf.modeling.ilm.ILMLoss", "must be the collator of a family"),
    *(
        ("task._target_", value, "is no function that returns a Task")
        for value in ("os.system", "builtins.print", "json", "subprocess.Popen", "math.pi", "builtins.int")
    ),
    ("task._target_", "json.dumps", "needs a value for 'obj'"),
    ("task._target_", "xlm_hf.tasks._resolve", "has no option 'name'"),
    *((f"{node}.foo", 1, "has no option 'foo'") for node in ("trainer", "model", "loss", "collator", "task")),
    ("train_collator.foo", 1, "collator has no option 'foo'"),
    ("task.degree", "x", INT),
    ("loss.stop_loss_weight", NAN, NUMBER),
    ("model.hidden_size", "wide", INT),
    ("train_collator.drop_beta", 0, MORE),
    *(("early_stopping.patience", value, words) for value, words in ((0, ONE), (1.5, INT), ("x", INT), (NAN, INT))),
    *(("early_stopping.threshold", value, words) for value, words in ((NAN, NUMBER), (-1, ZERO), ("x", NUMBER))),
    ("budget.seconds", 0, MORE),
    *((f"trainer.{name}", "foo", "must be one of detail") for name in ("log_level", "log_level_replica")),
    *((f"trainer.{name}", "foo", "a dictionary") for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs")),
    ("trainer.torch_compile_mode", "foo", "must be one of default"),
    ("trainer.train_sampling_strategy", "foo", "must be one of random"),
    *(("trainer.per_device_eval_batch_size", value, words) for value, words in ((0, ONE), (None, INT), ("x", INT))),
    ("trainer.hub_model_id", 5, "must be a string"),
]


@pytest.fixture(scope="module")
def composed():
    return compose("ilm_star", ["size=tiny", "experiment=e"])


@pytest.mark.parametrize(("name", "value", "words"), NODES)
def test_nodes_of_a_config(name, value, words, composed):
    cfg = composed.copy()
    OmegaConf.update(cfg, name, value, force_add=True)
    refused(words, check_config, cfg)


def test_a_config_is_sound(composed):
    check_config(composed)
    # A task may leave open what a job does not ask it.
    check_config(compose("config", ["family=mlm", "task=text", "size=tiny"]))


OPTIONS = [
    *(("job", value, "must be a string") for value in (None, 5, ["train"], True)),
    ("job", "", "job is empty"),
    *((name, value, "must be a list of strings") for name in ("logger", "overrides", "quality") for value in (5, [5])),
    *((name, 5, "must be a dictionary or a list of strings") for name in ("families", "tasks")),
    ("launcher", "torchrun", "must be a list of strings"),
    ("seeds", [-1], ZERO),
    ("parallel", 0, ONE),
]


@pytest.mark.parametrize(("name", "value", "words"), OPTIONS)
def test_options_of_the_config_itself(name, value, words):
    refused(words, _check_options, OmegaConf.create({name: value}))


@pytest.mark.parametrize(
    ("families", "words"),
    [
        ({"ilm": 5}, "the options of ilm must be a list of strings or None and is 5"),
        ({"ilm": [5]}, "must be a list of strings"),
        ({"../a": None}, "must be a name that a file can have"),
        (["a/b"], "must be a name that a file can have"),
    ],
)
def test_labels_of_a_comparison(families, words):
    refused(words, compare._with_options, families)


@pytest.mark.parametrize("path", ["json:dumps", "os.path:join", "math:pi", "json:__doc__"])
def test_functions_for_data_that_are_none(path):
    refused("is no function without arguments", locate, path, "text")


PLACES = [
    *((name, "There is no checkpoint at") for name in ("run/checkpoint-3", "run/modle", "run/file/config.json")),
    *((name, "There is no checkpoint at") for name in ("./a", "../a", "a/b/c", "a b")),
    *((name, "it holds no config.json") for name in (".", "/", "run", "run/empty", "run/file")),
]


@pytest.mark.parametrize(("name", "words"), PLACES)
def test_checkpoints_that_are_not_there(name, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "empty").mkdir(parents=True)
    (tmp_path / "run" / "file").write_text("")
    refused(words, resolve_checkpoint, name)
    assert resolve_checkpoint("user/model") == "user/model"


TOOLS = [
    (["generate", "checkpoint=nowhere"], "There is no checkpoint at nowhere"),
    (["evaluate", "checkpoint=./nowhere"], "There is no checkpoint at ./nowhere"),
    (["push_to_hub", "checkpoint="], "it holds no config.json"),
    (["distill", "checkpoint=null"], "There is no checkpoint at None"),
    *((["scaffold", name], "a Python name in lower case") for name in ("A", "my-model", "../x", "_x", "class", "")),
    *((["scaffold", name], "There is a family or a package") for name in ("ilm", "os")),
    (["scaffold", "my_model", "--from", "nope"], "There is no family 'nope' to start from"),
    (["scaffold", "my_model", "--output", "."], "exists already"),
    (["convert", "--from", "nope", "x", "out"], "No family converts 'nope'"),
    *((["convert", "--from", "xlm-core", name, "out"], "There is no checkpoint at") for name in ("nope", "", "/", ".")),
    (["convert", "--from", "xlm-core", "number.ckpt", "out"], "is not a Lightning checkpoint"),
    (["convert", "--from", "xlm-core", "average.ckpt", "out"], "is not a Lightning checkpoint"),
    (["convert", "--from", "xlm-core", "list.ckpt", "out"], "is not a Lightning checkpoint"),
    *(
        (["convert", "--from", "xlm-core", "good.ckpt", "out", "--config", f"{name}.json"], f"{name}.json is truncated")
        for name in ("list", "cut", "bytes")
    ),
    (["convert", "--from", "xlm-core", "good.ckpt", "out"], "give the constructor arguments by --config"),
    (["convert", "--from", "mdlm", "good.ckpt", "out", "--config", "good.json"], "The checkpoint's config has no"),
]


@pytest.mark.parametrize(("arguments", "words"), TOOLS)
def test_tools_and_jobs_without_a_config(arguments, words, monkeypatch, capsys, tmp_path):
    weights = {"model.a": torch.ones(2)}
    checkpoints = {"number": {"state_dict": {"a": "x"}}, "average": {"state_dict": weights, "ema": 5}, "list": [5]}
    for name, content in {**checkpoints, "good": {"state_dict": weights}}.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
    for name, text in {"list": b"[1]", "cut": b'{"a": ', "bytes": b"\xff", "good": b'{"a": 1}'}.items():
        (tmp_path / f"{name}.json").write_bytes(text)
    before = {*tmp_path.iterdir()}
    first = arguments if arguments[0] in ("scaffold", "convert") else [f"job={arguments[0]}", *arguments[1:]]
    status, _, err = call(monkeypatch, capsys, tmp_path, *first)
    assert (status, words in err) == (2, True), err
    assert err.count("\n") == 1
    assert {*tmp_path.iterdir()} == before


# Of the command line: what stands behind a run that would be made.
LINES = [
    ("job=prepare_data loss.foo=1", "loss has no option 'foo'"),
    ("job=generate trainer.foo=1", "trainer has no option 'foo'"),
    ("job=evaluate early_stopping.patience=0", ONE),
    ("loss._target_=null", "cannot be imported"),
    ("job=null", "job must be a string and is None"),
    *(
        (f"trainer.{option}", words)
        for option, words in (
            ("max_steps=0", ONE),
            ("learning_rate=nan", NUMBER),
            ("per_device_eval_batch_size=-1", ONE),
            ("learning_rate=fast", NUMBER),
        )
    ),
    *((f"{option}=5", "must be a dictionary") for option in ("budget", "early_stopping")),
    ("budget.tokens=nan", NUMBER),
    ("budget.tokns=4", "did you mean 'tokens'"),
    ("seed=-1", ZERO),
    ("seed=1.5", INT),
    ("num_threads=0", "num_threads must be in [1, 1024]"),
    ("num_samples=2.5", INT),
    ("output_dir=", "output_dir is empty"),
    ("prompts=", "prompts is empty"),
    ("experiment=../a", "experiment must be a name and is '../a'"),
    ("ema=5", BOOL),
    ("trust_remote_code=5", BOOL),
    ("prompts=[a]", "prompts must be a string or None"),
    ("output_dir=[1]", "output_dir must be a string or None"),
    ("loss.stop_loss_weight=-1", ZERO),
    ("generation.max_new_tokens=2.5", INT),
    ("task.evaluation=5", "task.evaluation must be a list of"),
    ("job=_run", "There is no job '_run'"),
]


def command(monkeypatch, capsys, folder, *arguments):
    """Exit status and last line of a command line, run in this process."""
    monkeypatch.chdir(folder)
    tiny = ["--config-name", "ilm_star", "size=tiny", "task.num_train=40", "task.num_validation=4", "task.num_test=4"]
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", *tiny, "debug=print_batch", "output_dir=out", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(("argument", "words"), LINES)
def test_mistakes_on_the_command_line(argument, words, monkeypatch, capsys, tmp_path):
    status, line = command(monkeypatch, capsys, tmp_path, *argument.split(" "))
    assert status == 2, line
    assert line.startswith("Error: ")
    assert words in line


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says: written anew, and the plain way."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        low, high = map(float, args[1].text[1:-1].split(","))
        numbers = [] if value is None else value if isinstance(value, list) else [value]
        return fits(value, args[0]) and all(
            (low <= n if args[1].text[0] == "[" else low < n) and (n <= high if args[1].text[-1] == "]" else n < high)
            for n in numbers
        )
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if origin is Literal:
        return type(value) in map(type, args) and value in args
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(fits(entry, args[0]) for entry in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < INF
    return type(value) is {Mapping: dict, None: type(None)}.get(origin or kind, origin or kind)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 7, 64, 10**30, -(10**9)]),
    st.sampled_from([0.0, 0.5, 1.0, -0.1, 1.5, 1e-300, 1e300, NAN, INF, -INF]),
    st.sampled_from(["", "x", "nan", "linear", "confidence", "none", "5", "\n"]),
    st.lists(st.sampled_from([0, -1, 3, 0.5, "a", None]), max_size=3),
    st.just({"name": "linear"}),
)


def targets() -> list[tuple[Any, str, Any]]:
    """Every option of every configuration, generation config and sampler: how it is given, its name and annotation."""
    found: list[tuple[Any, str, Any]] = []
    for family in families().values():
        found += [(family.config_class, name, kind) for name, kind in annotations_of(family.config_class).items()]
        generation = family.model_class.generation_config_class
        # `sampler` is a choice of the class, which its annotation does not say.
        found += [(generation, n, k) for n, k in annotations_of(generation).items() if n != "sampler"]
        for label, sampler in getattr(generation, "samplers", {}).items():
            found += [
                (lambda g=generation, s=label, **o: g(sampler=s, **o), n, k) for n, k in annotations_of(sampler).items()
            ]
    for schedule in NOISE_SCHEDULES.values():
        found += [(schedule, name, p.annotation) for name, p in inspect.signature(schedule).parameters.items()]
    return found


def check_at_random(target, value):
    make, name, kind = target
    try:
        made = make(**{name: value})
    except ValueError:
        return
    # transformers' generation config takes None for an option that is not given.
    assert fits(value, kind) or value is None, f"{name}={value!r} was accepted as {getattr(made, name)!r}"


RELAXED = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **RELAXED)
@given(target=st.sampled_from(targets()), value=VALUES)
def test_options_at_random(target, value):
    check_at_random(target, value)


@pytest.mark.slow
@settings(max_examples=2000, **RELAXED)
@given(target=st.sampled_from(targets()), value=VALUES)
def test_many_options_at_random(target, value):
    check_at_random(target, value)

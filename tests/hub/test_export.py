import ast
import copy
import errno
import inspect
import json
import os
import re
import resource
import subprocess
import sys
import textwrap
import tomllib
import types
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import xlm_hf
from tests.clean_environment import clean_python, run_python  # noqa: F401 - a fixture
from tests.processes import forked
from xlm_hf import families as registry
from xlm_hf.families import Family, families
from xlm_hf.hub.card import render_card
from xlm_hf.hub.export import export_code, family_code
from xlm_hf.modeling.ilm import ILMConfig, ILMForInsertionLM
from xlm_hf.tasks.tokenizers import with_prompt_layout

ROOT = Path(__file__).parents[2]
SPECIAL_TOKENS = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "CLS", "MASK", "EOS", "BOS", "UNK")}
CODE_FILES = {
    "attention_patterns.py",
    "backbone_config.py",
    "checked_inputs.py",
    "checked_options.py",
    "configuration_ilm.py",
    "counter_random.py",
    "devices.py",
    "edits.py",
    "generation.py",
    "generation_ilm.py",
    "generation_output.py",
    "language_model.py",
    "messages.py",
    "prompts.py",
    "modeling_ilm.py",
    "rotary_transformer.py",
    "short_convolution.py",
    "time_conditioning.py",
    "text_generation_pipeline.py",
    "vocabulary_head.py",
    "token_sampling.py",
    "transformer_backbone.py",
}
WEIGHT_FILES = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
PROMPTS = ["a b c", "d"]
CARD_VARIABLES = {
    "model_id": "user/tiny",
    "parameters": 31264,
    "experiment": "ilm_star",
    "task": "star_easy",
    "dataset": "50,000 star graphs",
    "steps": 12000,
    "seed": [1, 2],
    "config": "task:\n  name: star_easy\n",
    "metrics": {
        "test/exact_match": 0.98765,
        "test/exact_match_standard_error": 0.00123,
        "test/perplexity": float("inf"),
        "test/stop_accuracy": 0.5,
        "test/sequence_nll": 1.5,
        "test/samples": 5000,
        "test/seconds": 3.5,
        "parameters": 31264,
    },
    "protocol": "One decode of each test example with seed 0.",
    "samples": [{"prompt": "a b", "prediction": "c d", "reference": "c e"}, {"prediction": "f"}],
}


@pytest.fixture(scope="module")
def tokenizer():
    tokens = [*SPECIAL_TOKENS.values(), *"abcdefghijklmnopqrstu"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ILMConfig(
        vocab_size=27,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        suppress_tokens=[0, 1, 2, 3, 4, 5],
    )
    # `Trainer` does this to the config of every model.
    config.use_cache = False
    model = ILMForInsertionLM(config).eval()
    # An untrained model would stop before it has written anything.
    model.generation_config.stopping_threshold = 1.0
    return model


@pytest.fixture(autouse=True)
def transformers_warnings(caplog):
    """Let caplog see what transformers says, which by default stays in its own handler."""
    transformers.logging.enable_propagation()
    yield
    transformers.logging.disable_propagation()
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def files_of(folder):
    return {path.name for path in Path(folder).iterdir()}


def generate(model, tokenizer):
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    output = model.generate(inputs.input_ids, inputs.attention_mask, do_sample=True, seed=7)
    return output.sequences.tolist()


LOAD = """
    import json, sys
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    source, copied = sys.argv[1:]
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(source, **trust)
    assert type(config).__module__.startswith("transformers_modules."), type(config).__module__
    tokenizer = AutoTokenizer.from_pretrained(source, **trust)
    inputs = tokenizer(%r, padding=True, return_tensors="pt")
    model, info = AutoModel.from_pretrained(source, output_loading_info=True, **trust)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert model.config.to_dict() == config.to_dict() | {"dtype": model.config.to_dict()["dtype"]}
    assert model.generation_config.stopping_threshold == 1.0
    output = model.generate(inputs.input_ids, inputs.attention_mask, do_sample=True, seed=7)
    model.save_pretrained(copied)
    tokenizer.save_pretrained(copied)
    print(json.dumps(output.sequences.tolist()))
""" % (PROMPTS,)  # noqa: UP031 - the script is full of braces


def test_an_export_works_where_only_torch_and_transformers_are_installed(model, tokenizer, clean_python, tmp_path):
    xlm_hf.export_model(model, tokenizer, tmp_path / "first")
    expected = generate(model, tokenizer)
    assert expected[0][0] != expected[1][0] == tokenizer.pad_token_id
    assert all(sum(token > 5 for token in row) > 10 for row in expected)

    for source, copied in (("first", "second"), ("second", "third")):
        home = tmp_path / f"home of {source}"
        out = clean_python(LOAD, tmp_path / source, tmp_path / copied, home=home, cwd=tmp_path)
        assert json.loads(out) == expected
        # What stock code saves again is what was there before, the card apart.
        assert files_of(tmp_path / copied) == files_of(tmp_path / "first") - {"README.md"}
        for name in CODE_FILES | {"config.json", "generation_config.json", "model.safetensors"}:
            assert (tmp_path / copied / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


def test_the_examples_of_the_card_run_as_written(model, tokenizer, clean_python, tmp_path):
    tokenizer = with_prompt_layout(tokenizer, [1], [4])
    prompts, examples, shown = {"empty": [1, 4], "prompted": [1, 6, 7, 4]}, [], []
    for name, prompt in prompts.items():
        sequence = model.generate(torch.tensor([prompt]), seed=[9]).sequences[0, len(prompt) :]
        sample = {"prompt": tokenizer.decode(prompt, skip_special_tokens=True).strip(), "seed": 9, "is_filled": False}
        sample["prediction"] = tokenizer.decode(sequence, skip_special_tokens=True).strip()
        xlm_hf.export_model(model, tokenizer, tmp_path / name, {"samples": [sample]})
        card = (tmp_path / name / "README.md").read_text()
        examples += re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        shown += re.findall(r"It prints\n\n````text\n(.*?)\n````", card, re.DOTALL)
    out = clean_python("\n".join(examples), home=tmp_path / "home", cwd=tmp_path)
    assert out.splitlines() == shown
    assert all(len(text) > 10 for text in shown)


def test_an_export_holds_these_files_and_no_others(model, tokenizer, tmp_path):
    assert xlm_hf.export_model(model, tokenizer, tmp_path / "model") == tmp_path / "model"
    assert files_of(tmp_path) == {"model"}
    assert files_of(tmp_path / "model") == CODE_FILES | WEIGHT_FILES | TOKENIZER_FILES | {"README.md"}
    saved = safetensors.torch.load_file(tmp_path / "model/model.safetensors")
    state = model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask


def test_the_code_imports_only_what_transformers_brings_along_and_its_neighbours(model, tmp_path):
    model.save_pretrained(tmp_path)
    imported = {}
    for name in CODE_FILES:
        tree = ast.parse((tmp_path / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = ["." * node.level + (node.module or "")]
            else:
                continue
            for module in modules:
                imported.setdefault(module if module.startswith(".") else module.split(".")[0], set()).add(name)
    relative = {module[1:] + ".py" for module in imported if module.startswith(".")}
    # The model's own file is what the others are reached from.
    assert relative == CODE_FILES - {"modeling_ilm.py"}
    absolute = {module for module in imported if not module.startswith(".")}
    # transformers itself writes its configurations with huggingface_hub, which it requires.
    assert absolute <= {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names, imported
    # The loader of transformers must find the same files by its regular expression.
    found = transformers.dynamic_module_utils.get_relative_import_files(tmp_path / "modeling_ilm.py")
    assert {Path(file).name for file in found} == relative


def test_config_names_every_auto_class_and_nothing_else(model, tokenizer, tmp_path):
    xlm_hf.export_model(model, tokenizer, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_ilm.ILMConfig",
        "AutoModel": "modeling_ilm.ILMForInsertionLM",
    }
    assert config["custom_pipelines"] == {
        "text-generation": {"impl": "text_generation_pipeline.XLMTextGenerationPipeline", "pt": ["AutoModel"]}
    }
    standard = {"architectures", "auto_map", "custom_pipelines", "dtype", "model_type", "transformers_version"}
    assert set(config) - standard <= set(ILMConfig.__dataclass_fields__) - {"use_cache"}
    # Saved from memory or from a folder, no path of this machine gets in.
    again = AutoModel.from_pretrained(tmp_path / "model")
    xlm_hf.export_model(again, AutoTokenizer.from_pretrained(tmp_path / "model"), tmp_path / "again")
    for file in [*(tmp_path / "model").iterdir(), *(tmp_path / "again").iterdir()]:
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_saving_leaves_the_config_in_memory_alone(model, tmp_path, monkeypatch):
    # What is registered below stays in this test.
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    before = copy.deepcopy(vars(model.config))
    model.save_pretrained(tmp_path / "first")
    assert not hasattr(model.config, "auto_map")
    assert {**before, **vars(model.config), "dtype": None, "architectures": None} == {
        **before,
        "dtype": None,
        "architectures": None,
    }
    model.save_pretrained(tmp_path / "first")
    xlm_hf.register_family(ILMConfig, ILMForInsertionLM)
    model.save_pretrained(tmp_path / "second")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second") == CODE_FILES | WEIGHT_FILES
    model.config.save_pretrained(tmp_path / "config alone")
    assert files_of(tmp_path / "config alone") == CODE_FILES | {"config.json"}
    assert type(AutoModel.from_config(model.config)) is ILMForInsertionLM


def test_the_installed_package_loads_its_own_class_without_trust(model, tokenizer, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked for trust, or ran code from the folder")

    xlm_hf.export_model(model, tokenizer, tmp_path / "model")
    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(transformers.models.auto.auto_factory, "get_class_from_dynamic_module", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for trust in ({}, {"trust_remote_code": True}):
            loaded = AutoModel.from_pretrained(tmp_path / "model", **trust)
            assert type(loaded) is ILMForInsertionLM
            assert type(loaded.config) is ILMConfig
            assert type(AutoConfig.from_pretrained(tmp_path / "model", **trust)) is ILMConfig
            assert generate(loaded, AutoTokenizer.from_pretrained(tmp_path / "model", **trust)) == generate(
                model, tokenizer
            )
            # The config carries the auto_map of the file now, and must serve as before.
            assert type(AutoModel.from_config(loaded.config)) is ILMForInsertionLM
            loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "model/config.json").read_bytes()


def test_a_model_that_is_not_registered_is_saved_without_code_and_says_so(model, tmp_path):
    class OtherModel(ILMForInsertionLM):
        pass

    model.save_pretrained(tmp_path / "registered")
    other = OtherModel(AutoConfig.from_pretrained(tmp_path / "registered"))
    with pytest.warns(UserWarning, match=r"OtherModel is not registered: call xlm_hf.register_family"):
        other.save_pretrained(tmp_path / "other")
    assert files_of(tmp_path / "other") == WEIGHT_FILES
    assert "auto_map" not in json.loads((tmp_path / "other/config.json").read_text())


def test_families_are_kept_in_order_with_their_auto_classes():
    assert "ilm" in families()
    ilm = families()["ilm"]
    assert (ilm.config_class, ilm.model_class) == (ILMConfig, ILMForInsertionLM)
    assert ilm.auto_classes == ("AutoModel",)
    families().clear()
    assert "ilm" in families()


def test_a_class_in_main_is_refused(monkeypatch):
    monkeypatch.setattr(ILMForInsertionLM, "__module__", "__main__")
    with pytest.raises(ValueError, match="ILMForInsertionLM is defined in __main__: move it to a file of its own"):
        xlm_hf.register_family(ILMConfig, ILMForInsertionLM)


@pytest.fixture
def family_of(tmp_path, monkeypatch):
    """Make a family whose model lies in a file of the given source, with `other.py` and `token_sampling.py` beside."""

    def make(source):
        (tmp_path / "modeling_x.py").write_text(textwrap.dedent(source))
        (tmp_path / "other.py").write_text("from .modeling_x import X\n")
        (tmp_path / "token_sampling.py").write_text("")
        module = types.ModuleType("modeling_x")
        module.__file__ = str(tmp_path / "modeling_x.py")
        monkeypatch.setitem(sys.modules, "modeling_x", module)
        return Family(
            type("XConfig", (), {"__module__": "modeling_x"}), type("X", (), {"__module__": "modeling_x"}), ()
        )

    return make


def test_imports_are_followed_and_made_relative(family_of):
    source = """
        import torch
        from xlm_hf.modules.token_sampling import (
            filter_logits,
        )

        def f():
            from .other import y
            from  xlm_hf.modules.counter_random  import uniform
    """
    code = family_code(family_of(source))
    assert set(code) == {"modeling_x.py", "other.py", "token_sampling.py", "counter_random.py"}
    assert code["modeling_x.py"] == textwrap.dedent(source).replace("from xlm_hf.modules", "from ").replace(
        "from  xlm_hf.modules.counter_random  import", "from .counter_random import"
    )
    assert code["counter_random.py"] == (ROOT / "xlm_hf/modules/counter_random.py").read_text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from xlm_hf.training.trainer import XLMTrainer", "from xlm_hf.training.trainer import XLMTrainer"),
        ("from xlm_hf.modeling.ilm import ILMConfig", "from xlm_hf.modeling.ilm import ILMConfig"),
        ("from xlm_hf.modules import generation", "from xlm_hf.modules import generation"),
        ("import xlm_hf.modules.generation", "import xlm_hf.modules.generation"),
        ("import torch, xlm_hf", "import torch, xlm_hf"),
        ("from . import other", "from . import other"),
        ("from .. import other", "from .. import other"),
        ("from ..package.other import x", "from ..package.other import x"),
        ("from .sub.other import x", "from .sub.other import x"),
        ("if True: from .other import x", "from .other import x"),
    ],
)
def test_an_import_that_an_export_cannot_carry_is_refused(line, said, family_of, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"modeling_x.py says '{said}', which an export cannot carry")):
        export_code(family_of(line), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["from .nothing import x", '"""Example:\n\n    from .nothing import x\n"""'])
def test_an_import_of_no_file_is_refused(source, family_of):
    with pytest.raises(ValueError, match=r"imports from .*nothing.py, which is no file"):
        family_code(family_of(source))


def test_two_files_of_one_name_are_refused(family_of):
    source = "from .token_sampling import x\nfrom xlm_hf.modules.token_sampling import y"
    with pytest.raises(ValueError, match=r"token_sampling.py and .*token_sampling.py would be exported under one name"):
        family_code(family_of(source))


class BrokenTokenizer:
    """Saves nothing; what `fail` raises comes out of the library that does the writing."""

    def __init__(self, fail):
        self.save_pretrained = fail


FULL_DISK = {
    "python": lambda folder: Path("/dev/full").write_text("x"),
    "tokenizers": lambda folder: tokenizers.Tokenizer(tokenizers.models.BPE()).save("/dev/full"),
    "quota": lambda folder: (_ for _ in ()).throw(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
}


@pytest.fixture
def earlier(model, tokenizer, tmp_path):
    xlm_hf.export_model(model, tokenizer, tmp_path / "model")
    return {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}


def assert_intact(earlier, tmp_path):
    assert files_of(tmp_path) == {"model"}
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == earlier


@pytest.mark.parametrize("writer", FULL_DISK)
def test_a_full_disk_leaves_the_earlier_export_intact(writer, earlier, model, tmp_path):
    model.lm_head.weight.data.zero_()
    sentence = rf"^{tmp_path}/model could not be written \(.*\); what was saved before is intact: free disk space"
    with pytest.raises(OSError, match=sentence):
        xlm_hf.export_model(model, BrokenTokenizer(FULL_DISK[writer]), tmp_path / "model")
    assert_intact(earlier, tmp_path)
    with pytest.raises(OSError, match=r"/new could not be written"):
        xlm_hf.export_model(model, BrokenTokenizer(FULL_DISK[writer]), tmp_path / "new")
    assert_intact(earlier, tmp_path)


def test_weights_that_cannot_be_written_leave_the_earlier_export_intact(earlier, model, tokenizer, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"/model could not be written \(.*File too large"):
            xlm_hf.export_model(model, tokenizer, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_intact(earlier, tmp_path)


def test_an_interrupted_export_leaves_the_earlier_one_intact(earlier, model, tmp_path):
    def interrupt(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        xlm_hf.export_model(model, BrokenTokenizer(interrupt), tmp_path / "model")
    assert_intact(earlier, tmp_path)


def test_a_new_export_replaces_the_earlier_one_whole(earlier, model, tokenizer, tmp_path):
    (tmp_path / "model/modeling_old.py").write_text("")
    (tmp_path / "model.incomplete").mkdir()
    (tmp_path / "model.incomplete/left behind").write_text("")
    model.lm_head.weight.data.zero_()
    xlm_hf.export_model(model, tokenizer, tmp_path / "model")
    assert files_of(tmp_path) == {"model"}
    assert files_of(tmp_path / "model") == set(earlier)
    assert not AutoModel.from_pretrained(tmp_path / "model").lm_head.weight.any()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "README.md", "optimizer.pt"], "'optimizer.pt'"),
        (["config.json", "README.md", ".git/config"], "'.git'"),
        (["thesis.md", "modeling.py"], "files but no exported model"),
        (["config.json", "model.safetensors"], "files but no exported model"),
    ],
)
def test_a_folder_that_holds_something_else_is_not_deleted(files, said, model, tokenizer, tmp_path):
    for name in files:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"folder holds {said}, which an export would delete: name a new or an empty"):
        xlm_hf.export_model(model, tokenizer, tmp_path / "folder")
    assert all((tmp_path / "folder" / name).read_text() == "mine" for name in files)


def test_a_model_of_no_family_is_refused(tokenizer, tmp_path):
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="'bert' is not a registered family: call"):
        xlm_hf.export_model(bert, tokenizer, tmp_path / "model")
    assert files_of(tmp_path) == set()


def test_a_full_card_says_everything():
    card = ModelCard(render_card(families()["ilm"], CARD_VARIABLES))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["xlm-hf", "non-autoregressive", "ilm"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == ("exact_match", "test/exact_match", 0.98765)
    assert result.metric_args == {"samples": 5000, "standard_error": 0.00123}
    assert result.dataset_name == "star_easy"
    assert card.text.startswith("\n# tiny\n")
    assert "| test/exact_match | 0.9877 | 0.0012 | 5,000 |" in card.text
    assert "- Optimiser steps: 12,000\n- Seed: 1, 2\n" in card.text
    (config,) = re.findall(r"<details>.*?```yaml\n(.*?)```\n\n</details>", card.text, re.DOTALL)
    assert yaml.safe_load(config) == {"task": {"name": "star_easy"}}
    assert "````text\nprompt     a b\nprediction c d\nreference  c e\n````\n\n````text\nprediction f\n````" in card.text
    assert "One decode of each test example with seed 0." in card.text
    for part in ("31,264 parameters", "`ilm_star`", "50,000 star graphs", "2505.05755", "2512.17065"):
        assert part in card.text


@pytest.mark.parametrize("folder", [False, True])
def test_weights_from_elsewhere_keep_their_licence(folder, tmp_path):
    (tmp_path / "theirs").mkdir()
    source = str(tmp_path / "theirs") if folder else "somebody/theirs"
    card = ModelCard(render_card(families()["ilm"], {"base_model": source}))
    assert card.data.license is None
    assert card.data.base_model == (None if folder else source)
    assert f"come from `{'theirs' if folder else source}` and are under its licence" in card.text.replace("\n", " ")
    assert "for code and weights" not in card.text
    assert str(tmp_path) not in card.content


def test_sections_without_content_are_left_out():
    sections = {"Use", "Training", "Results", "Samples", "Limitations", "Licence", "Citation"}
    for variables, missing in (
        (CARD_VARIABLES, set()),
        ({"model_id": "m", "seed": 0}, {"Results", "Samples"}),
        ({}, {"Use", "Training", "Results", "Samples"}),
    ):
        text = render_card(families()["ilm"], variables)
        assert set(re.findall(r"^## (.*)$", text, re.MULTILINE)) == sections - missing
        assert "{{" not in text
        assert "{%" not in text
        assert "\n\n\n" not in text
        assert ModelCard(text).data.to_dict()["tags"]
    assert ModelCard(text).data.eval_results is None


def test_a_family_without_a_card_gets_the_common_one():
    class NamelessConfig(ILMConfig):
        model_type = "nameless"

    text = render_card(Family(NamelessConfig, ILMForInsertionLM, ("AutoModel",)), CARD_VARIABLES)
    assert ModelCard(text).data.tags[-1] == "nameless"
    assert "A `ILMForInsertionLM` (`nameless`), trained with xlm-hf" in text


def test_a_family_of_another_package_has_its_card_beside_its_configuration(tmp_path, monkeypatch):
    (tmp_path / "hub_card.md").write_text('{% extends "_base.md" %}\n{% block family %}\nMine alone.\n{% endblock %}\n')
    monkeypatch.setattr(inspect, "getfile", lambda _: str(tmp_path / "configuration_mine.py"))
    text = render_card(families()["ilm"], CARD_VARIABLES)
    assert "Mine alone." in text
    assert "An insertion language model" not in text


def test_a_variable_that_no_card_has_is_refused():
    with pytest.raises(ValueError, match=r"A model card has no variable 'seeds': did you mean 'seed'\?"):
        render_card(families()["ilm"], {"seeds": [0]})


def test_the_public_names_are_these():
    assert sorted(xlm_hf.__all__) == sorted(
        [
            "EvaluationSet",
            "LossOutput",
            "XLMTrainer",
            "XLMTrainingArguments",
            "__version__",
            "convert_checkpoint",
            "export_model",
            "load_metric",
            "load_task",
            "register_family",
        ]
    )
    assert set(xlm_hf.__all__) <= set(dir(xlm_hf))
    for name in xlm_hf.__all__:
        assert getattr(xlm_hf, name) is not None
    with pytest.raises(AttributeError, match="module 'xlm_hf' has no attribute 'nothing'"):
        xlm_hf.nothing  # noqa: B018


def test_version_is_that_of_the_project():
    assert xlm_hf.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    out = run_python(
        """
        import sys
        from transformers import AutoModel, PreTrainedModel
        before = {name.split(".")[0] for name in sys.modules}
        import xlm_hf
        print(*{name.split(".")[0] for name in sys.modules} - before)
        print(*sorted(name for name in sys.modules if name.startswith("xlm_hf.") and name.count(".") == 1))
        """,
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    new, ours = out.splitlines()
    # psutil is what transformers' GenerationMixin loads.
    assert set(new.split()) <= {"xlm_hf", "tokenizers", "psutil"} | sys.stdlib_module_names
    assert ours == "xlm_hf.families xlm_hf.files xlm_hf.hub xlm_hf.modeling xlm_hf.modules xlm_hf.objectives"


def run_forked(script, *arguments, env, cwd):
    """Run a script to which it does not matter what is imported, this package apart."""
    command = forked("-c", textwrap.dedent(script), *arguments)
    result = subprocess.run(command, env={**os.environ, **env}, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def copy_tree_with_links_as_text(target):
    """Copy what the package needs as a zip archive of the repository gives it: a link is a file with its target."""
    for path in sorted(ROOT.rglob("*")):
        relative = path.relative_to(ROOT)
        if relative.parts[0] not in ("xlm_hf", "modeling", "hub_cards") or "__pycache__" in relative.parts:
            continue
        if path.is_symlink():
            (target / relative).write_text(str(path.readlink()))
        elif path.is_file() and not any((ROOT / parent).is_symlink() for parent in relative.parents):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            (target / relative).write_bytes(path.read_bytes())


def test_links_that_became_text_files_and_a_broken_family_do_no_harm(tmp_path):
    copy_tree_with_links_as_text(tmp_path)
    assert (tmp_path / "xlm_hf/modeling").is_file()
    (tmp_path / "modeling/half_written").mkdir()
    (tmp_path / "modeling/half_written/__init__.py").write_text("def f(:")
    out = run_forked(
        """
        import sys, warnings
        with warnings.catch_warnings(record=True) as heard:
            import xlm_hf
        (message,) = [str(w.message) for w in heard if "half_written" in str(w.message)]
        assert message.startswith("The family xlm_hf.modeling.half_written is left out because it cannot be imported: ")
        from xlm_hf.families import families
        from xlm_hf.hub.card import render_card
        from xlm_hf.modeling.ilm import ILMConfig
        assert xlm_hf.__file__.startswith(sys.argv[1]), xlm_hf.__file__
        ILMConfig().save_pretrained(sys.argv[1] + "/saved")
        print(render_card(families()["ilm"], {}))
        """,
        tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert "insertion language model" in out
    assert files_of(tmp_path / "saved") == CODE_FILES | {"config.json"}


def test_families_of_other_packages_register_themselves(tmp_path):
    """One is found by its entry point, whoever is imported first; one that is broken is named and left out."""
    package = tmp_path / "outside/wordy"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("import outside.wordy\n")
    (package / "__init__.py").write_text(
        "from xlm_hf import register_family\n"
        "from .modeling_wordy import WordyConfig, WordyModel\n"
        "register_family(WordyConfig, WordyModel)\n"
    )
    (package / "modeling_wordy.py").write_text(
        "from xlm_hf.modules.rotary_transformer import RotaryTransformer, RotaryTransformerConfig\n"
        "class WordyConfig(RotaryTransformerConfig):\n"
        "    model_type = 'wordy'\n"
        "    pad_token_id: int | None = 0\n"
        "class WordyModel(RotaryTransformer):\n"
        "    config: WordyConfig\n"
    )
    metadata = tmp_path / "outside-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[xlm_hf.families]\nwordy = outside.wordy\nbroken = outside.broken\n")
    script = """
        import sys, warnings
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            import {first}
        from transformers import AutoModel
        from xlm_hf.families import families
        print([str(w.message) for w in heard if "outside" in str(w.message)])
        print(list(families())[-1])
        config = families()["wordy"].config_class(vocab_size=8, hidden_size=8, num_attention_heads=1)
        AutoModel.from_config(config).save_pretrained(sys.argv[1])
        print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)
    """
    for first in ("xlm_hf", "outside"):
        out = run_forked(
            script.format(first=first),
            tmp_path / f"saved after {first}",
            env={"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
            cwd=tmp_path,
        )
        heard, last, name = out.splitlines()
        (message,) = ast.literal_eval(heard)
        assert message == (
            "The family outside.broken is left out because it cannot be imported: ModuleNotFoundError: No module named "
            "'outside.broken'"
        )
        assert (last, name) == ("wordy", "WordyModel")
        assert files_of(tmp_path / f"saved after {first}") == {
            "config.json",
            "model.safetensors",
            "modeling_wordy.py",
            "attention_patterns.py",
            "backbone_config.py",
            "checked_inputs.py",
            "checked_options.py",
            "devices.py",
            "messages.py",
            "rotary_transformer.py",
            "short_convolution.py",
            "time_conditioning.py",
            "vocabulary_head.py",
        }

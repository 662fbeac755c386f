"""What does not fit together - weights and config, model and tokenizer, sizes and machine - is refused by name."""

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file, save_file

from tests.training.test_trainer import dataset, make_trainer
from xlm_hf.building import build_model, compose, load_model
from xlm_hf.evaluation import check_tokenizer
from xlm_hf.families import families
from xlm_hf.modeling.ilm import ILMCollator, ILMLoss
from xlm_hf.overrides import open_override
from xlm_hf.reports.sweeps import run_name
from xlm_hf.saved_configs import load_config
from xlm_hf.tasks.tokenizers import number_tokenizer
from xlm_hf.training.arguments import XLMTrainingArguments
from xlm_hf.training.trainer import XLMTrainer

ILM = families()["ilm"]
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def cfg():
    return compose("ilm_star", ["size=tiny"])


@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_that_the_config_does_not_name_or_that_are_missing(is_tied, cfg, tmp_path):
    model = ILM.model_class(ILM.config_class(vocab_size=27, tie_word_embeddings=is_tied, **SIZES))
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path), cfg.model)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if "layers" in name and weight.dim() == 2)
    changes = {
        "has 1 weights beyond its config, such as strange": {**weights, "strange": torch.zeros(1)},
        f"lacks 1 weights of its config, such as {name}": {key: w for key, w in weights.items() if key != name},
        "does not fit its config.json": {**weights, name: torch.zeros(3)},
        **{
            f"has NaN or infinity in {name}": {**weights, name: weights[name].index_fill(0, torch.tensor(0), value)}
            for value in (torch.nan, torch.inf)
        },
    }
    for words, changed in changes.items():
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words) as error:
            load_model(str(tmp_path), cfg.model)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["lacks", "has"])
def test_a_training_is_resumed_with_the_weights_of_its_config_alone(change, tmp_path):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(file)
    if change == "lacks":
        weights.pop(next(iter(weights)))
    else:
        weights["strange"] = torch.zeros(1)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"checkpoint-1 {change} 1 weights .*, such as"):
        make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 28}, "The model's vocab_size is 28 and the tokenizer's 27: name the task that the model was"),
        ({"vocab_size": 26}, "The model's vocab_size is 26"),
        ({"mask_token_id": 9}, "The model's mask_token_id is 9 and the tokenizer's 2"),
        ({"bos_token_id": 27}, "The model's bos_token_id is 27"),
    ],
)
def test_a_model_and_a_tokenizer_that_do_not_know_each_other(options, words, tmp_path):
    tokenizer = number_tokenizer(20)
    model = ILM.model_class(ILM.config_class.from_tokenizer(tokenizer, **SIZES))
    check_tokenizer(tokenizer, model.config)
    for name, value in options.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=words):
        XLMTrainer(
            model,
            XLMTrainingArguments(str(tmp_path), use_cpu=True),
            loss=ILMLoss(),
            data_collator=ILMCollator(tokenizer, max_length=32, kind="seq2seq"),
            train_dataset=dataset(),
            processing_class=tokenizer,
        )


def test_a_config_that_expands_without_end_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12)]
    file.write_text("\n".join(levels))
    with pytest.raises(ValueError, match="aliases of YAML"):
        load_config(file)


@pytest.mark.parametrize(
    "size", ["hidden_size=1000000", "num_hidden_layers=100000000", "intermediate_size=100000000000"]
)
def test_a_model_beyond_the_memory_is_not_built(size):
    cfg = compose("ilm_star", ["size=tiny", f"model.{size}"])
    with pytest.raises(
        ValueError, match=r"The model takes at least [\d,]+ GiB and the machine has [\d,]+: lower hidden"
    ):
        build_model(cfg.model, number_tokenizer(20))


def test_half_precision_without_an_accelerator_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs an accelerator, and there is none"):
        XLMTrainingArguments(str(tmp_path), use_cpu=True, fp16=True)


def test_batches_that_would_all_be_dropped_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the 44 examples are fewer than the 64 of one"):
        make_trainer(tmp_path, 64, dataloader_drop_last=True).train()
    assert make_trainer(tmp_path, 44, dataloader_drop_last=True, num_train_epochs=1).train().global_step == 1


VALUES = [
    *("2026_11_30", "1e5", "007", "true", "NaN", "-5", "3.5", "1.", "..", "0x10", "1_000", "yes", "None", "", "@x"),
    *("a#b", "~/runs", "[ab].txt and more", "a[1] b=c,d.txt", "übung/ü", "it's", "'", "a'", "x y", "{a}", "a=b", "a:b"),
    *("a\\b", "C:\\x\\", "a\\'b", "\\\\", "a\nb", "(a)", "$x", "%", "*", "a|b;c", "../x.y", "runs/a-1", "./.hidden"),
]


@pytest.mark.parametrize("value", VALUES)
def test_a_path_on_the_command_line_is_a_text_whatever_it_looks_like(value):
    opened = open_override(f"output_dir={value}")
    assert OverridesParser.create().parse_override(opened).value() == value
    assert open_override(opened) == opened, "the printed command pastes back"


@pytest.mark.parametrize(
    ("given", "opened"),
    [
        *((same, same) for same in ("output_dir=runs/a-1", "output_dir=null", "checkpoint=../x.y", "seed=5", "x=~")),
        *((same, same) for same in ("output_dir='5'", 'output_dir="5"', "output_dir=${oc.env:HOME}/x", "prompts=[a]")),
        ("task.path=5", "++task.path='5'"),
        ("init_from=1e5", "init_from='1e5'"),
        ("+output_dir=5", "+output_dir='5'"),
    ],
)
def test_what_is_quoted(given, opened):
    assert open_override(given) == opened


def test_a_sweep_over_paths_stays_one():
    assert open_override("task.path=a.txt,b.txt", is_sweep=True) == "++task.path=a.txt,b.txt"
    assert open_override("output_dir=1e5", is_sweep=True) == "output_dir='1e5'"


def test_folders_of_runs_have_short_names_of_their_own():
    assert run_name("++trainer.learning_rate=0.1,seed=0") == "trainer.learning_rate-0.1_seed-0"
    long = [run_name(f"task.path={'ü' * 300}{number}") for number in range(2)]
    assert max(map(len, long)) < 120
    alike = [run_name(f"++task.path='a{mark}b'") for mark in ("_", " ", "#", "/", "ü", "é")]
    assert len({*long, *alike}) == 8
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for name in alike)

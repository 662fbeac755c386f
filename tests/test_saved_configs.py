"""What an earlier version saved is the same run today; `fixtures/saved_configs` holds what it wrote."""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from xlm_hf.building import compose
from xlm_hf.commands._run import check_same_run
from xlm_hf.overrides import open_override
from xlm_hf.saved_configs import load_config, translate_config

SAVED = Path(__file__).parent / "fixtures" / "saved_configs"
COMMANDS = {
    "arlm": ("arlm_star", []),
    "ilm": ("ilm_star", []),
    "mdlm": ("mdlm_star", []),
    "mdlm_paper": ("paper/mdlm_star_hard", []),
    "mlm": ("config", ["family=mlm", "task=text", "task.path=corpus.txt", "experiment=mlm_text"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_of_the_earlier_version_is_the_same_run(name, tmp_path):
    shutil.copy(SAVED / f"{name}.yaml", tmp_path / "config.yaml")
    config, overrides = COMMANDS[name]
    cfg = compose(config, [f"experiment={config}", *overrides, "size=tiny"])
    check_same_run(tmp_path, cfg)
    check_same_run(tmp_path, cfg, whole=True)
    other = compose(config, [*overrides, "size=tiny", "model.hidden_size=64"])
    with pytest.raises(ValueError, match=r"was run with model\.hidden_size=32 and not 64: choose another output_dir"):
        check_same_run(tmp_path, other)


def test_a_resumed_run_may_have_other_steps_and_a_cell_of_a_comparison_may_not(tmp_path):
    shutil.copy(SAVED / "ilm.yaml", tmp_path / "config.yaml")
    longer = compose("ilm_star", ["size=tiny", "trainer.max_steps=21", "experiment=ilm_star"])
    check_same_run(tmp_path, longer)
    with pytest.raises(ValueError, match=r"was run with trainer\.max_steps=20 and not 21"):
        check_same_run(tmp_path, longer, whole=True)
    two = compose("ilm_star", ["size=tiny", "seed=3", "model.hidden_size=64", "experiment=ilm_star"])
    with pytest.raises(ValueError, match=r"model\.hidden_size=32 and not 64, seed=0 and not 3: choose"):
        check_same_run(tmp_path, two)
    other = compose("mdlm_star", ["size=tiny", "experiment=ilm_star"])
    with pytest.raises(ValueError, match=r"(\S+=\S+ and not \S+, ){4}family=\S+ and not \S+ and \d+ more: choose"):
        check_same_run(tmp_path, other)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_in_the_terms_of_today_stays(name):
    config = load_config(SAVED / f"{name}.yaml")
    again = translate_config(OmegaConf.create(OmegaConf.to_container(config)))
    assert again == config


def test_a_target_that_moved_is_found():
    config = translate_config(OmegaConf.create({"a": {"b": {"_target_": "xlm_hf.sweeps.SweepSummary"}}}))
    assert config.a.b._target_ == "xlm_hf.reports.sweeps.SweepSummary"


def test_a_renamed_option_has_its_new_name_in_a_config_and_on_the_command_line():
    config = translate_config(OmegaConf.create({"model": {"unrestricted_softmax": True, "backbone": "dit"}}))
    assert config == {"model": {"softmax_over_suppressed": True, "backbone": "rotary", "conditioning": "adaln"}}
    chosen = OmegaConf.create({"model": {"backbone": "dit", "conditioning": "token"}})
    assert translate_config(chosen).model == {"backbone": "rotary", "conditioning": "token"}
    assert open_override("model.unrestricted_softmax=true") == "++model.softmax_over_suppressed=true"
    assert compose("config", ["family=mdlm", "task=star_easy", "model.backbone=dit"]).model.conditioning == "adaln"


def test_a_schedule_of_noise_is_the_model_s():
    saved = OmegaConf.create({"model": {"_target_": "A"}, "collator": {"noise_schedule": "cosine"}})
    assert translate_config(saved).model.noise_schedule == "cosine"
    config = compose("config", ["family=mdlm", "task=star_easy", "collator.noise_schedule=cosine"])
    assert config.model.noise_schedule == config.collator.noise_schedule == "cosine"

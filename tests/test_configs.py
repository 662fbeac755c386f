"""Every YAML that is shipped is composed, built and trained for two steps."""

import itertools
from pathlib import Path

import hydra
import pytest
import yaml
from datasets import Dataset
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from hydra.version import VersionBase
from omegaconf import OmegaConf

from xlm_hf.building import build_model, build_task, build_trainer, compose, positions_of
from xlm_hf.cli import experiments

CONFIGS = Path(__file__).parent.parent / "configs"
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("[!_]*.yaml"))
    for folder in CONFIGS.iterdir()
    if folder.is_dir() and folder.name != "paper" and list(folder.glob("*.yaml"))
}
EXPERIMENTS = [name for name in experiments() if not name.startswith("compare")]
FEW = ["task.num_train=24", "task.num_validation=4", "task.num_test=4"]
TEXTS = ("text", "lm1b", "owt", "owt_packed", "smiles")
PAIRS = ("pairs", "e2e", "multi30k", "gsm8k")
# Learnt by every family each time; the other tasks by one of them, and by all in the slow tests.
OF_ALL = ("star_easy", "star_infill", "text")


@pytest.fixture(scope="module")
def few_texts(tmp_path_factory):
    """A local stand-in for every corpus of the Hub."""
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 24), ("validation", 40), ("test", 40)):
        texts = [f"{'the number of words , ' * (number % 3)}{number} ." for number in range(count)]
        columns = {"text": texts, "source": [f"{number}?" for number in range(count)], "target": texts}
        Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return [
        f"task.path={folder}",
        "task.tokenizer=byte",
        "task.splits=null",
        "task.max_length=16",
        "task.revision=null",
    ]


def few_examples(task, few_texts):
    if task == "smiles_scaffold":
        pytest.importorskip("rdkit")
        folder = Path(few_texts[0].removeprefix("task.path=")).parent / "molecules"
        folder.mkdir(exist_ok=True)
        (folder / "train.txt").write_text("Cc1ccccc1\nC1CC1CO\n" * 20)
        return [f"task.path={folder}", "task.validation_fraction=0.3", "task.test_fraction=0.3"]
    if task in PAIRS:
        return [*few_texts, "task.max_target_length=12"]
    return few_texts if task in (*TEXTS, "text_correction") else FEW


def family_and_task():
    for family, (number, task) in itertools.product(GROUPS["family"], enumerate(GROUPS["task"])):
        is_its_turn = family == GROUPS["family"][number % len(GROUPS["family"])]
        marks = [] if task in OF_ALL or is_its_turn else [pytest.mark.slow]
        yield pytest.param(family, task, marks=marks, id=f"{family}-{task}")


def composed(config_name, *overrides):
    return compose(config_name, overrides)


def built(cfg):
    task = build_task(cfg.task)
    return task, build_model(cfg.model, task.tokenizer, cfg.generation, positions_of(cfg.task, cfg.collator))


def two_steps(cfg, output_dir):
    task, model = built(cfg)
    trainer = build_trainer(cfg, task, model, output_dir)
    trainer.train()
    assert trainer.state.global_step == 2
    return trainer, trainer.evaluate(metric_key_prefix="test")


SHORT = [
    "trainer.max_steps=2",
    "trainer.logging_steps=1",
    "trainer.eval_steps=2",
    "trainer.save_strategy=no",
    "trainer.per_device_train_batch_size=4",
    "trainer.global_batch_size=null",
    "trainer.dataloader_num_workers=0",
]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_two_steps_and_is_scored(experiment, few_texts, tmp_path):
    few = few_examples(composed(experiment).task.name, few_texts)
    cfg = composed(experiment, "size=tiny", *few, *SHORT)
    if cfg.generation.get("num_steps"):
        # The published ones are hundreds.
        cfg.generation.num_steps = min(cfg.generation.num_steps, 8)
    trainer, metrics = two_steps(cfg, tmp_path)
    assert metrics["test/samples"] >= 4
    assert "test/loss" in metrics
    assert [log for log in trainer.state.log_history if "validation/loss" in log]


@pytest.mark.parametrize(("family", "task"), family_and_task())
def test_every_family_learns_every_task(family, task, few_texts, tmp_path):
    few = few_examples(task, few_texts)
    cfg = composed("config", f"family={family}", f"task={task}", "size=tiny", *few, *SHORT)
    if (kind := build_task(cfg.task).kind) not in get_class(cfg.collator._target_).kinds:
        assert kind == "infill"
        with pytest.raises(ValueError, match="has no kind 'infill'"):
            two_steps(cfg, tmp_path)
        return
    _, metrics = two_steps(cfg, tmp_path)
    assert metrics["test/samples"] >= 4
    assert "test/loss" in metrics or "test/exact_match" in metrics
    assert task not in TEXTS or metrics["samples/samples"] == cfg.task.num_samples


@pytest.mark.parametrize("size", GROUPS["size"])
@pytest.mark.parametrize("family", GROUPS["family"])
def test_every_size_is_a_model_and_a_set_of_arguments(size, family, tmp_path):
    cfg = composed("config", f"family={family}", "task=star_easy", f"size={size}", *FEW)
    task, model = built(cfg)
    trainer = build_trainer(cfg, task, model, tmp_path)
    assert model.config.hidden_size == cfg.model.hidden_size
    assert trainer.args.max_steps == cfg.trainer.max_steps


@pytest.mark.parametrize("group", ["logger", "trainer", "debug"])
def test_every_option_of_the_other_groups_composes(group):
    for option in GROUPS[group]:
        cfg = composed("ilm_star", f"{group}={option}")
        assert OmegaConf.to_container(cfg, resolve=True)[group] is not None


def test_no_group_is_left_out():
    assert set(GROUPS) == {"family", "task", "size", "trainer", "logger", "debug", "accelerate"}


PUBLISHED = {
    "paper/ilm_star_easy": "80000 64 0.0001 constant",
    "paper/arlm_star_medium": "80000 64 0.0001 constant",
    "paper/mlm_star_hard": "300000 64 0.0001 cosine_with_min_lr",
    "paper/mdlm_star_hard": "100000 64 0.0001 constant",
    "paper/ilm_lm1b": "1000000 512 0.0005 constant_with_warmup",
    "paper/arlm_lm1b": "1000000 512 0.0005 constant_with_warmup",
    "paper/flexmdm_star_easy": "80000 64 0.0001 constant",
    "paper/flexmdm_lm1b": "1000000 512 0.0001 constant_with_warmup",
    "paper/mdlm_lm1b": "1000000 512 0.0005 constant_with_warmup",
    "paper/ilm_owt": "1000000 512 0.0001 constant_with_warmup",
    "paper/mlm_owt_packed": "1000000 512 0.0001 constant_with_warmup",
}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_published_numbers_are_not_lost_on_the_way_down(experiment):
    """Those of the table, whatever the order in which the files are laid over each other."""
    cfg = composed(experiment)
    trainer = cfg.trainer
    batch_size = trainer.global_batch_size or trainer.per_device_train_batch_size
    found = f"{trainer.max_steps} {batch_size} {trainer.learning_rate} {trainer.lr_scheduler_type}"
    assert found == PUBLISHED[experiment]
    family, task = Path(experiment).name.split("_", 1)
    assert (cfg.family, cfg.task.name) == (family, task)
    assert (cfg.model.hidden_size, cfg.model.hidden_act, cfg.model.attention_dropout) == (768, "relu", 0.1)


NOISES = {
    "paper/bd3lm_owt": "1000000 512 0.0003 constant_with_warmup 2500 0.0",
    "paper/udlm_lm1b": "1000000 512 0.0003 constant_with_warmup 2500 0.0",
    "paper/sedd_owt": "1300000 512 0.0003 constant_with_warmup 2500 0.0",
    "paper/plaid_owt": "92000 256 0.0014 linear 2500 4e-05",
    "paper/gidd_owt": "500000 512 0.0005 cosine 10000 0.02",
}


@pytest.mark.parametrize("experiment", NOISES)
def test_numbers_of_the_papers_of_diffusion_are_not_lost_either(experiment):
    cfg = composed(experiment)
    names = ("max_steps", "global_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
    assert " ".join(str(cfg.trainer[name]) for name in names) == NOISES[experiment]
    assert (cfg.model.hidden_size, cfg.model.hidden_act) == (384 if "plaid" in experiment else 768, "gelu_pytorch_tanh")
    assert cfg.generation.do_sample


def test_the_tables_of_the_paper_are_complete():
    cells = {
        f"paper/{family}_star_{level}"
        for family in ("arlm", "ilm", "mlm", "mdlm")
        for level in ("easy", "medium", "hard")
    }
    cells |= {f"paper/{family}_lm1b" for family in ("arlm", "mdlm", "ilm")}
    cells |= {f"paper/{family}_{task}" for family in ("bd3lm", "udlm", "sedd", "gidd") for task in ("lm1b", "owt")}
    cells.add("paper/plaid_owt")
    assert cells <= set(EXPERIMENTS)


def test_named_experiments_are_thin():
    for experiment in [name for name in EXPERIMENTS if "/" not in name]:
        assert len((CONFIGS / f"{experiment}.yaml").read_text().splitlines()) <= 30
        assert "defaults" in yaml.safe_load((CONFIGS / f"{experiment}.yaml").read_text())


def test_the_tokenizer_decides_the_vocabulary(tmp_path):
    cfg = composed("ilm_star", "size=tiny", "task=star_hard", *FEW)
    task, model = built(cfg)
    assert model.config.vocab_size == len(task.tokenizer) == 63
    assert model.config.suppress_tokens == [0, 1, 2, 3, 4, 5]
    assert model.generation_config.max_new_tokens == 28
    assert model.generation_config.pad_token_id == task.tokenizer.pad_token_id


def test_a_group_has_the_last_word_over_the_base():
    assert composed("ilm_star").num_threads == 1
    assert composed("ilm_star", "size=base").num_threads is None
    assert composed("ilm_star").train_collator.drop_beta == 2.0
    assert composed("ilm_star", "num_threads=2").num_threads == 2


def test_composing_leaves_an_application_of_hydra_as_it_was():
    """As in a notebook that has begun one, and within a job."""
    with hydra.initialize_config_module("xlm_hf.configs", version_base="1.2"):
        before = GlobalHydra.instance().hydra
        assert composed("paper/ilm_star_hard", "trainer.max_grad_norm=2").trainer.max_grad_norm == 2
        assert GlobalHydra.instance().hydra is before
        assert str(VersionBase.instance().getbase()) == "1.2"
        assert hydra.compose("config", ["family=ilm", "task=text"]).family == "ilm"
    assert composed("ilm_star").family == "ilm"
    assert not GlobalHydra.instance().is_initialized()


def test_a_recipe_is_of_a_family_and_a_task_that_are_there():
    names = [name.removeprefix("paper/") for name in EXPERIMENTS if "/" in name]
    pairs = {f"{family}_{task}" for family, task in itertools.product(GROUPS["family"], GROUPS["task"])}
    assert set(names) <= pairs
    assert len(list((CONFIGS / "paper").rglob("*.yaml"))) == 2 + len({name.split("_")[0] for name in names})


def test_a_time_that_no_sequence_would_be_told_is_refused(tmp_path):
    options = ["family=mdlm", "task=star_infill", "size=tiny", "model.conditioning=token"]
    cfg = composed("config", *options, *few_examples("star_infill", None), *SHORT)
    with pytest.raises(ValueError, match="adds the time to \\[BOS\\], and sequences of kind 'infill' have none"):
        two_steps(cfg, tmp_path)

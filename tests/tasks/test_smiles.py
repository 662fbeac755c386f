import json
import sys

import datasets
import evaluate
import pytest

from xlm_hf.building import compose
from xlm_hf.cli import main
from xlm_hf.data import Mixture
from xlm_hf.evaluation import training_texts
from xlm_hf.tasks import load_task

MOLECULES = ["CCO", "c1ccccc1Br", "C[C@@H](Cl)[nH]", "C%12CCC%12", "CC(=O)O", "C1CC1", "CN", "O=C=O", "C#N", "CCl"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "molecules.txt"
    path.write_text("\n".join(MOLECULES * 4) + "\n")
    return path


def test_tokens_are_atoms_bonds_and_ring_numbers(file, tmp_path):
    task = load_task("smiles", path=str(file), cache_dir=tmp_path / "cache")
    texts = {task.tokenizer.decode(ids) for data in task.splits.values() for ids in data["input_ids"]}
    assert texts == set(MOLECULES)
    row = next(row for row in task.splits["train"] if task.tokenizer.decode(row["input_ids"]) == MOLECULES[2])
    assert task.tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["C", "[C@@H]", "(", "Cl", ")", "[nH]"]
    assert "%12" in task.tokenizer.get_vocab()


def test_the_training_set_as_texts(file, tmp_path):
    task = load_task("smiles", path=str(file), max_length=6, cache_dir=tmp_path / "cache")
    train = task.splits["train"]
    texts = list(training_texts(train, task.tokenizer))
    # Pieces of a longer text that goes on are no texts; what is left of it at the end is one.
    assert set(texts) <= {*MOLECULES, "c1Br", "O)O", "Br"} | {text[6:] for text in MOLECULES}
    assert len(texts) == len(train) - sum(train["continues"])
    assert sum(train["continues"]) > 0
    streams = Mixture([train.to_iterable_dataset(), train.to_iterable_dataset()], [1, 1])
    assert list(training_texts(streams, task.tokenizer)) == texts * 2
    pairs = datasets.Dataset.from_dict({"prompt_ids": [[1]], "target_ids": [train[0]["input_ids"]]})
    assert list(training_texts(pairs, task.tokenizer)) == [task.tokenizer.decode(train[0]["input_ids"])]


class Known(evaluate.Metric):
    """Asks for the training set."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, training_texts=None):
        return {"known": len(list(training_texts))}


def test_a_metric_is_given_the_training_set_it_asks_for(file, monkeypatch, tmp_path):
    pytest.importorskip("rdkit")
    monkeypatch.chdir(tmp_path)
    arguments = ["family=arlm", "task=smiles", f"task.path={file}", "size=tiny", "task.num_samples=6", "output_dir=run"]
    metrics = "task.metrics=[{name: molecule, with_diversity: false}, {_target_: tests.tasks.test_smiles.Known}]"
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", *arguments, metrics, "trainer.max_steps=2", "trainer.eval_steps=2"])
    main()
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["samples/known"] == 36
    assert 0 <= results["samples/valid"] <= 1
    assert results["samples/samples"] == 6
    assert "samples/valid_standard_error" in results


def test_samples_and_metrics_of_the_config():
    config = compose("config", ["family=arlm", "task=smiles"]).task
    assert config.num_samples == 1024
    assert [dict(spec) for spec in config.metrics] == [{"name": "molecule", "unique_at": [1000, 10000]}]

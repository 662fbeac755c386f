import importlib
import json
import re
import sys

import datasets
import evaluate
import pytest

from xlm_hf.building import compose
from xlm_hf.cli import main
from xlm_hf.data import Mixture
from xlm_hf.evaluation import training_texts
from xlm_hf.tasks import load_task
from xlm_hf.tasks.scaffolds import side_chains

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


# The blanks of some molecules by hand: toluene, a ring with two arms of which one has a ring, and no ring at all.
BLANKS = {
    "Cc1ccccc1": "_c1ccccc1",
    "CC(=O)Nc1ccc(O)cc1": "_______c1ccc___cc1",
    "C1CC1CC(Br)c1cc[nH]c1": "C1CC1CC___c1cc[nH]c1",
    "OC(c1ccccc1)": "___c1ccccc1_",
    "FC1=CC=C1C=O": "_C1=CC=C1___",
    "C=1(O)CCC=1F": "C=1___CCC=1_",
    "O=C1CC1": "__C1CC1",
    "CC%12CCC%12F": "_C%12CCC%12_",
    "C1CC1": "C1CC1",
    "CCO": "___",
}


@pytest.mark.parametrize("smiles", BLANKS)
def test_what_is_outside_of_a_scaffold(smiles):
    chem = pytest.importorskip("rdkit.Chem")
    pattern = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|[\s\S]")
    tokens = pattern.findall(smiles)
    is_blank = side_chains(tokens)
    kept = "".join(token for token, blank in zip(tokens, is_blank, strict=True) if not blank)
    shown = "".join("_" if blank else token for token, blank in zip(tokens, is_blank, strict=True))
    assert shown == BLANKS[smiles]
    # What is kept is the scaffold, and RDKit's agrees but for the atoms that hang on it by a double bond.
    if smiles not in ("CCO", "O=C1CC1"):
        scaffold = importlib.import_module("rdkit.Chem.Scaffolds.MurckoScaffold")
        assert chem.CanonSmiles(kept) == scaffold.MurckoScaffoldSmiles(smiles)


def test_strings_that_are_no_molecules_have_no_scaffold():
    pytest.importorskip("rdkit")
    assert side_chains(list("C1CC")) is None
    assert side_chains(["[H]", "C"]) is None


def test_scaffolds_as_a_task(tmp_path):
    pytest.importorskip("rdkit")
    file = tmp_path / "molecules.txt"
    file.write_text("\n".join(["Cc1ccccc1", "CCO", "C1CC1", "c1ccc", "O=C1CC1F"] * 8) + "\n")
    options = {"validation_fraction": 0.3, "test_fraction": 0.3, "cache_dir": tmp_path / "cache"}
    task = load_task("smiles_scaffold", path=str(file), **options)
    assert task.kind == "infill"
    shown = {
        tuple("".join(task.tokenizer.convert_ids_to_tokens(row[name])) for name in ("input_ids", "target_ids"))
        for row in task.splits["train"]
    }
    assert shown == {("[MASK]c1ccccc1", "Cc1ccccc1"), ("[MASK][MASK]C1CC1[MASK]", "O=C1CC1F")}
    file.write_text("\n".join(["CCO"] * 40) + "\n")
    with pytest.raises(ValueError, match=r"no molecule of split '\w+' has a ring and side chains"):
        load_task("smiles_scaffold", path=str(file), cache_dir=tmp_path / "cache")

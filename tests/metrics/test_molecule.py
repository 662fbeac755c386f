"""Figures of molecules: shares by sets, properties of known molecules, and diversity by loops over pairs of bits."""

import pytest

from xlm_hf.metrics import load_metric

Chem = pytest.importorskip("rdkit.Chem")

# Ethanol three ways, benzene, paracetamol, caffeine, aspirin; then what is none.
VALID = [
    "CCO",
    "OCC",
    "C(O)C",
    "c1ccccc1",
    "CC(=O)Nc1ccc(O)cc1",
    "CN1C=NC2=C1C(=O)N(C)C(=O)N2C",
    "CC(=O)Oc1ccccc1C(=O)O",
]
INVALID = ["", "   ", "C1CC", "c1ccc", "C(=O", "N(C)(C)(C)(C)C", "Xx"]


def test_shares_are_those_of_sets():
    known = ["OC(C)", "C1=CC=CC=C1", "not a molecule"]
    metric = load_metric("molecule", unique_at=[2, 4, 100])
    result = metric.compute(predictions=[*VALID[:3], *INVALID, *VALID[3:]], training_texts=iter(known))
    assert result["valid"] == 7 / 14
    assert result["unique"] == 5 / 7
    assert result["unique_at_2"] == 1 / 2
    assert result["unique_at_4"] == 2 / 4
    assert "unique_at_100" not in result
    assert result["novel"] == 3 / 7
    values = load_metric("molecule").per_example(predictions=[*VALID, *INVALID])
    assert values == {"valid": [1] * 7 + [0] * 7}
    assert "novel" not in metric.compute(predictions=VALID)
    # What is new counts once, however often it is written.
    assert metric.compute(predictions=[VALID[6]] * 3 + VALID[:1], training_texts=["CCO"])["novel"] == 1 / 4
    assert load_metric("molecule").compute(predictions=INVALID) == {"valid": 0.0}


def test_blanks_between_tokens_and_dots_between_fragments_are_read():
    """As a vocabulary of words decodes them, and as SAFE writes them."""
    result = load_metric("molecule").compute(predictions=["C C O", "C1.C1O"], training_texts=["CCO"])
    assert (result["valid"], result["unique"], result["novel"]) == (1, 1 / 2, 0)


def test_properties_of_known_molecules():
    for text, weight, logp in ((VALID[0], 46.07, -0.0014), (VALID[6], 180.16, 1.3101)):
        result = load_metric("molecule").compute(predictions=[text])
        assert result["molecular_weight"] == pytest.approx(weight, abs=0.01)
        assert result["logp"] == pytest.approx(logp, abs=1e-3)
        assert 0 < result["qed"] < 1
    both = load_metric("molecule").compute(predictions=[VALID[0], VALID[6]])
    assert both["molecular_weight"] == pytest.approx((46.07 + 180.16) / 2, abs=0.01)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_diversity_against_loops(rows, monkeypatch):
    from rdkit.Chem import rdFingerprintGenerator

    monkeypatch.setattr("xlm_hf.metrics.molecule.molecule._ROWS_AT_ONCE", rows)
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    bits = [set(generator.GetFingerprint(Chem.MolFromSmiles(text)).GetOnBits()) for text in VALID]
    similarity = [len(a & b) / len(a | b) for a in bits for b in bits]
    metric = load_metric("molecule")
    diversity = metric.compute(predictions=VALID)["diversity"]
    assert diversity == pytest.approx(1 - sum(similarity) / 49)
    assert 0.3 < diversity < 1
    assert metric.compute(predictions=["CCO"] * 4)["diversity"] == pytest.approx(0)
    assert "diversity" not in load_metric("molecule", with_diversity=False).compute(predictions=VALID)


def test_without_its_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the library rdkit: pip install 'xlm-hf\[molecules\]'"):
        load_metric("molecule")

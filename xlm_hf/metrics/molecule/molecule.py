"""Molecules that texts stand for: how many are valid, different and new, and what they are like."""

import importlib
import importlib.util

import datasets
import evaluate
import numpy

_FINGERPRINT_BITS = 1024
_ROWS_AT_ONCE = 1000


class Molecule(evaluate.Metric):
    """Shares and means over SMILES or SAFE strings, with V the valid ones, as canonical SMILES, repeats included.

    Args:
        predictions (list[str]): strings; one is valid if it is not empty and RDKit makes a molecule of it.
        training_texts (Iterable[str]): the training set; None leaves out `novel`.
        unique_at (Sequence[int]): also the unique share of the first k valid molecules, for each k here that there are.
        with_diversity (bool): whether to report the diversity, which compares all pairs.

    Returns:
        valid (float): |V| / strings.
        unique (float): |set(V)| / |V|; `unique_at_K` of the first K of V.
        novel (float): |set(V) - training set| / |V|.
        qed (float): mean over V of the drug-likeness (Bickerton et al., 2012).
        logp (float): mean over V of the partition coefficient (Crippen).
        molecular_weight (float): mean over V of the mass in daltons.
        diversity (float): 1 - mean Tanimoto similarity over all pairs of V, each with itself included: Morgan
            fingerprints of radius 2 with 1,024 bits (IntDiv of MOSES, arXiv 1811.12823).
    """

    def _info(self):
        if importlib.util.find_spec("rdkit") is None:
            raise ValueError("the metric molecule needs the library rdkit: pip install 'xlm-hf[molecules]'.")
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def per_example(self, predictions, unique_at=(), with_diversity=True):
        """1 or 0 for each string."""
        return {"valid": [int(molecule is not None) for molecule in _molecules(predictions)]}

    def _compute(self, predictions, training_texts=None, unique_at=(), with_diversity=True):
        from rdkit import Chem

        molecules = [molecule for molecule in _molecules(predictions) if molecule is not None]
        valid = [Chem.MolToSmiles(molecule) for molecule in molecules]
        result = {"valid": len(valid) / len(predictions)}
        if not valid:
            return result
        result["unique"] = len(set(valid)) / len(valid)
        result.update({f"unique_at_{k}": len(set(valid[:k])) / k for k in unique_at if k <= len(valid)})
        if training_texts is not None:
            known = {Chem.MolToSmiles(molecule) for molecule in _molecules(training_texts) if molecule is not None}
            result["novel"] = len(set(valid) - known) / len(valid)
        descriptors = importlib.import_module("rdkit.Chem.Descriptors")
        for name, function in (("qed", "qed"), ("logp", "MolLogP"), ("molecular_weight", "MolWt")):
            result[name] = sum(map(getattr(descriptors, function), molecules)) / len(molecules)
        if with_diversity:
            result["diversity"] = _diversity(molecules)
        return result


def _molecules(texts):
    """The molecule of each text, or None."""
    from rdkit import Chem, rdBase

    # RDKit writes a line for every string that is none.
    with rdBase.BlockLogs():
        for text in texts:
            text = "".join(text.split())
            yield Chem.MolFromSmiles(text) if text else None


def _diversity(molecules):
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=_FINGERPRINT_BITS)
    bits = numpy.array([generator.GetFingerprintAsNumPy(molecule) for molecule in molecules], dtype=numpy.float32)
    counts, total = bits.sum(axis=1), 0.0
    for start in range(0, len(bits), _ROWS_AT_ONCE):
        common = bits[start : start + _ROWS_AT_ONCE] @ bits.T
        either = counts[start : start + _ROWS_AT_ONCE, None] + counts - common
        total += float((common / numpy.maximum(either, 1)).sum(dtype=numpy.float64))
    return 1 - total / len(bits) ** 2

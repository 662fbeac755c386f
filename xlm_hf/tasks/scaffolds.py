"""Molecules of which only the scaffold is given: its side chains are to be filled in."""

import importlib
import os
import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value

from xlm_hf.modules.checked_options import Count, PartialShare, PositiveInt, checked
from xlm_hf.tasks import Task
from xlm_hf.tasks.text import text_corpus

_ATOM = re.compile(r"\[.+\]|Br|Cl|[A-Za-z*]")
_IDS = List(Value("int32"))
_FEATURES = Features({"example_id": Value("int64"), "input_ids": _IDS, "target_ids": _IDS})


@checked
def scaffold_infilling(
    name: str,
    path: str,
    tokenizer: str,
    text_column: str = "text",
    vocab_size: PositiveInt = 30_000,
    max_length: PositiveInt = 64,
    splits: Mapping[str, str] | None = None,
    validation_fraction: PartialShare = 0.05,
    test_fraction: PartialShare = 0.05,
    seed: Count = 42,
    subset: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Task:
    """The SMILES of a corpus as an infill task, in which every token outside of the scaffold is blank.

    The scaffold is what is left when atoms with at most one neighbour are removed again and again: the rings and what
    joins them (Bemis and Murcko, 1996). Molecules without a ring or without a side chain are left out, and so are
    strings that stand for no molecule. It needs rdkit.

    The options are those of `xlm_hf.tasks.text.text_corpus`. A token must be an atom, a bond, a bracket or the number
    of a ring.

    Raises:
        ValueError: if rdkit is missing, or no molecule of a split has a scaffold and side chains.
    """
    options: dict[str, Any] = dict(locals())
    if importlib.util.find_spec("rdkit") is None:
        raise ValueError(f"the task {name!r} needs the library rdkit: pip install 'xlm-hf[molecules]'.")
    corpus = text_corpus(**options)
    made = {}
    for split, data in corpus.splits.items():
        made[split] = _with_blanks(data, corpus.tokenizer)
        if not len(made[split]):
            raise ValueError(f"no molecule of split {split!r} has a ring and side chains: choose other data.")
    return Task(name, "infill", DatasetDict(made), corpus.tokenizer, corpus.files)


def _with_blanks(data: Dataset, tokenizer: Any) -> Dataset:
    columns: dict[str, list] = {column: [] for column in _FEATURES}
    for row in data:
        ids = row["input_ids"]
        is_blank = None if row["continues"] else side_chains(tokenizer.convert_ids_to_tokens(ids))
        if is_blank is not None and any(is_blank) and not all(is_blank):
            columns["example_id"].append(row["example_id"])
            columns["input_ids"].append(
                [tokenizer.mask_token_id if blank else token for token, blank in zip(ids, is_blank, strict=True)]
            )
            columns["target_ids"].append(ids)
    return Dataset.from_dict(columns, _FEATURES)


def side_chains(tokens: list[str]) -> list[bool] | None:
    """Which tokens of a SMILES string are outside of the scaffold; None for a string that stands for no molecule.

    A bond or an opening bracket is if one of its two atoms is, the number of a ring if the atom before it is, and a
    closing bracket if what it closes is. So the other tokens are the SMILES of the scaffold.
    """
    chem, block = (importlib.import_module(module) for module in ("rdkit.Chem", "rdkit.rdBase"))
    atoms = [position for position, token in enumerate(tokens) if _ATOM.fullmatch(token)]
    with block.BlockLogs():
        molecule = chem.MolFromSmiles("".join(tokens))
    # RDKit numbers atoms as they are written, but drops hydrogen atoms that are written out.
    if molecule is None or molecule.GetNumAtoms() != len(atoms):
        return None
    left = set(range(len(atoms)))
    neighbours = [{other.GetIdx() for other in atom.GetNeighbors()} for atom in molecule.GetAtoms()]
    while ends := {atom for atom in left if len(neighbours[atom] & left) <= 1}:
        left -= ends
    is_blank: list[bool] = []
    # The number of the last atom, the atom that the next one is bound to, and both for every open bracket.
    number, before = -1, -1
    opened: list[tuple[bool, int]] = []
    for position, token in enumerate(tokens):
        if _ATOM.fullmatch(token):
            number = before = number + 1
            is_blank.append(number not in left)
        elif token == ")":
            blank, before = opened.pop()
            is_blank.append(blank)
        elif token[-1].isdigit() or tokens[position + 1][-1].isdigit():
            is_blank.append(number not in left)
        else:
            is_blank.append(not {before, number + 1} <= left)
            if token == "(":
                opened.append((is_blank[-1], before))
    return is_blank

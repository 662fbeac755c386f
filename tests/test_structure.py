"""The rules of the house that a person would otherwise have to remember."""

import ast
import re
from pathlib import Path

import pytest

import xlm_hf.modeling
from xlm_hf.families import families

ROOT = Path(__file__).parent.parent
CORE = [
    file
    for file in (ROOT / "xlm_hf").rglob("*.py")
    if not {"modeling", "configs", "hub_cards"} & set(file.relative_to(ROOT / "xlm_hf").parts)
]
# What every task or metric uses; the other files of the two folders are one of them each.
SHARED_BY_TASKS = {
    "__init__.py",
    "blanks.py",
    "cache.py",
    "corpora.py",
    "pieces.py",
    "puzzles.py",
    "readers.py",
    "tokenizers.py",
}
FAMILY_FILES = list((ROOT / "modeling").rglob("*.py"))


def test_there_is_something_to_check():
    assert len(CORE) > 20
    assert len(FAMILY_FILES) > 5
    assert families()


def test_no_family_is_named_in_the_core():
    names = "|".join(families())
    for file in CORE:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not re.search(rf"(?i)(?<![a-z])({names})(?![a-z])", line), f"{file}:{number}: {line}"


def test_each_folder_of_modeling_is_one_registered_family():
    folders = {folder.name for folder in (ROOT / "modeling").iterdir() if (folder / "__init__.py").exists()}
    assert folders == set(families())
    assert Path(xlm_hf.modeling.__file__).resolve().parent == ROOT / "modeling"


@pytest.mark.parametrize("file", CORE + FAMILY_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} in {file}"


def code_lines(file):
    """Number of lines that hold code: no blank line, no comment, no docstring."""
    text, silent = file.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        documented = (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        )
        if documented:
            silent.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and not line.startswith("#") and number not in silent for number, line in lines)


def in_core(file, *folders):
    return file.relative_to(ROOT / "xlm_hf").parts[0] in folders


def test_the_core_and_each_family_stay_small():
    shared = [file for file in CORE if in_core(file, "modules", "objectives")]
    single = [file for file in CORE if in_core(file, "tasks", "metrics") and file.name not in SHARED_BY_TASKS]
    others = [file for file in CORE if file not in shared and file not in single]
    assert sum(map(code_lines, shared)) <= 3000
    assert sum(map(code_lines, others)) <= 5400
    for file in single:
        assert code_lines(file) <= 250, file
    for folder in {file.parent for file in FAMILY_FILES} - {ROOT / "modeling"}:
        files = set(folder.glob("*.py"))
        converters = set(folder.glob("conversion_*.py"))
        assert sum(map(code_lines, files - converters)) <= 500, folder
        assert sum(map(code_lines, converters)) <= 120, folder


def test_a_family_imports_no_other():
    for file in FAMILY_FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            assert not any(name.startswith(("xlm_hf.modeling", "modeling")) for name in names), file
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), file

"""What job=prepare_data shows: the files and sizes of each split, those in none, and an example as it is decoded."""

import re
import sys

from datasets import Dataset

from xlm_hf.cli import main


def shown(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", "family=mlm", "job=prepare_data", *arguments])
    main()
    return capsys.readouterr().out


def test_files_and_sizes_of_each_split_and_an_example(monkeypatch, capsys, tmp_path):
    for name, count in (("train", 9), ("test", 4), ("test_scaffolds", 3)):
        Dataset.from_dict({"text": ["the cat , sat"] * count}).to_parquet(tmp_path / f"{name}.parquet")
    output = shown(monkeypatch, capsys, "task=text", f"task.path={tmp_path}", "task.validation_fraction=0.3")
    lines = output.splitlines()
    listed = {}
    for line in lines:
        if match := re.match(r"  (\w+): (\d+) examples", line):
            split = match[1]
            listed[split] = (int(match[2]), [])
        elif match := re.match(r"    from (.+), ([\d,]+) bytes", line):
            listed[split][1].append((match[1], int(match[2].replace(",", ""))))
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "test", "test_scaffolds")}
    sizes = {name: (tmp_path / f"{name}.parquet").stat().st_size for name in files}
    assert listed == {
        "train": (6, [(files["train"], sizes["train"])]),
        # Drawn from the training documents.
        "validation": (3, []),
        "test": (4, [(files["test"], sizes["test"])]),
    }
    assert f"  in no split: {files['test_scaffolds']}, {sizes['test_scaffolds']:,} bytes" in lines
    assert "  input: the cat , sat" in lines


def test_prompts_and_blanks_are_shown_too(monkeypatch, capsys):
    few = ["task.num_train=8", "task.num_validation=2", "task.num_test=2"]
    assert re.search(
        r"\n  prompt: (\d+ ){7}\d+\n  target: (\d+ ){7}\d+\n", shown(monkeypatch, capsys, "task=sorting", *few)
    )
    output = shown(monkeypatch, capsys, "task=star_infill", *few)
    assert re.search(r"\n  input: [\d ]+.*\[MASK\].*\n  target: [\d ]+\n", output)

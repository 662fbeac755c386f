"""A folder is replaced whole, whatever the moment at which the process dies."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from xlm_hf.files import replaced_folder, whole_folder

NAMES = ("config.json", "model.safetensors")


def write(folder, text):
    with replaced_folder(folder) as staging:
        for name in NAMES:
            (staging / name).write_text(text)


def content(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def die_before_operation(number, folder):
    """Replace `folder` in a process that ends, as by SIGKILL, before the `number`-th change to a folder."""
    changes = 0

    def counted(operation):
        def change(*args, **kwargs):
            nonlocal changes
            changes += 1
            if changes > number:
                os._exit(9)
            return operation(*args, **kwargs)

        return change

    Path.rename, Path.mkdir, Path.write_text = map(counted, (Path.rename, Path.mkdir, Path.write_text))
    # One change for each file, so that a folder can be half removed.
    os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
    write(folder, "new")
    os._exit(0)


def kill_at_each_change(folder, prepare):
    """Yields after a kill at each point, `folder` being prepared anew, until the replacement was finished."""
    for number in range(40):
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        prepare()
        process = multiprocessing.get_context("fork").Process(target=die_before_operation, args=(number, folder))
        process.start()
        process.join()
        if process.exitcode == 0:
            return
        assert process.exitcode == 9
        yield number
    raise AssertionError("the replacement never ends")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_kill_at_any_moment_leaves_one_of_the_two_whole_and_blocks_nothing(is_first, tmp_path):
    folder = tmp_path / "run" / "model"
    kills = 0
    for _ in kill_at_each_change(folder, lambda: None if is_first else write(folder, "old")):
        kills += 1
        found = whole_folder(folder)
        if found.exists():
            assert content(found) in [dict.fromkeys(NAMES, text) for text in ("old", "new")]
        else:
            assert is_first
        write(folder, "newer")
        assert content(folder) == dict.fromkeys(NAMES, "newer")
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert kills >= (4 if is_first else 8)


def test_a_kill_during_the_recovery_loses_nothing_either(tmp_path):
    folder = tmp_path / "run" / "model"

    def between_the_renames():
        for suffix, text in (("previous", "old"), ("incomplete", "complete")):
            write(folder.parent / "content", text)
            (folder.parent / "content").rename(folder.with_name(f"model.{suffix}"))

    for _ in kill_at_each_change(folder, between_the_renames):
        assert content(whole_folder(folder)) in [dict.fromkeys(NAMES, text) for text in ("complete", "new")]


@pytest.mark.parametrize("error", [OSError("the disk went away"), KeyboardInterrupt()])
def test_an_error_between_the_renames_moves_the_earlier_folder_back(error, tmp_path, monkeypatch):
    write(tmp_path / "model", "old")
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".incomplete"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)):
        write(tmp_path / "model", "new")
    assert content(tmp_path / "model") == dict.fromkeys(NAMES, "old")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

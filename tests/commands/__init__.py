import sys

from xlm_hf.cli import main


def call(monkeypatch, capsys, folder, *arguments):
    """Exit status, and all that a command printed, run in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", *arguments])
    status = 0
    try:
        main()
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    return status, said.out, said.err

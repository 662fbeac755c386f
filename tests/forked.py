"""The command line in a process of its own that need not import anything: a fork of the tests' process."""

import multiprocessing
import os
import signal
import sys
import tempfile
from types import SimpleNamespace

from xlm_hf.cli import main


def _command(arguments, folder, stdout, stderr, prepare):
    os.chdir(folder)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv = ["run_xlm.py", *arguments]
    # That of a process that nobody has set up yet.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare()
    main()


def start(arguments, folder, stdout, stderr, prepare=lambda: None):
    """Start a command in `folder`, with files for its output; `prepare` is called in its process before it runs."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_command, args=(arguments, folder, stdout.fileno(), stderr.fileno(), prepare))
    process.start()
    return process


def run(arguments, folder, prepare=lambda: None):
    """Run a command to its end: its `returncode` and what it wrote to `stdout` and `stderr`."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(arguments, folder, stdout, stderr, prepare)
        process.join(300)
        for file in (stdout, stderr):
            file.seek(0)
        return SimpleNamespace(returncode=process.exitcode, stdout=stdout.read(), stderr=stderr.read())

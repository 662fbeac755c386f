"""Python processes that need not import torch and its like anew, which takes five CPU seconds.

A server has imported other people's packages and forks for each process that is asked for. `forked(...)` is the command
of a small client, for `subprocess`: what the server forks has the client's arguments, folder, environment, standard
streams and limit on file sizes, imports this package anew, and lives as long as its client, which ends as it does. What
it starts by `sys.executable` is forked as well.
Tests that are about imports or a clean environment start `sys.executable` instead.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

IMPORTS = """
accelerate datasets evaluate hydra matplotlib.figure pandas pytest scipy.stats torch torch.distributed.run
transformers.models.auto.modeling_auto transformers.trainer
"""

CLIENT = f"""#!{sys.executable} -IS
import json, os, resource, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(os.path.dirname(__file__) + "/server")
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), limit]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
status = int(server.recv(16))
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def forked(*arguments, **environment):
    """The command for `python ARGUMENTS`, in an environment with these values."""
    return [python(**environment), *map(str, arguments)]


def python(**environment):
    """What stands for the interpreter in a command: the client."""
    # What is read once, when a package is imported.
    once = {n: v for n, v in {**os.environ, **environment}.items() if n.startswith(("HF_", "OMP_")) and n != "HF_TOKEN"}
    return f"{_server(frozenset(once.items())).folder}/python"


def settle():
    """Wait until all that was forked is gone, as after the kill of a client; the CPU seconds of all so far."""
    return sum(server.settle() for server in _SERVERS)


_SERVERS = []


@functools.cache
def _server(environment):
    _SERVERS.append(_Server(dict(environment)))
    return _SERVERS[-1]


class _Server:
    """A server and its folder, with these values in its environment."""

    def __init__(self, environment):
        self.folder = tempfile.mkdtemp()
        client = Path(self.folder, "python")
        client.write_text(CLIENT)
        client.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{self.folder}/server")
            listener.listen(64)
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), str(client)],
                env={**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **environment},
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        atexit.register(self.process.communicate)

    def settle(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def serve(listener):
    """Fork for each client, until standard input ends; returns in what is forked, with its arguments."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            asked = sys.stdin.readline()
            while reap(0):
                pass
            if not asked:
                sys.exit()
            print(sum(os.times()[2:4]), flush=True)
        else:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                return attend(connection)
            connection.close()
            while reap(os.WNOHANG):
                pass


def reap(options):
    """Whether one of those that were forked has ended, without the option a wait for it."""
    try:
        return os.waitpid(-1, options)[0]
    except ChildProcessError:
        return False


def attend(connection):
    """Fork again for what the client asks for, pass signals on, and report how it ended."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    arguments, folder, environment, limit = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    child = os.fork()
    if not child:
        connection.close()
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        sys.stdout.reconfigure(line_buffering=os.isatty(1))
        return arguments
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    while ended not in (ready := select.select([connection, ended], [], [])[0]):
        if connection in ready:
            number = connection.recv(1)
            try:
                os.kill(child, number[0]) if number else os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:
                # Not yet the leader of its group.
                continue
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.send(str(status).encode())
    finally:
        os._exit(0)


def run(first, *others):
    """What `python first *others` does, once it has imported a lot."""
    if first == "-u":
        run(*others)
        return
    if first == "-I":
        first, *others = others
    else:
        folder = {"-c": "", "-m": str(Path.cwd())}.get(first, str(Path(first).resolve().parent))
        sys.path[:0] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    importlib.invalidate_caches()
    sys.argv[:] = [first, *others]
    if first == "-c":
        del sys.argv[1]
        exec(others[0], {"__name__": "__main__"})
    elif first == "-m":
        del sys.argv[0]
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(first, run_name="__main__")


def run_and_exit(*arguments):
    """Run and exit without freeing each object, which takes longer than the fork."""
    try:
        run(*arguments)
        status = 0
    except SystemExit as ending:
        status = ending.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except Exception:
        traceback.print_exc()
        status = 1
    if "RANK" in os.environ:
        # Threads of torch.distributed could spoil the interpreter's own end.
        sys.exit(status)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    del sys.path[0]
    with contextlib.redirect_stdout(sys.stderr):
        for name in IMPORTS.split():
            importlib.import_module(name)
    gc.freeze()
    sys.executable = sys.argv[2]
    run_and_exit(*serve(socket.socket(fileno=int(sys.argv[1]))))

"""A python that starts at once, for tests that run many commands: a server has imported torch, and
forks for each command. It ends without tidying up, which also takes Python seconds after torch.

python warm_python.py FOLDER            # serves; FOLDER/python ARGUMENTS... is then a python
"""

import atexit
import importlib
import json
import os
import runpy
import socket
import sys
from pathlib import Path


def ask(path, words):
    """Has the server run `python WORDS` with this process's streams. Returns the exit status."""
    streams = [number for number in range(3) if Path(f"/dev/fd/{number}").exists()]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(path)
        message = json.dumps([words, os.getcwd(), dict(os.environ), streams]).encode()
        socket.send_fds(server, [message], streams)
        return int(server.recv(99))


def serve(folder):
    """Answers until it times out. In the forked processes, returns the command's words."""
    for name in ("matplotlib.figure", "torch.distributed.run", "torchvision.transforms.v2"):
        importlib.import_module(name)
    server, python = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), Path(folder, "python")
    server.bind(f"{folder}/socket")
    server.listen()
    server.settimeout(3600)  # if nobody ends it
    words = f"'{sys.executable}' -SE '{__file__}' '{folder}/socket'"
    python.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    python.chmod(0o755)
    sys.executable = str(python)  # for processes that commands start
    print("ready", flush=True)
    connection, _ = server.accept()
    while os.fork():
        connection, _ = server.accept()  # which closes the last one here
    message, received, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    if pid := os.fork():
        connection.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    words, place, environment, streams = json.loads(message)
    os.closerange(0, 3)
    for number, stream in zip(streams, received, strict=True):
        os.dup2(stream, number)
    sys.stdout = sys.stdout if 1 in streams else None
    sys.stderr = sys.stderr if 2 in streams else None
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    return [word for word in words if word != "-u"]


def run(kind, *words):
    """Runs `python KIND WORDS` in this process. Returns the exit status."""
    sys.argv[:], sys.path[0] = [kind, *words], ""
    try:
        if kind in ("-c", "-"):
            exec(sys.argv.pop(1) if kind == "-c" else sys.stdin.read(), {"__name__": "__main__"})
        elif kind == "-m":
            runpy.run_module(sys.argv.pop(0) and words[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(kind))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):  # a message, which Python prints
            raise
        return ended.code or 0
    return 0


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    status = run(*serve(sys.argv[1]))
    atexit._run_exitfuncs()
    if sys.stdout:
        sys.stdout.flush()
    os._exit(status)

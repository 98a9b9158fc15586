"""`minicpmv` for the shell blocks of the pages: each command is a fork of one process that has imported what commands need.

Some thirty commands that import torch and TRL anew would spend minutes on nothing else. That a process of its own
starts well is tested elsewhere.
"""

import importlib.util
import json
import os
import socket
import sys


def serve(path: str) -> None:
    """Answer commands at the socket `path` until the process is ended."""
    if importlib.util.find_spec("trl"):  # an installation of what the README says has none
        import minicpmv.train.dpo
        import minicpmv.train.grpo
        import minicpmv.train.reward
        import minicpmv.train.sft  # noqa: F401
    from minicpmv.commands.main import app

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                os._exit(answer(connection, app))
            connection.close()


def answer(connection: socket.socket, app) -> int:
    """Run one command with the streams, folder and variables of who sent it, and send its exit code."""
    request, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    arguments, folder, variables = json.loads(request)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["minicpmv", *arguments]
    code = 1
    try:
        app()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([code]))
    return code


def send(path: str, arguments: list[str]) -> int:
    """Let the process at the socket `path` run a command; returns its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(connection, [request], [0, 1, 2])
        return (connection.recv(1) or b"\1")[0]


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    sys.exit(send(sys.argv[1], sys.argv[2:]))

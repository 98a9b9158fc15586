"""A Python whose imports are done: each program is a fork of one process that has imported what the commands need.

Dozens of programs that import torch and TRL anew would spend minutes on nothing else. That a process of its own starts
well is tested too, with `sys.executable`.
"""

import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import types


IMPORTED = """
accelerate.commands.launch datasets deepspeed ipykernel.kernelapp torch.distributed.run trl minicpmv.commands.main
minicpmv.checkpoint minicpmv.chat minicpmv.evaluate.harness minicpmv.evaluate.suites minicpmv.train.dpo
minicpmv.train.feedback.run minicpmv.train.grpo minicpmv.train.merge minicpmv.train.reward minicpmv.train.sft
"""


def serve(path: str, owner: int) -> None:
    """Run programs for those who ask at the socket `path`, as long as the process `owner` lives."""
    for name in IMPORTED.split():
        if name.startswith("minicpmv.train") and not importlib.util.find_spec("trl"):
            continue  # an installation of what the README says has none
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    gc.freeze()  # a collection in a program would copy all that it shares with this process
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while is_alive(owner):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)  # those whose programs have ended
            if not select.select([listener], [], [], 1)[0]:
                continue
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                watch(connection)
            connection.close()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def watch(connection: socket.socket) -> None:
    """Run one program and tell its end; when who asked for it is gone, end it."""
    request, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    program = os.fork()
    if program == 0:
        connection.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        os._exit(end_of(**json.loads(request)))
    for stream in streams:
        os.close(stream)

    def end_it_too() -> None:
        with contextlib.suppress(ConnectionResetError):
            connection.recv(1)
        os.kill(program, signal.SIGKILL)

    threading.Thread(target=end_it_too, daemon=True).start()
    _, status = os.waitpid(program, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(2, "big", signed=True))
    os._exit(0)


def end_of(**request) -> int:
    """The exit code of a program. Its memory is left to the system: to tear a whole interpreter down takes a second."""
    code = 0
    try:
        run(**request)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run(arguments: list[str], folder: str, variables: dict[str, str]) -> None:
    """What `python *arguments` does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # as the variables say
    while arguments[0] in ("-u", "-S", "-E"):
        arguments.pop(0)
    option, *rest = arguments
    sys.path[:0] = [place for place in variables.get("PYTHONPATH", "").split(os.pathsep) if place not in sys.path]
    if option == "-m":
        sys.argv = rest
        sys.path.insert(0, folder)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, folder)
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [option, *rest]
        sys.path.insert(0, os.path.dirname(os.path.abspath(option)))
        runpy.run_path(option, run_name="__main__")


def ask(path: str, arguments: list[str]) -> int:
    """Let the process at the socket `path` run a program with the streams, folder and variables of this one."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = {"arguments": arguments, "folder": os.getcwd(), "variables": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        return int.from_bytes(connection.recv(2), "big", signed=True)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        code = ask(sys.argv[1], sys.argv[2:])
        if code < 0:  # ended by a signal
            os.kill(os.getpid(), -code)
        sys.exit(code)

"""A Python that has imported torch, Lightning and this package already, for processes of tests.

A fresh interpreter imports for seconds before a rank's first step, and the tests start dozens of
ranks. `install` writes an executable that takes the arguments of `python` and is put in the place
of `sys.executable`. It sends its arguments, environment, folder and open files to a server, which
forks; the fork runs what was asked for. The executable stays as the process that others see: it
passes signals on, ends as the fork ends, and if it is killed, so is the fork. What the fork starts
through `sys.executable` is started in the same way.

Other things than the modules in `WARM` go to the real interpreter, and so does everything where
there is no Linux, where a GPU is (CUDA does not survive a fork), or where `COLD_PYTHON` is set.
"""

import json
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

WARM = ("vqvae_lightning.", "torch.distributed.run", "submitit.core.", "joblib.externals.loky.")
SPAWNED = "from multiprocessing.spawn import spawn_main"
PRELOADED = (
    *("hydra", "pytorch_lightning", "matplotlib.backends.backend_agg", "multiprocessing.spawn"),
    *(f"vqvae_lightning.commands.{name}" for name in ("worker", "pipeline", "sample", "train")),
    *(f"vqvae_lightning.{name}" for name in ("callbacks", "data", "tasks", "report.run")),
    *(f"vqvae_lightning.evaluation.{name}" for name in ("classifier", "drawing", "likelihood")),
)
PASSED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")


def install(folder):
    """Write the executable `folder/python`; returns the command line of its server."""
    path, address = folder / "python", folder / "server"
    path.write_text(
        f"#!{sys.executable} -IS\n"
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import warm_python\nwarm_python.run({str(address)!r}, sys.argv[1:])\n"
    )
    path.chmod(0o755)
    return [sys.executable, __file__, str(address), str(path)]


def parsed(arguments):
    """How `python ARGUMENTS` starts: {kind: module | code | script, what, argv, quiet}; or None."""
    rest, quiet = list(arguments), False
    while rest and rest[0] in ("-u", "-B", "-W"):
        if rest.pop(0) == "-W":
            if rest.pop(0) != "ignore":
                return None
            quiet = True
    if len(rest) > 1 and rest[0] == "-m" and rest[1].startswith(WARM):
        kind, what = "module", rest[1]
    elif len(rest) > 1 and rest[0] == "-c" and rest[1].startswith(SPAWNED):
        kind, what = "code", rest[1]
    elif rest and rest[0].endswith(".py"):
        kind, what = "script", rest[0]
        rest.insert(0, "")
    else:
        return None
    # As python fills sys.argv; a module's name becomes its path.
    first = {"module": what, "code": "-c", "script": what}[kind]
    return {"kind": kind, "what": what, "argv": [first, *rest[2:]], "quiet": quiet}


# The executable


def run(address, arguments):
    """Have the server run what `arguments` say, and end as it ends."""
    numbers = [signal.Signals[name] for name in PASSED_ON]
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # until there is somebody to pass them to
    request = parsed(arguments)
    files = list(open_files())
    server = socket.socket(socket.AF_UNIX)
    try:
        if request is None:
            raise ConnectionRefusedError
        server.connect(address)
        request |= {"env": dict(os.environ), "cwd": os.getcwd(), "files": files}
        request["ignoring"] = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as in a shell's &
        text = json.dumps(request).encode()
        socket.send_fds(server, [struct.pack("I", len(text))], files)
        server.sendall(text)
        process = number_from(server)
    except OSError:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        os.execv(sys.executable, [sys.executable, *arguments])
    for file in files:
        if file > 2:
            os.close(file)  # or a pipe to the fork would have a second end here

    def pass_on(number, _):
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(process, number)

    for number in numbers:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    status = number_from(server)
    if os.WIFSIGNALED(status):
        with suppress(OSError):  # SIGKILL has no other handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def number_from(server):
    text = server.recv(4, socket.MSG_WAITALL)
    if len(text) < 4:
        raise ConnectionResetError("the warm interpreter has died")
    return struct.unpack("i", text)[0]


def open_files():
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # the listing's own
        yield int(name)


# The server


def serve(address):
    """Fork for each request; returns in the forks: what is to be run.

    Ends, with all forks, when its standard input does: with the tests.
    """
    import select

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(100)
    ended, wake = os.pipe()
    for number in (ended, wake):
        os.set_blocking(number, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    select.select([listener, 0], [], [])  # nothing is imported for tests that start nothing
    preload()
    forks = {}
    while True:
        ready, _, _ = select.select([listener, ended, 0, *forks], [], [])
        if 0 in ready:
            for process in forks.values():
                os.kill(process, signal.SIGKILL)
            os._exit(0)
        if ended in ready:
            os.read(ended, 1000)
            for client, status in waited(forks):
                del forks[client]
                answer(client, status)
                client.close()
        for client in [client for client in ready if client in forks]:
            os.kill(forks[client], signal.SIGKILL)  # the executable is dead; waited for as ever
            client.shutdown(socket.SHUT_RDWR)
        if listener in ready:
            client, _ = listener.accept()
            request, files = received(client)
            process = os.fork()
            if process == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for part in (listener, client, *forks):
                    part.close()
                os.close(ended)
                os.close(wake)
                take(files, request["files"])
                return request
            for number in files:
                os.close(number)
            forks[client] = process
            answer(client, process)


def preload():
    from importlib import import_module

    for name in PRELOADED:
        import_module(name)
    import torch
    from hydra.core.plugins import Plugins

    Plugins.instance()  # looks through all packages
    if torch.cuda.is_available():
        sys.exit()  # the executables find nobody


def received(client):
    size, files, _, _ = socket.recv_fds(client, 4, 250)
    (count,) = struct.unpack("I", size)
    return json.loads(client.recv(count, socket.MSG_WAITALL)), files


def answer(client, number):
    with suppress(OSError):  # it was killed
        client.sendall(struct.pack("i", number))


def waited(forks):
    """Clients of the forks that have ended, and how these did."""
    clients = {process: client for client, process in forks.items()}
    while clients:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        yield clients.pop(process), status


def take(files, numbers):
    """Give the open `files` the `numbers` that they had."""
    import fcntl

    beyond = max(*files, *numbers) + 1
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, beyond) for number in files]
    for number in files:
        os.close(number)
    for source, number in zip(moved, numbers, strict=True):
        os.dup2(source, number)
        os.close(source)


def become(request):
    """Run it as `python` would in a process of its own."""
    import multiprocessing
    import runpy
    import types
    import warnings

    import torch

    os.setsid()
    ignoring = signal.SIG_IGN if request["ignoring"] else signal.default_int_handler
    signal.signal(signal.SIGINT, ignoring)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    if request["quiet"]:
        warnings.simplefilter("ignore")
    sys.executable = sys.argv[2]
    multiprocessing.set_executable(sys.executable)
    kind, what = request["kind"], request["what"]
    place = {"module": request["cwd"], "code": "", "script": str(Path(what).parent)}[kind]
    more = [part for part in os.environ.get("PYTHONPATH", "").split(":") if part]
    sys.path[:1] = [place, *more]
    sys.argv = request["argv"]
    if any((Path(part) / "sitecustomize.py").is_file() for part in more):
        sys.modules.pop("sitecustomize", None)
        import sitecustomize  # noqa: F401
    if kind == "module":
        # It has been imported here, and is run as __main__ beside that, as ever.
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning, "runpy")
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "script":
        runpy.run_path(what, run_name="__main__")
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(what, vars(main))


if __name__ == "__main__":
    become(serve(sys.argv[1]))

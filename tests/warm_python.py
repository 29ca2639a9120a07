"""A Python with torch, Lightning and this package already imported, for processes of the tests.

A fresh interpreter spends seconds on imports before a rank's first step, and the tests start dozens
of ranks. `install` writes an executable that takes the arguments of `python` and replaces
`sys.executable`. It sends its arguments, environment, working directory and open files to a server.
The server forks, and the fork runs the request. The executable remains the process that others see:
it forwards signals and exits with the status of the fork. If it is killed, the server kills the
fork. Processes that the fork starts through `sys.executable` are started in the same way.

Only the modules in `WARM` run in a fork; the real interpreter runs everything else. It also runs
everything on systems other than Linux, on machines with a GPU (CUDA does not survive a fork), and
if `COLD_PYTHON` is set.
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
    """Write the executable `folder/python`, and return the command line of its server."""
    path, address = folder / "python", folder / "server"
    path.write_text(
        f"#!{sys.executable} -IS\n"
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import warm_python\nwarm_python.run({str(address)!r}, sys.argv[1:])\n"
    )
    path.chmod(0o755)
    return [sys.executable, __file__, str(address), str(path)]


def parse(arguments):
    """Parse `python ARGUMENTS` to {kind: module | code | script, what, argv, quiet}.

    Returns None if the real interpreter must run them.
    """
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
    # sys.argv as python sets it; runpy replaces a module's name by its path.
    first = {"module": what, "code": "-c", "script": what}[kind]
    return {"kind": kind, "what": what, "argv": [first, *rest[2:]], "quiet": quiet}


# The executable


def run(address, arguments):
    """Let the server run `arguments`, and exit with the status of its fork."""
    numbers = [signal.Signals[name] for name in PASSED_ON]
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # until the fork exists
    request = parse(arguments)
    files = list(list_open_files())
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
        process = receive_number(server)
    except OSError:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        os.execv(sys.executable, [sys.executable, *arguments])
    for file in files:
        if file > 2:
            os.close(file)  # otherwise a pipe to the fork would have a second end here

    def forward(number, _):
        with suppress(ProcessLookupError):  # the fork has just ended
            os.kill(process, number)

    for number in numbers:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    status = receive_number(server)
    if os.WIFSIGNALED(status):
        with suppress(OSError):  # the handler of SIGKILL cannot be set
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def receive_number(server):
    text = server.recv(4, socket.MSG_WAITALL)
    if len(text) < 4:
        raise ConnectionResetError("the warm interpreter has died")
    return struct.unpack("i", text)[0]


def list_open_files():
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # the listing itself
        yield int(name)


# The server


def serve(address):
    """Fork for each request, and return the request in the fork.

    When the tests end, the server's standard input closes; it then kills all forks and exits.
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
    select.select([listener, 0], [], [])  # tests that start no process need no imports
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
            for client, status in reap(forks):
                del forks[client]
                answer(client, status)
                client.close()
        for client in [client for client in ready if client in forks]:
            os.kill(
                forks[client], signal.SIGKILL
            )  # the executable was killed; `reap` waits for its fork
            client.shutdown(socket.SHUT_RDWR)
        if listener in ready:
            client, _ = listener.accept()
            request, files = receive_request(client)
            process = os.fork()
            if process == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for part in (listener, client, *forks):
                    part.close()
                os.close(ended)
                os.close(wake)
                renumber(files, request["files"])
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

    Plugins.instance()  # scans all packages
    if torch.cuda.is_available():
        sys.exit()  # the executables then run the real interpreter


def receive_request(client):
    size, files, _, _ = socket.recv_fds(client, 4, 250)
    (count,) = struct.unpack("I", size)
    return json.loads(client.recv(count, socket.MSG_WAITALL)), files


def answer(client, number):
    with suppress(OSError):  # the executable was killed
        client.sendall(struct.pack("i", number))


def reap(forks):
    """Yield the client and the status of each fork that has ended."""
    clients = {process: client for client, process in forks.items()}
    while clients:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        yield clients.pop(process), status


def renumber(files, numbers):
    """Give the open `files` the `numbers` that they had in the executable."""
    import fcntl

    beyond = max(*files, *numbers) + 1
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, beyond) for number in files]
    for number in files:
        os.close(number)
    for source, number in zip(moved, numbers, strict=True):
        os.dup2(source, number)
        os.close(source)


def become(request):
    """Run the request as `python` would in a separate process."""
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
        # The module is already imported here; runpy warns before it runs it again as __main__.
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning, "runpy")
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "script":
        runpy.run_path(what, run_name="__main__")
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(what, vars(main))


if __name__ == "__main__":
    become(serve(sys.argv[1]))

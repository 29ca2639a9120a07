"""Claims: at most one command works in a folder at a time, however many start at once.

A command writes `.claim` into its folder before it reads any data, and deletes it when it ends. The
file identifies the process that holds the folder, so that another process can recognise the claim
of a killed process and take it over. Making and taking over a claim are atomic: they create a file
that must not exist, or rename one.
"""

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vqvae_lightning.errors import InputError
from vqvae_lightning.runs.folder import CLAIM, RunFolder

PROC = Path("/proc")
TRIES, PAUSE = 100, 0.02  # 2 s in all; writing or replacing a claim takes far less


class Claim(NamedTuple):
    """The contents of a claim's file.

    Attributes:
        host: Name of the machine.
        namespace: PID namespace of the process, because a container has its own. None where the
            system has no namespaces.
        pid: ID of the process.
        born: Start time of the process, because IDs are reused. None if unknown.
        job: ID of the Slurm job; None outside Slurm.
        restarts: How often Slurm had requeued the job.
        parts: Names of the folders inside that belong to the same command.
        token: Unique string of this claim.
    """

    host: str
    namespace: str | None
    pid: int
    born: str | None
    job: str | None
    restarts: int
    parts: list[str]
    token: str


def new_folder(path: Path) -> Path:
    """Make a folder that no other command has: `path`, or `path` with `_2`, `_3` and so on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, chosen = 1, path
    while True:
        try:
            chosen.mkdir()
            return chosen
        except FileExistsError:
            number += 1
            chosen = path.with_name(f"{path.name}_{number}")


@contextmanager
def claim_folder(folder: Path, parts: Sequence[str] = (), name: str = CLAIM) -> Iterator[None]:
    """Hold `folder` for this process while the block runs.

    Args:
        folder: Folder of a run or a sweep; made if it does not exist.
        parts: Names of folders in it that no other command may hold during the block.
        name: Name of the claim's file.

    Raises:
        InputError: If another command holds the folder, one of its parts, or the folder that it is
            a part of.
    """
    path, own = folder / name, _describe_process(parts)
    try:
        _take(path, own)
    except OSError:
        # The result of a finished run can be printed even from a read-only disk.
        if not RunFolder(folder).is_finished:
            raise
        yield
        return
    try:
        _check_nested(folder, own)
        yield
    finally:
        found = _read(path)
        # The user may have deleted the claim, and another command may have made its own.
        if found is not None and found.token == own.token:
            path.unlink(missing_ok=True)


def _describe_process(parts: Sequence[str]) -> Claim:
    pid = os.getpid()
    return Claim(
        host=socket.gethostname(),
        namespace=_read_namespace(),
        pid=pid,
        born=_find_start(pid),
        job=os.environ.get("SLURM_JOB_ID"),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        parts=list(parts),
        token=uuid.uuid4().hex,
    )


def _take(path: Path, own: Claim) -> None:
    """Make the claim `path`, or take it over from a process that has ended.

    Raises:
        InputError: If another process holds it.
    """
    for _ in range(TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError, FileNotFoundError):  # the latter: the folder was removed
            _write(path, own)
            return
        found = _read(path)
        if found is None:  # another process is writing it, or has just released it
            time.sleep(PAUSE)
            continue
        _refuse_if_held(path, found, own)
        if _replace(path, found, own):
            return
    raise InputError(
        f"{path.parent} cannot be claimed: if no command is running there, delete {path}*, which a "
        "killed command did not remove."
    )


def _replace(path: Path, old: Claim, own: Claim) -> bool:
    """Replace the claim of a dead process; return False if another process does so."""
    # The file's name contains the old claim's token, so only one process can create it. Renaming it
    # to `path` gives up the right to replace the old claim and replaces it in one step.
    right = path.with_name(f"{path.name}.{old.token}")
    try:
        _write(right, own)
    except FileExistsError:
        time.sleep(PAUSE)
        return False
    try:
        found = _read(path)
        # If not, another process replaced the old claim before this one created its file.
        if found is None or found.token != old.token:
            return False
        right.replace(path)
        return True
    finally:
        right.unlink(missing_ok=True)


def _check_nested(folder: Path, own: Claim) -> None:
    """Refuse a stage whose pipeline is running, and a pipeline whose stage is in use.

    Each command makes its own claim before it looks for the other's, so that of two commands that
    start at once, at least one sees the other.

    Raises:
        InputError: If another command holds the outer folder or a part of this one.
    """
    outer = folder.resolve().parent / CLAIM
    found = _read(outer)
    if found is not None and folder.resolve().name in found.parts:
        _refuse_if_held(outer, found, own)
    for part in own.parts:
        inner = folder / part / CLAIM
        found = _read(inner)
        if found is not None:
            _refuse_if_held(inner, found, own)


def _refuse_if_held(path: Path, found: Claim, own: Claim) -> None:
    """Return if the process of the claim `found` has ended.

    Raises:
        InputError: If it is running, or if this machine cannot tell.
    """
    # Slurm requeues a job only after its processes have ended on all nodes.
    if found.job is not None and found.job == own.job and own.restarts > found.restarts:
        return
    here = (found.host, found.namespace) == (own.host, own.namespace)
    if here and not _is_alive(found):
        return
    way_out = (
        "wait for it, or choose another folder"
        if here and sys.platform != "win32"
        else f"if that process has ended, which this machine cannot check, delete {path}"
    )
    raise InputError(
        f"{path.parent} is in use by process {found.pid} on host {found.host}: {way_out}."
    )


def _write(path: Path, claim: Claim) -> None:
    """Create a file with a claim.

    Raises:
        FileExistsError: If it exists; only one of several processes creates it.
    """
    with path.open("x") as file:
        try:
            json.dump(claim._asdict(), file)
            file.flush()
        except BaseException:  # an empty file looks like a claim that is being written
            path.unlink(missing_ok=True)
            raise


def _read(path: Path) -> Claim | None:
    """Read the claim in a file; None if there is none, or it is not complete yet."""
    try:
        return Claim(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_alive(claim: Claim) -> bool:
    """Whether the process of a claim on this machine is running; True if unknown."""
    if sys.platform == "win32":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(claim.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        pass
    born = _find_start(claim.pid)
    return born is None or claim.born is None or born == claim.born


def _find_start(pid: int) -> str | None:
    """When a process started; `dead` for a zombie, None if unknown."""
    if (PROC / "self" / "stat").is_file():
        try:
            # The program's name, in parentheses, may contain spaces and parentheses.
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            boot = (PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
        except OSError:
            return None
        return "dead" if fields[0] in "ZX" else f"{boot} {fields[19]}"
    # macOS has no /proc. A fixed language and time zone make the answers comparable.
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC0"}
    try:
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def _read_namespace() -> str | None:
    try:
        return os.readlink(PROC / "self" / "ns" / "pid")
    except OSError:
        return None

"""Claims: at most one command works in a folder at a time, however many start at once.

A command writes `.claim` into its folder before it reads any data and deletes it when it ends. The
file says which process holds the folder, so that the claim of a killed process is recognised and
taken over. Both steps use operations that a file system gives to one process only: creating a file
that must not exist, and renaming.
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

CLAIM = ".claim"
SWEEP_CLAIM = ".sweep.claim"
"""Another name than a run's, because a sweep may have its only job in its own folder."""
PROC = Path("/proc")
TRIES, PAUSE = 100, 0.02  # 2 s: another process needs far less to write or to replace a claim


class Claim(NamedTuple):
    """What a claim's file says.

    Attributes:
        host: Name of the machine.
        namespace: Set of process numbers that `pid` belongs to: containers have their own. None
            where the system has one set only.
        pid: Number of the process.
        born: When the process started, because numbers are used again. None if unknown.
        job: Slurm's number of the job; None outside of Slurm.
        restarts: How often Slurm had requeued the job.
        parts: Folders below that belong to the same command.
        token: Different for each claim.
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
    """Make a folder that no other command has: `path`, else `path` with `_2`, `_3` and so on."""
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
        parts: Names of folders below it that no other command may hold meanwhile.
        name: Name of the claim's file.

    Raises:
        InputError: If another command holds the folder, or the command that it is a part of.
    """
    path, own = folder / name, _own(parts)
    try:
        _take(path, own)
    except OSError:
        # A finished run can be shown from a disk on which nothing can be written.
        if not (folder / "result.json").is_file():
            raise
        yield
        return
    try:
        _check_family(folder, own)
        yield
    finally:
        found = _read(path)
        # The user may have deleted the claim, and another command may have made its own.
        if found is not None and found.token == own.token:
            path.unlink(missing_ok=True)


def _own(parts: Sequence[str]) -> Claim:
    pid = os.getpid()
    return Claim(
        host=socket.gethostname(),
        namespace=_namespace(),
        pid=pid,
        born=_born(pid),
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
        if found is None:  # being written, or just released
            time.sleep(PAUSE)
            continue
        _refuse_if_held(path, found, own)
        if _replaced(path, found, own):
            return
    raise InputError(
        f"{path.parent} cannot be claimed: if no command works there, delete {path}*, which a "
        "killed command has left."
    )


def _replaced(path: Path, old: Claim, own: Claim) -> bool:
    """Replace the claim of a dead process, unless another process has done so or is doing it."""
    # Only one process can make this file, and only for this very claim. It becomes the new claim,
    # so the right to replace the old one ends in the same moment as the old claim.
    right = path.with_name(f"{path.name}.{old.token}")
    try:
        _write(right, own)
    except FileExistsError:
        time.sleep(PAUSE)
        return False
    try:
        found = _read(path)
        # Else another process had replaced it before this one made its file.
        if found is None or found.token != old.token:
            return False
        right.replace(path)
        return True
    finally:
        right.unlink(missing_ok=True)


def _check_family(folder: Path, own: Claim) -> None:
    """Refuse a stage of a pipeline that runs, and a pipeline of which a stage is in use.

    Each command has made its own claim before it looks for the other's, so two that start at once
    cannot both miss each other.
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
        InputError: Otherwise, or if that cannot be known from here.
    """
    # Slurm requeues a job only after its processes have ended, on whatever node they ran.
    if found.job is not None and found.job == own.job and own.restarts > found.restarts:
        return
    here = (found.host, found.namespace) == (own.host, own.namespace)
    if here and not _alive(found):
        return
    way_out = (
        "wait for it, or choose another folder"
        if here and sys.platform != "win32"
        else f"if that process has ended, which cannot be seen from here, delete {path}"
    )
    raise InputError(
        f"{path.parent} is in use by process {found.pid} on host {found.host}: {way_out}."
    )


def _write(path: Path, claim: Claim) -> None:
    """Make a file with a claim.

    Raises:
        FileExistsError: If it exists: of several processes, one makes it.
    """
    with path.open("x") as file:
        try:
            json.dump(claim._asdict(), file)
            file.flush()
        except BaseException:  # an empty file would look like a claim that is being written
            path.unlink(missing_ok=True)
            raise


def _read(path: Path) -> Claim | None:
    """The claim in a file; None if there is none, or not yet a whole one."""
    try:
        return Claim(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _alive(claim: Claim) -> bool:
    """Whether the process of a claim on this machine still runs; True if that is unknown."""
    if sys.platform == "win32":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(claim.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        pass
    born = _born(claim.pid)
    return born is None or claim.born is None or born == claim.born


def _born(pid: int) -> str | None:
    """When a process started; None if unknown. Of a dead one that its parent ignores: `dead`."""
    if (PROC / "self" / "stat").is_file():
        try:
            # The name of the program, in parentheses, may contain anything.
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            boot = (PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
        except OSError:
            return None
        return "dead" if fields[0] in "ZX" else f"{boot} {fields[19]}"
    # As on macOS; in one language and time zone, or two commands would read another time.
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC0"}
    try:
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def _namespace() -> str | None:
    try:
        return os.readlink(PROC / "self" / "ns" / "pid")
    except OSError:
        return None

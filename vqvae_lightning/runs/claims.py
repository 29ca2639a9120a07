"""Claims: at most one command works in a folder at a time, even if several start at once.

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
"""Differs from a run's name, because a sweep may have its only job in its own folder."""
PROC = Path("/proc")
TRIES, PAUSE = 100, 0.02  # 2 s: writing or replacing a claim takes far less


class Claim(NamedTuple):
    """The contents of a claim's file.

    Attributes:
        host: Name of the machine.
        namespace: PID namespace of `pid`, as containers have their own. None where there are none.
        pid: Number of the process.
        born: When the process started, because process numbers are reused. None if unknown.
        job: Slurm's number of the job; None outside Slurm.
        restarts: How often Slurm had requeued the job.
        parts: Subfolders that belong to the same command.
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
    """Make a new folder: `path` or, if it exists, `path` with `_2`, `_3` and so on."""
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
        parts: Names of subfolders that no other command may hold meanwhile.
        name: Name of the claim's file.

    Raises:
        InputError: If another command holds the folder, one of `parts`, or the pipeline of this
            stage.
    """
    path, own = folder / name, _make_claim(parts)
    try:
        _take_claim(path, own)
    except OSError:
        # A finished run can be shown from a read-only disk.
        if not (folder / "result.json").is_file():
            raise
        yield
        return
    try:
        _check_family(folder, own)
        yield
    finally:
        found = _read_claim(path)
        # The user may have deleted the claim, and another command may have made its own.
        if found is not None and found.token == own.token:
            path.unlink(missing_ok=True)


def _make_claim(parts: Sequence[str]) -> Claim:
    pid = os.getpid()
    return Claim(
        host=socket.gethostname(),
        namespace=_read_namespace(),
        pid=pid,
        born=_read_start(pid),
        job=os.environ.get("SLURM_JOB_ID"),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        parts=list(parts),
        token=uuid.uuid4().hex,
    )


def _take_claim(path: Path, own: Claim) -> None:
    """Make the claim `path`, or take it over from a process that has ended.

    Raises:
        InputError: If another process holds it.
    """
    for _ in range(TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError, FileNotFoundError):  # the latter: the folder was removed
            _write_claim(path, own)
            return
        found = _read_claim(path)
        if found is None:  # being written, or just released
            time.sleep(PAUSE)
            continue
        _refuse_if_held(path, found, own)
        if _replace_stale(path, found, own):
            return
    raise InputError(
        f"{path.parent} cannot be claimed: if no command works there, delete {path}*, which a "
        "killed command left behind."
    )


def _replace_stale(path: Path, old: Claim, own: Claim) -> bool:
    """Replace the claim of a dead process; False if another process does so first."""
    # Only one process can create this file, whose name has the old claim's token. The file then
    # becomes the new claim, so no second process can replace the same old claim.
    right = path.with_name(f"{path.name}.{old.token}")
    try:
        _write_claim(right, own)
    except FileExistsError:
        time.sleep(PAUSE)
        return False
    try:
        found = _read_claim(path)
        # Otherwise another process had replaced the claim before this one created its file.
        if found is None or found.token != old.token:
            return False
        right.replace(path)
        return True
    finally:
        right.unlink(missing_ok=True)


def _check_family(folder: Path, own: Claim) -> None:
    """Refuse a stage of a running pipeline, and a pipeline with a stage that is in use.

    Each command claims its own folder before it reads the other's claim, so if both start at once,
    at least one of them is refused.
    """
    outer = folder.resolve().parent / CLAIM
    found = _read_claim(outer)
    if found is not None and folder.resolve().name in found.parts:
        _refuse_if_held(outer, found, own)
    for part in own.parts:
        inner = folder / part / CLAIM
        found = _read_claim(inner)
        if found is not None:
            _refuse_if_held(inner, found, own)


def _refuse_if_held(path: Path, found: Claim, own: Claim) -> None:
    """Check that the process of the claim `found` has ended.

    Raises:
        InputError: If it still runs, or if that cannot be known on this machine.
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
        else f"if that process has ended, which cannot be seen from here, delete {path}"
    )
    raise InputError(
        f"{path.parent} is in use by process {found.pid} on host {found.host}: {way_out}."
    )


def _write_claim(path: Path, claim: Claim) -> None:
    """Make a file with a claim.

    Raises:
        FileExistsError: If it exists, so that only one of several processes makes it.
    """
    with path.open("x") as file:
        try:
            json.dump(claim._asdict(), file)
            file.flush()
        except BaseException:  # an empty file would look like a claim that is being written
            path.unlink(missing_ok=True)
            raise


def _read_claim(path: Path) -> Claim | None:
    """Read the claim in a file; None if the file is missing or still incomplete."""
    try:
        return Claim(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_alive(claim: Claim) -> bool:
    """Tell whether the process of a claim on this machine still runs; True if unknown."""
    if sys.platform == "win32":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(claim.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        pass
    born = _read_start(claim.pid)
    return born is None or claim.born is None or born == claim.born


def _read_start(pid: int) -> str | None:
    """Read when a process started; None if unknown, `dead` for a zombie."""
    if (PROC / "self" / "stat").is_file():
        try:
            # The name of the program, in parentheses, may contain anything.
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            boot = (PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
        except OSError:
            return None
        return "dead" if fields[0] in "ZX" else f"{boot} {fields[19]}"
    # macOS. The language and time zone are fixed, so that all commands read the same text.
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

"""A folder has one command at a time, even if many threads or processes want it at once."""

import datetime
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import COMMANDS

from vqvae_lightning.errors import InputError
from vqvae_lightning.files import write_text
from vqvae_lightning.runs import claims
from vqvae_lightning.runs.claims import claim_folder, new_folder
from vqvae_lightning.runs.folder import CLAIM, SWEEP_CLAIM

RACERS = 8


def race(attempt):
    """Call `attempt` in several threads at the same moment; return their results or errors."""
    start = threading.Barrier(RACERS)

    def run(number):
        start.wait()
        try:
            return attempt(number)
        except InputError as error:
            return error

    with ThreadPoolExecutor(RACERS) as pool:
        return list(pool.map(run, range(RACERS)))


def write_stale(folder, **changed):
    """Write the claim of a process that has ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    claim = claims._describe_process(())._replace(pid=ended.pid, born="long ago", token="stale")
    folder.mkdir(exist_ok=True)
    write_text(folder / CLAIM, json.dumps(claim._replace(**changed)._asdict()))


@pytest.mark.parametrize("left", [False, True], ids=["free", "left by a dead process"])
def test_exactly_one_of_many_threads_gets_the_folder(left, tmp_path):
    for number in range(40):
        folder = tmp_path / str(number)
        if left:
            write_stale(folder)
        with ExitStack() as held:
            got = race(lambda _, folder=folder: held.enter_context(claim_folder(folder)))
            refused = [error for error in got if isinstance(error, InputError)]
            assert len(refused) == RACERS - 1
            assert all(f"process {os.getpid()}" in str(error) for error in refused)
        assert not list(folder.iterdir()), "a claim, or half of one, outlives its command"


def test_commands_that_start_at_once_get_different_folders(tmp_path):
    for number in range(40):
        got = race(lambda _, number=number: new_folder(tmp_path / f"a{number}"))
        assert len(set(got)) == RACERS
        assert all(folder.is_dir() for folder in got)


def test_processes_that_race_for_a_dead_claim_have_it_one_after_the_other(tmp_path):
    # Each holder adds a line while it has the folder; two at a time would lose one.
    write_stale(tmp_path)
    job = (
        "import sys, time; from pathlib import Path\n"
        "from vqvae_lightning.runs.claims import claim_folder\n"
        "from vqvae_lightning.errors import InputError\n"
        "folder, done = Path(sys.argv[1]), 0\n"
        "while done < 20:\n"
        "    try:\n"
        "        with claim_folder(folder):\n"
        "            path = folder / 'count'\n"
        "            count = int(path.read_text()) if path.is_file() else 0\n"
        "            time.sleep(0.001)\n"
        "            path.write_text(str(count + 1))\n"
        "            done += 1\n"
        "    except InputError:\n"
        "        time.sleep(0.001)\n"
    )
    racers = [subprocess.Popen([sys.executable, "-c", job, str(tmp_path)]) for _ in range(3)]
    assert [racer.wait(60) for racer in racers] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"


def test_a_killed_process_leaves_a_claim_that_the_next_takes_over(tmp_path):
    job = (
        "import sys, time; from pathlib import Path\n"
        "from vqvae_lightning.runs.claims import claim_folder\n"
        "with claim_folder(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", job, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"in use by process {holder.pid} on host"):
            _hold(tmp_path)
        holder.send_signal(signal.SIGKILL)
        time.sleep(0.05)  # killed, but its parent has not waited for it: a zombie
        _hold(tmp_path)
    assert not (tmp_path / CLAIM).exists()


def test_a_reused_process_number_does_not_keep_a_claim_alive(tmp_path):
    write_stale(tmp_path, pid=os.getpid())  # alive, but born at another time
    _hold(tmp_path)


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"namespace": "pid:[1]"}])
def test_a_claim_that_cannot_be_checked_from_here_is_refused(elsewhere, tmp_path):
    write_stale(tmp_path, **elsewhere)
    with pytest.raises(InputError, match=rf"process \d+ on host .*delete {tmp_path}/{CLAIM}") as e:
        _hold(tmp_path)
    assert len(str(e.value).splitlines()) == 1


def test_a_requeued_slurm_job_takes_over_from_its_last_node(tmp_path, monkeypatch):
    write_stale(tmp_path, host="node7", job="41", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    with pytest.raises(InputError, match="node7"):  # two commands of one job
        _hold(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _hold(tmp_path)


def test_an_unfinished_claim_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PAUSE", 0)
    (tmp_path / CLAIM).touch()
    with pytest.raises(InputError, match=f"delete {tmp_path}/{CLAIM}"):
        _hold(tmp_path)


def test_a_finished_run_is_shown_where_nothing_can_be_written(tmp_path, monkeypatch):
    def refuse(path, claim):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(claims, "_write", refuse)
    with pytest.raises(OSError, match="Read-only"):
        _hold(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    _hold(tmp_path)


def test_without_proc_ps_knows_when_a_process_started(tmp_path, monkeypatch):
    # As on macOS.
    monkeypatch.setattr(claims, "PROC", tmp_path / "nowhere")
    assert claims._read_namespace() is None
    with claim_folder(tmp_path / "run"), pytest.raises(InputError, match=str(os.getpid())):
        _hold(tmp_path / "run")
    write_stale(tmp_path / "run", pid=os.getpid())
    _hold(tmp_path / "run")


def test_a_stage_of_a_running_pipeline_is_in_use_too(tmp_path):
    with claim_folder(tmp_path, parts=["vqvae"]):
        with pytest.raises(InputError, match=f"{tmp_path} is in use"):
            _hold(tmp_path / "vqvae")
        _hold(tmp_path / "an evaluation")
    with claim_folder(tmp_path / "vqvae"):
        with pytest.raises(InputError, match="vqvae is in use"):
            _hold(tmp_path, ["vqvae"])
        assert not (tmp_path / CLAIM).exists()


def _hold(folder, parts=()):
    with claim_folder(folder, parts):
        pass


@pytest.fixture
def held(command, tmp_path, monkeypatch):
    """Run a command while another process holds its folder; it may neither read data nor write."""

    def run(*arguments, **options):
        stages = ("evaluating", "inputs", "reconstructing", "sampling", "sharding", "training")
        # All are imported first, or a later one would keep what an earlier one was given here.
        for module in [importlib.import_module(f"vqvae_lightning.stages.{n}") for n in stages]:
            for reader in {"build", "load", "load_pair", "load_images"} & set(vars(module)):
                monkeypatch.setattr(module, reader, lambda *_: pytest.fail("it read"))
        folder = options.get("folder") or tmp_path / "run"
        with claim_folder(folder):
            before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
            outcome = command(*arguments, **options)
            assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        return outcome

    return run


@pytest.mark.parametrize("name", [*COMMANDS, "vqvae-train resume=auto"])
def test_every_command_is_refused_where_another_works(name, held, tmp_path):
    given = {
        "vqvae-sample": ["prior_checkpoint=p.ckpt"],
        "vqvae-reconstruct": ["vqvae_checkpoint=v.ckpt"],
        "vqvae-shards": ["output=run"],
    }
    name, *more = name.split()
    outcome = held(name, *given.get(name, ()), *more)
    assert outcome.status == 1
    assert outcome.err == (
        f"error: {tmp_path}/run is in use by process {os.getpid()} on host "
        f"{socket.gethostname()}: wait for it, or choose another folder.\n"
    )


@pytest.fixture
def trained(monkeypatch):
    """Folder, seed and hidden files next to the folder of each run that vqvae-train would train."""
    seen = []

    def untrained(cfg):
        place = Path(cfg.folder).parent
        hidden = sorted(str(path.relative_to(place)) for path in place.rglob(".*"))
        seen.append((Path(cfg.folder), cfg.seed, hidden))
        return {"objective": 0.0, "metrics": {}}

    monkeypatch.setattr("vqvae_lightning.stages.training.train", untrained)
    return seen


def test_a_sweep_has_its_folder_and_its_jobs_have_theirs(trained, command, tmp_path):
    jobs = tmp_path / "jobs"
    sweep = ("vqvae-train", "-m", "seed=0,1", f"hydra.sweep.dir={jobs}")
    with claim_folder(jobs / "0"):  # as a job that Slurm still runs
        outcome = command(*sweep)
    assert outcome.status == 1
    assert f"{jobs}/0 is in use" in outcome.err
    assert not list(jobs.glob("0/*")), "the job of another process was changed"
    assert [seed for _, seed, _ in trained] == [1], "a job that is in use stops no other"
    trained.clear()
    outcome = command(*sweep)
    assert outcome.status == 0, outcome.err
    assert [hidden for _, _, hidden in trained] == [[SWEEP_CLAIM, f"{job}/{CLAIM}"] for job in "01"]
    assert not list(jobs.rglob(".*"))
    with claim_folder(jobs, name=SWEEP_CLAIM):
        outcome = command(*sweep, "resume=auto")
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: {jobs} is in use")


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_two_commands_of_one_second_have_two_folders(kind, trained, tmp_path, monkeypatch):
    class Stopped(datetime.datetime):
        @classmethod
        def now(cls, zone=None):
            return cls(2026, 1, 31, 12)

    monkeypatch.setattr("hydra.core.utils.datetime", Stopped)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        more = ["-m", "seed=0,1"] if kind == "sweep" else []
        monkeypatch.setattr(sys, "argv", ["vqvae-train", *more, "study='it\\'s'"])
        COMMANDS["vqvae-train"]()
    place = tmp_path / "runs" / "it's"
    names = ["2026-01-31_12-00-00", "2026-01-31_12-00-00_2"]
    expected = [place / name / job for name in names for job in ("01" if more else [""])]
    assert [folder for folder, _, _ in trained] == expected

"""Ranks that torchrun or Slurm starts, and sweeps whose jobs run in other processes."""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_VQVAE, compose

from vqvae_lightning.errors import Interrupted, RankError
from vqvae_lightning.jobs import parallel
from vqvae_lightning.jobs.launched_ranks import detect_launcher
from vqvae_lightning.jobs.launcher import count_resources

RANKS = (
    *[option for option in TINY_VQVAE if not option.startswith("trainer=")],
    "trainer=ddp_cpu",
    "trainer.precision=32-true",
    "dataset.batch_size=8",
)
SHORT = (*RANKS, "trainer.max_steps=10", "trainer.val_check_interval=5")


def result(folder):
    return json.loads((folder / "result.json").read_text())


def run(command, folder, **environment):
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_torchrun_runs_a_sweep_past_a_bad_config(toy, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "vqvae_lightning.train", "-m"]
    # The first job fails before its ranks take part. The third job draws its seed at random: if
    # each rank composed the config itself, the ranks would have different seeds and folders.
    options = [*SHORT, *toy, "seed=-1,5,${drawn:}", "hydra.sweep.dir=sweep"]
    site = tmp_path / "sitecustomize.py"
    site.write_text(
        "import random\nfrom omegaconf import OmegaConf\n"
        "OmegaConf.register_new_resolver('drawn', lambda: random.randrange(10**6))\n"
    )
    outcome = run([*command, *options], tmp_path, PYTHONPATH=str(tmp_path))
    assert outcome.returncode == 1, outcome.stderr
    assert "seed=-1 must be" in outcome.stderr
    assert sorted(path.name for path in tmp_path.glob("sweep/*/result.json")) == ["result.json"] * 2
    for number in (1, 2):
        folder = tmp_path / "sweep" / str(number)
        assert result(folder)["devices"] == 2
        assert not (folder / "ranks").exists()
    assert not (tmp_path / "runs").exists()
    assert result(tmp_path / "sweep/2")["seed"] not in (-1, 5)


def test_a_rank_that_fails_ends_a_torchrun(toy, tmp_path):
    # Only rank 1 cannot read the data.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    site = tmp_path / "sitecustomize.py"
    site.write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import numpy\n"
        "    def broken(*arguments, **options):\n"
        "        raise OSError('no such disk')\n"
        "    numpy.load = broken\n"
    )
    command = [
        *torchrun,
        "--nproc-per-node=2",
        "-m",
        "vqvae_lightning.train",
        "-m",
        "seed=1,2",
    ]
    outcome = run(
        [*command, *SHORT, *toy, "hydra.sweep.dir=sweep"], tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert outcome.returncode == 1
    assert "no such disk" in outcome.stderr
    assert "SIGABRT" not in outcome.stderr
    assert not list(tmp_path.glob("sweep/*/result.json"))


@pytest.fixture
def as_rank_zero(monkeypatch):
    """Set the variables of torchrun for one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_ranks_that_the_trainer_does_not_count_are_refused(toy, command, as_rank_zero):
    outcome = command("vqvae-train", *SHORT, *toy)
    assert outcome.status == 1
    assert "trainer.devices=2 and trainer.num_nodes=1 ask for 2 ranks" in outcome.err
    assert "1 were started" in outcome.err
    assert not torch.distributed.is_initialized()


def test_several_nodes_need_a_launcher(toy, command):
    outcome = command("vqvae-train", *SHORT, *toy, "trainer.num_nodes=2")
    assert outcome.status == 1
    for part in ("trainer.num_nodes=2", "torchrun --nnodes 2", "hydra/launcher=slurm"):
        assert part in outcome.err
    missing = command(
        "vqvae-train", *toy, "trainer=multinode", "trainer.devices=8", "trainer.accelerator=cpu"
    )
    assert missing.status == 1
    assert "trainer.num_nodes=None must be" in missing.err


def test_a_job_script_without_srun_waits_for_nobody(monkeypatch):
    # sbatch sets these in a job script; srun also sets SLURM_STEP_NUM_TASKS.
    for name, value in (("NTASKS", "8"), ("PROCID", "0"), ("JOB_NAME", "mine")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert detect_launcher() is None


def test_a_launcher_does_not_resume_a_single_run(toy, command):
    outcome = command("vqvae-train", "hydra/launcher=slurm", "resume=runs/mine", *toy)
    assert outcome.status == 1
    assert "resume=auto and hydra.sweep.dir=FOLDER" in outcome.err


def test_the_cpu_is_not_chosen_for_slurm_because_this_machine_has_no_gpu(toy, command):
    outcome = command("vqvae-train", "hydra/launcher=slurm", "--dry-run", *toy)
    if not torch.cuda.is_available():
        assert outcome.status == 1
        assert "trainer=gpu or trainer=cpu" in outcome.err


def test_slurm_without_tasks_per_node_is_refused(toy, command, monkeypatch):
    for name, value in (("NTASKS", "2"), ("STEP_NUM_TASKS", "2"), ("PROCID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    outcome = command("vqvae-train", *SHORT, *toy)
    assert outcome.status == 1
    assert "--ntasks-per-node" in outcome.err


SLURM = ("hydra/launcher=slurm", "hydra.sweep.dir=sweep")


def test_the_local_executor_runs_the_pipeline_in_two_tasks(toy, tmp_path):
    options = ["trainer.devices=2", "evaluation.num_samples=12", "sampling.num_samples=6"]
    command = [
        sys.executable,
        "-m",
        "vqvae_lightning.commands.pipeline",
        "experiment=smoke",
        *toy,
        *options,
    ]
    outcome = run([*command, *SLURM, "hydra.launcher.executor=local"], tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    folder = tmp_path / "sweep/0"
    assert (folder / "report.html").is_file()
    for stage in ("vqvae", "prior"):
        assert result(folder / stage)["devices"] == 2
        assert not (folder / stage / "ranks").exists()


@pytest.fixture
def fake_slurm(tmp_path):
    """Environment variables that replace Slurm's commands by `fake_slurm.py`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "slurm").mkdir()
    source = (Path(__file__).parents[1] / "fake_slurm.py").read_text()
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        program = programs / name
        program.write_text(f"#!{sys.executable}\n{source}")
        program.chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path / "slurm")}


def test_slurm_starts_two_nodes_and_requeues_at_its_signal(toy, tmp_path, fake_slurm):
    steps = ("trainer.max_steps=200", "trainer.val_check_interval=100")
    options = [*RANKS, *toy, *steps, "callbacks.last.every_n_steps=10"]
    nodes = ("trainer.devices=1", "trainer.num_nodes=2", "hydra.launcher.partition=gpus")
    command = [sys.executable, "-m", "vqvae_lightning.train", *options, *nodes, *SLURM]
    dry = run([*command, "--dry-run"], tmp_path)  # without Slurm
    assert dry.returncode == 0, dry.stderr
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **fake_slurm},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        last, end = tmp_path / "sweep/0/checkpoints/last.ckpt", time.monotonic() + 120
        while not last.is_file() and time.monotonic() < end:
            time.sleep(0.05)
        for task in (tmp_path / "slurm/tasks").read_text().split():
            os.kill(int(task), signal.SIGUSR2)
        err = launcher.communicate(timeout=240)[1]
    assert launcher.returncode == 0, err
    script = (tmp_path / "slurm/script").read_text()
    for option in ("nodes=2", "ntasks-per-node=1", "partition=gpus", "signal=USR2@120"):
        assert f"#SBATCH --{option}\n" in script
    assert "gpus" not in script.replace("partition=gpus", "")
    assert dry.stdout.strip() == script.strip()
    assert len(list((tmp_path / "slurm").glob("requeued*"))) == 1
    folder = tmp_path / "sweep/0"
    assert result(folder)["steps"] == 200
    assert result(folder)["devices"] == 2
    logs = "".join(path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*.err"))
    assert re.search(r"Stopped by SIGUSR2 after step \d+; saved", logs)


def test_a_job_that_fails_under_slurm_is_reported_in_one_line(toy, tmp_path, fake_slurm):
    command = [sys.executable, "-m", "vqvae_lightning.train", *SHORT, *toy, *SLURM]
    outcome = run([*command, "monitor=val/none"], tmp_path, **fake_slurm)
    assert outcome.returncode == 1
    # The job fails before its ranks take part, so that it is listed like a job of any sweep.
    lines = [line for line in outcome.stderr.splitlines() if "val/none must be one of" in line]
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith("  job 0 (")
    assert "): monitor=val/none must be one of" in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["trainer.devices=auto"], "needs the number of devices"),
        (["hydra.launcher.tasks_per_node=3"], "hydra.launcher.tasks_per_node=3 must be 2"),
        (["hydra.launcher.nodes=2"], "hydra.launcher.nodes=2 must be 1"),
        (["hydra.launcher.gpus_per_node=2"], "hydra.launcher.gpus_per_node=2 must be 0"),
        (["hydra.launcher.signal=USR7"], "must be the name of a signal"),
        (["hydra.launcher.signal=USR1"], "must be among callbacks.last.signals"),
        (["hydra.launcher.timeout_min=0"], "hydra.launcher.timeout_min=0 must be"),
        (["hydra.launcher.executor=pbs"], "hydra.launcher.executor=pbs must be slurm or local"),
        (["hydra.launcher.executor=local", "trainer.num_nodes=2"], "this machine only"),
    ],
)
def test_what_slurm_cannot_start_is_refused_before_submission(options, message, toy, command):
    outcome = command("vqvae-train", *SHORT, *toy, *SLURM, "--dry-run", *options)
    assert outcome.status == 1
    assert message in outcome.err
    assert outcome.out == ""


def test_stages_of_different_sizes_and_a_dry_run_without_slurm_are_refused(toy, command):
    options = ("trainer=ddp_cpu", "prior.trainer.devices=1", *toy, *SLURM)
    outcome = command("vqvae-pipeline", *options)
    assert outcome.status == 1
    assert "prior.trainer asks for 1 nodes of 1 devices, trainer for 1 of 2" in outcome.err
    outcome = command("vqvae-train", *SHORT, *toy, "--dry-run")
    assert outcome.status == 1
    assert "add that" in outcome.err


def test_each_job_of_a_sweep_gets_the_resources_of_its_own_trainer(toy, command):
    gpus = ("trainer.accelerator=gpu", "trainer.devices=1,8", "seed=0,1")
    outcome = command("vqvae-train", *SHORT, *toy, *gpus, *SLURM, "--dry-run")
    assert outcome.status == 0, outcome.err
    found = re.findall(r"--array=(\S+)|--gpus-per-node=(\S+)|--ntasks-per-node=(\S+)", outcome.out)
    assert ["".join(groups) for groups in found] == ["0-1%2", "1", "1", "0-1%2", "8", "8"]


def test_joblib_runs_each_job_with_its_own_values(toy, command, tmp_path):
    options = (*TINY_VQVAE, *toy)
    places = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep")
    outcome = command("vqvae-train", *options, *places, "seed=1,2")
    assert outcome.status == 0, outcome.err
    folders = [tmp_path / "sweep" / name for name in ("0", "1")]
    assert [result(folder)["seed"] for folder in folders] == [1, 2]


def test_each_job_of_joblib_has_its_own_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_held", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen = []
    for _ in range(2):
        parallel.take_gpus(str(tmp_path), [["3"], ["GPU-a", "5"]])
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["3", "GPU-a,5"]
    with pytest.raises(RankError, match="use all GPUs"):
        parallel.take_gpus(str(tmp_path), [["3"], ["GPU-a", "5"]])
    parallel._held.pop(0).close()  # a worker ends and is replaced
    parallel.take_gpus(str(tmp_path), [["3"], ["GPU-a", "5"]])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_more_jobs_than_gpus_are_refused(toy, command, monkeypatch):
    monkeypatch.setattr(parallel, "list_visible_gpus", lambda: ["0", "1"])
    places = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=3", "hydra.sweep.dir=sweep")
    outcome = command("vqvae-train", *TINY_VQVAE, *toy, *places)
    assert outcome.status == 1
    assert "hydra.launcher.n_jobs=3 must be at most 2" in outcome.err


def test_a_pipelines_resources_are_its_trainers(tmp_path):
    cfg = compose("pipeline", "trainer=ddp_cpu", "trainer.num_nodes=3", folder=tmp_path)
    assert count_resources(cfg) == (3, 2, 0)
    cfg = compose("sample", "prior_checkpoint=x", "accelerator=gpu", "devices=4", folder=tmp_path)
    assert count_resources(cfg) == (1, 1, 4)


def test_an_interruption_keeps_its_status_between_processes():
    stop = pickle.loads(pickle.dumps(Interrupted("Stopped.", 75)))
    assert (str(stop), stop.status) == ("Stopped.", 75)


@pytest.mark.slow
def test_parallel_jobs_save_on_ctrl_c(toy, tmp_path, cold):
    endless = ("trainer.max_steps=1000000", "trainer.val_check_interval=200")
    tiny = [option for option in TINY_VQVAE if not option.startswith("trainer=")]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vqvae_lightning.train", "hydra/launcher=joblib"),
            *("hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep", "seed=0,1,2", "trainer=cpu"),
            *(*toy, *tiny, *endless),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    jobs = [tmp_path / "sweep" / name for name in ("0", "1")]
    # Neither job ends by itself, so both get this far only in parallel.
    while not all((job / "metrics.csv").is_file() for job in jobs):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "resume=auto" in err
    assert all((job / "checkpoints" / "last.ckpt").is_file() for job in jobs)
    assert not (tmp_path / "sweep" / "2" / "config.yaml").is_file()

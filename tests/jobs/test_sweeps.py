"""Sweeps: failed jobs, studies that resume, and pruned jobs."""

import csv
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_VQVAE, compose
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from vqvae_lightning.configs import CONF_DIR
from vqvae_lightning.errors import InputError, Interrupted
from vqvae_lightning.jobs.study import read_space
from vqvae_lightning.report.jobs import read_jobs
from vqvae_lightning.runs.results import read_result, write_config
from vqvae_lightning.stages import training

OPTUNA = ("-m", "hydra/sweeper=optuna", "hydra.sweep.dir=study")
LEARNING = (
    *TINY_VQVAE,
    "trainer.max_steps=15",
    "trainer.val_check_interval=5",
    "trainer.limit_train_batches=2",
    "trainer.limit_test_batches=1",
)

PRUNING = ("callbacks.pruning.min_jobs=2", "callbacks.pruning.warmup=1")


def table(folder):
    with (folder / "jobs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def disturb(monkeypatch, errors):
    """Make jobs fail, by the names of their folders; returns a list that collects every job."""
    whole, seen = training.train, []

    def train(cfg, *arguments):
        number = cfg.folder.rpartition("/")[2]
        seen.append(number)
        if number in errors:
            if isinstance(errors[number], Interrupted):
                write_config(cfg, Path(cfg.folder))  # as a job that has begun
            raise errors[number]
        return whole(cfg, *arguments)

    monkeypatch.setattr(training, "train", train)
    return seen


def test_a_failed_job_is_reported_and_stops_no_other(toy, command, tmp_path, monkeypatch):
    sweep = ("-m", *TINY_VQVAE, *toy, "resume=auto", "hydra.sweep.dir=jobs")
    values = ("model.optimizer.lr=1e-3,-1,2e-3", "model.net.quantizer.commitment=0.25,1.0")
    with monkeypatch.context() as patch:
        disturb(patch, {"4": RuntimeError("power cut")})
        outcome = command("vqvae-train", *sweep, *values)
    assert outcome.status == 1
    lines = [line for line in outcome.err.splitlines() if re.match(r"  job \d", line)]
    refused = "model.optimizer.lr=-1: Invalid learning rate: -1; the default is 0.001."
    assert [
        re.match(r"  job (\d) .*commitment=(\S+)\): (.*)", line).groups() for line in lines
    ] == [
        ("2", "0.25", refused),
        ("3", "1.0", refused),
        ("4", "0.25", "RuntimeError: power cut"),
    ]
    assert "3 jobs finished, 3 failed" in outcome.err
    assert "Traceback" not in outcome.err
    assert "power cut" in (tmp_path / "jobs/4/failure.txt").read_text().split("Traceback")[1]

    rows = table(tmp_path / "jobs")
    assert [row["state"] for row in rows] == ["finished"] * 3 + ["failed"] * 3
    scores = [float(row["objective"]) for row in rows[:3]]
    assert scores == sorted(scores)
    for row in rows[:3]:
        result = read_result(tmp_path / "jobs" / row["folder"])
        assert float(row["objective"]) == result["objective"]
        assert float(row["seconds"]) == result["seconds"]
        assert {name: float(row[name]) for name in result["metrics"]} == {
            name: entry["value"] for name, entry in result["metrics"].items()
        }
    chosen = {row["folder"]: (row["model.optimizer.lr"], row["note"]) for row in rows}
    assert chosen["5"] == ("0.002", "")
    assert chosen["3"] == ("-1", refused)
    assert set(rows[0]) - set(result["metrics"]) == {
        *("folder", "state", "objective", "monitor", "seconds", "commit", "note"),
        *("model.optimizer.lr", "model.net.quantizer.commitment"),
    }, "values that all jobs share are left out"
    page = (tmp_path / "jobs/report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert page.count("data:image/png") == 3
    assert page.count("<svg") == 1
    assert "5: lr=0.002, commitment=1" in page
    assert page.count("power cut") == 1

    # The next start runs the failed jobs only, and forgets the failure of one that now works.
    outcome = command("vqvae-train", *sweep, *values)
    assert "4 jobs finished, 2 failed" in outcome.err
    assert "power cut" not in outcome.err
    assert {row["folder"]: row["state"] for row in table(tmp_path / "jobs")}["4"] == "finished"
    assert not (tmp_path / "jobs/4/failure.txt").exists()


def test_a_report_that_cannot_be_written_fails_no_sweep(toy, command, monkeypatch):
    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr("vqvae_lightning.report.sweep.write_sweep_report", fail)
    outcome = command("vqvae-train", "-m", *TINY_VQVAE, *toy, "hydra.sweep.dir=jobs", "seed=1")
    assert outcome.status == 0
    assert "no report of the sweep: OSError: disk full" in outcome.out


def test_errors_before_any_job_are_reported_as_usual(toy, command):
    outcome = command("vqvae-train", "-m", *toy, "model.nonsense=1,2", "hydra.sweep.dir=jobs")
    assert outcome.status == 1
    assert "nonsense" in outcome.err
    assert "jobs finished" not in outcome.err
    assert "no report" not in outcome.out


def test_a_resumed_study_runs_the_missing_trials(toy, command, tmp_path, monkeypatch):
    options = (*OPTUNA, "hydra.sweeper.n_trials=3", *TINY_VQVAE, *toy)
    with monkeypatch.context() as patch:
        disturb(patch, {"1": Interrupted("Interrupted.")})
        assert command("vqvae-train", *options).status == 130
    study = tmp_path / "study"
    assert sorted(path.name for path in study.glob("*/")) == ["0", "1"]
    before = (study / "0/result.json").stat().st_mtime_ns
    drawn = OmegaConf.load(study / "1/config.yaml").model.optimizer.lr

    # The interrupted trial comes first, in its folder and with its values; this time it fails.
    with monkeypatch.context() as patch:
        seen = disturb(patch, {"1": RuntimeError("diverged")})
        outcome = command("vqvae-train", *options)
    assert outcome.status == 0, outcome.err
    assert seen == ["1", "2"]
    assert "2 jobs finished, 1 failed" in outcome.err
    assert "RuntimeError: diverged" in outcome.err

    # Failed trials do not count: one is missing, and then none.
    for expected in (["3"], []):
        with monkeypatch.context() as patch:
            seen = disturb(patch, {})
            outcome = command("vqvae-train", *options)
        assert outcome.status == 0, outcome.err
        assert seen == expected
        assert "failed" not in outcome.err, "failures of earlier starts are not reported again"
    assert (study / "0/result.json").stat().st_mtime_ns == before
    jobs = read_jobs(study)
    assert sorted((job.name, job.state) for job in jobs) == [
        *(("0", "finished"), ("1", "failed"), ("2", "finished"), ("3", "finished"))
    ]
    rates = {job.name: job.chosen["model.optimizer.lr"] for job in jobs}
    assert rates["1"] == drawn
    assert len(set(rates.values())) == 4, "no start repeats the values of another"
    assert all(3e-4 <= rate <= 6e-3 for rate in rates.values())
    best = OmegaConf.load(study / "optimization_results.yaml")
    assert best.best_value == jobs[0].objective == min(job.objective for job in jobs[:3])
    assert best.best_params["model.optimizer.lr"] == jobs[0].chosen["model.optimizer.lr"]

    # Another monitor would compare its values with those of the first monitor.
    outcome = command("vqvae-train", *options, "monitor=val/psnr_db")
    assert outcome.status == 1
    assert "hydra.sweeper.direction=maximize must be minimize" in outcome.err


def test_an_interrupted_trial_resumes_from_its_checkpoint(toy, command, tmp_path, monkeypatch):
    from vqvae_lightning.callbacks.checkpoints import LastCheckpoint

    options = (*OPTUNA, "hydra.sweeper.n_trials=1", *LEARNING, *toy)
    options = [text for text in options if "num_codes" not in text]  # a searched key
    whole = LastCheckpoint.on_train_batch_end

    def stop(self, trainer, *arguments):
        self._requested = 2 if trainer.global_step == 12 else 0
        whole(self, trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_end", stop)
        outcome = command("vqvae-train", *options)
    assert outcome.status == 130
    assert "after step 12" in outcome.err
    config = (tmp_path / "study/0/config.yaml").read_text()
    refused = command("vqvae-train", *options, "model.optimizer.lr=1e-3")
    assert refused.status == 1
    assert "model.optimizer.lr is searched by the study" in refused.err
    outcome = command("vqvae-train", *options)
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "study/0/config.yaml").read_text() == config
    assert "step 10/15" not in outcome.out
    assert "step 15/15" in outcome.out
    assert read_result(tmp_path / "study/0")["steps"] == 15


def test_a_study_with_another_space_and_sampler(toy, command, tmp_path):
    options = ("hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=1", "seed=7")
    options = (*OPTUNA, *options, *TINY_VQVAE, *toy)
    outcome = command("vqvae-train", *options, "quantizer=choice(none)")  # does not compose
    assert outcome.status == 1
    assert "unknown key model.net.quantizer" in outcome.err
    outcome = command("vqvae-train", *options, "model.optimizer.lr=-1")
    assert outcome.status == 1
    assert "0 jobs finished, 1 failed" in outcome.err
    assert "Traceback" not in outcome.err
    own = (*options, "hydra/sweeper/space=given")
    outcome = command("vqvae-train", *own, "model.optimizer.lr=interval(1e-3,2e-3)")
    assert outcome.status == 1
    (line,) = outcome.err.splitlines()
    assert re.match(r"error: model.optimizer.lr: the study in \S+ searches other values", line)
    outcome = command("vqvae-train", *own, "model.optimizer.lr=tag(log,interval(1e-3,2e-3))")
    assert outcome.status == 0, outcome.err
    job, failed = read_jobs(tmp_path / "study")
    assert (job.name, failed.name, failed.state) == ("2", "1", "failed")
    assert 1e-3 <= job.config["model.optimizer.lr"] <= 2e-3
    assert job.config["model.net.quantizer.commitment"] == 0.25


def test_interrupted_and_new_trials_run_in_parallel(toy, command, tmp_path, monkeypatch):
    batches = []

    def launch(self, overrides, initial_job_idx):
        batches.append([*overrides])
        raise Interrupted("Interrupted.")

    launcher = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    monkeypatch.setattr(Plugins.instance().class_name_to_class[launcher], "launch", launch)
    options = (*OPTUNA, "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=3", *toy)
    for begun in ("1", None):
        assert command("vqvae-train", *options).status == 130
        if begun:
            (tmp_path / "study" / begun).mkdir(parents=True)
            (tmp_path / "study" / begun / "config.yaml").touch()
    folders = [[job[-1].rpartition("=")[2] for job in jobs] for jobs in batches]
    assert folders == [["0", "1"], ["1", "2"]]
    assert batches[0][1] == batches[1][0], "the interrupted trial has its own values"
    assert all(job[-2] == "resume=auto" for jobs in batches for job in jobs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=int(interval(1,5))", "IntDistribution(high=5, log=False, low=1, step=1)"),
        ("x=int(tag(log,interval(1,5)))", "IntDistribution(high=5, log=True, low=1, step=1)"),
        ("x=interval(1,5.0)", "FloatDistribution(high=5.0, log=False, low=1.0, step=None)"),
        ("x=tag(log,interval(1e-3,1))", "FloatDistribution(high=1.0, log=True, low=0.001, step="),
        ("x=range(2,8,2)", "IntDistribution(high=8, log=False, low=2, step=2)"),
        ("x=range(0,1,0.25)", "FloatDistribution(high=1.0, log=False, low=0.0, step=0.25)"),
        ("x=shuffle(range(2))", "CategoricalDistribution(choices=("),
        ("x=choice(a,2,true)", "CategoricalDistribution(choices=('a', 2, True))"),
        ("x=null,'a b'", "CategoricalDistribution(choices=('null', \"'a b'\"))"),
    ],
)
def test_hydras_sweeps_are_read_as_distributions(text, expected):
    space, fixed = read_space([text, "y=1"])
    assert str(space.pop("x")).startswith(expected)
    assert (space, list(fixed)) == ({}, ["y"])


def test_the_last_override_of_a_key_counts():
    interval, value = "x=interval(1,5)", "x=3"
    assert read_space([interval, value])[0] == {}
    assert read_space([value, interval])[1] == {}


@pytest.mark.parametrize("text", ["x=interval(5,1)", "x=glob(*)", "x=tag(log,interval(0.0,1.0))"])
def test_a_space_that_cannot_be_searched_is_refused(text):
    with pytest.raises(InputError, match=re.escape(text)):
        read_space([text])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("hydra.sweeper.n_jobs=0", "hydra.sweeper.n_jobs=0 must be"),
        ("hydra.sweeper.direction=up", "direction=up must be minimize or maximize"),
        ("hydra.sweeper.storage=sqlite:////nowhere/study.db", "storage=sqlite:////nowhere/stu"),
        ("hydra.sweeper.sampler.seed=x", "hydra.sweeper.sampler"),
        ("hydra.sweeper.custom_search_space=my.nothing", "custom_search_space=my.nothing"),
    ],
)
def test_an_option_that_optuna_refuses_is_an_error_of_one_line(option, said, toy, command):
    outcome = command("vqvae-train", *OPTUNA, option, *toy)
    assert outcome.status == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    "path", sorted((CONF_DIR / "hydra/sweeper/sampler").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_sampler_suggests_values(path, toy, command, tmp_path, monkeypatch):
    seen = []

    def train(cfg):
        seen.append(cfg.model.optimizer.lr)
        return {"objective": cfg.model.optimizer.lr, "metrics": {}}

    monkeypatch.setattr(training, "train", train)
    choice = [f"hydra/sweeper/sampler={path.stem}", "hydra/sweeper/space=learning_rate"]
    if "n_startup_trials" in OmegaConf.load(path):
        choice.append("hydra.sweeper.sampler.n_startup_trials=1")
    outcome = command("vqvae-train", *OPTUNA, *choice, "hydra.sweeper.n_trials=3", *toy)
    assert outcome.status == 0, outcome.err
    assert len(set(seen)) == 3
    assert OmegaConf.load(tmp_path / "study/optimization_results.yaml").best_value == min(seen)


def test_a_study_without_its_extra_is_refused(toy, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    outcome = command("vqvae-train", *OPTUNA, *TINY_VQVAE, *toy)
    assert outcome.status == 1
    assert "hydra/sweeper=optuna needs the extra optuna" in outcome.err


@pytest.mark.parametrize(
    "path", sorted((CONF_DIR / "hydra/sweeper/space").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_search_space_names_existing_keys(path, tmp_path):
    cfg = compose("vqvae", folder=tmp_path)
    for key in OmegaConf.load(path):
        assert OmegaConf.select(cfg, key) is not None, key


def test_a_job_that_lags_behind_the_median_is_stopped(toy, command, tmp_path):
    rates = "model.optimizer.lr=5e-3,2e-3,1e-5,8e-3,2e-5"
    outcome = command("vqvae-train", "-m", *LEARNING, *toy, rates, *PRUNING, "hydra.sweep.dir=jobs")
    assert outcome.status == 0, outcome.err
    jobs = {job.name: job for job in read_jobs(tmp_path / "jobs")}
    pruned = {name for name, job in jobs.items() if job.state == "pruned"}
    assert (pruned, len(jobs)) == ({"2", "4"}, 5)
    result = read_result(tmp_path / "jobs/2")
    assert result["steps"] == 10, "the second validation, the first after the warm-up"
    scores = {name: job.curves["val/nmse"][1] for name, job in jobs.items()}
    assert result["objective"] == pytest.approx(min(scores["2"]))
    assert len(scores["2"]) == 2
    # Two validations each; of the finished jobs there were two, then three.
    reached = {name: min(score[:2]) for name, score in scores.items()}
    medians = [statistics.median(reached[name] for name in those) for those in ("01", "013")]
    said = re.findall(r"stopped after step 10: .*? was ([0-9.]+)", " ".join(outcome.out.split()))
    assert said == [f"{median:.4g}" for median in medians]
    assert "after 10 steps" in (tmp_path / "jobs/report.html").read_text()


def test_two_ranks_stop_together_with_the_values_that_were_drawn(toy, command, tmp_path):
    others = ("hydra.sweep.dir=study", "hydra.sweep.subdir=other${hydra.job.num}")
    rates = "model.optimizer.lr=5e-3,2e-3"
    assert command("vqvae-train", "-m", *LEARNING, *toy, rates, *others).status == 0
    run = subprocess.run(
        [
            *(sys.executable, "-m", "vqvae_lightning.train"),
            *(*OPTUNA, *LEARNING, *toy, *PRUNING),
            *("trainer=ddp_cpu", "trainer.devices=2", "trainer.precision=32-true"),
            *("hydra/sweeper/space=given", "model.optimizer.lr=interval(1e-6,1e-5)"),
            *("hydra.sweeper.n_trials=1", "trainer.log_every_n_steps=1"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    drawn = tmp_path / "study" / "0"
    result = read_result(drawn)
    assert (result["pruned"], result["steps"], result["devices"]) == (True, 10, 2)
    rates = [OmegaConf.load(drawn / name) for name in ("config.yaml", "ranks/config.yaml")]
    assert rates[0].model.optimizer.lr == rates[1].model.optimizer.lr < 1e-5

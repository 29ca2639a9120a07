"""Hydra launchers for many jobs: `hydra/launcher=slurm` (submitit) and `hydra/launcher=joblib`.

Those that come as plugins of Hydra compose a job in a process that lacks this package's resolvers,
on each of its ranks, and resolve the resources once for a whole sweep. Here a job's first rank
alone composes, and resources come from the job's own trainer.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from vqvae_lightning.configs import register_resolvers
from vqvae_lightning.errors import (
    Failed,
    InputError,
    Interrupted,
    RankError,
    check_positive,
)
from vqvae_lightning.launch import led

_PLACE = "hydra_plugins.vqvae_lightning"


def register_launchers() -> None:
    """Let `_target_` name them; Hydra would find them only in a package `hydra_plugins`."""
    from hydra.core.plugins import Plugins

    for launcher in (SlurmLauncher, JoblibLauncher):
        Plugins.instance().class_name_to_class[f"{_PLACE}.{launcher.__name__}"] = launcher


@dataclass
class Job:
    """One job of a sweep, to be pickled and run by another process.

    Args:
        context: Hydra's.
        function: What the command does with a config.
        config: Of the sweep.
        overrides: Of the job.
        number: Of the job in the sweep.
        state: Hydra's singletons.
    """

    context: Any
    function: Any
    config: DictConfig
    overrides: list[str]
    number: int
    state: Any

    def compose(self) -> DictConfig:
        """The job's whole config."""
        config = self.context.config_loader.load_sweep_config(self.config, self.overrides)
        with open_dict(config):
            config.hydra.job.num = self.number
            config.hydra.job.id = f"{config.hydra.job.name}_{self.number}"
        assert isinstance(config, DictConfig)
        return config

    def run(self) -> JobReturn:
        """Compose and run, in this process."""
        setup_globals()
        register_resolvers()
        Singleton.set_state(self.state)
        return run_job(
            hydra_context=self.context,
            task_function=self.function,
            config=self.compose(),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def __call__(self) -> JobReturn | None:
        """What each task of a submitted job does: the first one runs it, the others follow."""
        if os.environ["SUBMITIT_EXECUTOR"] == "local":
            _as_torchrun()
        try:
            done = led(self.run)
        except Failed as failure:
            raise failure.error from None
        except Interrupted as stop:
            sys.stderr.write(f"{stop}\n")
            sys.exit(stop.status)
        if done is not None and done.status == JobStatus.FAILED:
            raise done._return_value
        return done

    def checkpoint(self) -> Any:
        """What submitit starts when it has requeued the job: the same, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self, overrides=[*self.overrides, "resume=auto"]))


class Resources(NamedTuple):
    """What a job needs: the numbers that its trainer counts."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int


def resources(cfg: DictConfig) -> Resources:
    """What the job of the composed `cfg` needs.

    Raises:
        InputError: If a number is missing, or the stages of a pipeline need different ones.
    """
    if "trainer" not in cfg:
        if "accelerator" in cfg:
            _require_choice(cfg, "accelerator", "accelerator=gpu or accelerator=cpu")
        gpus = cfg.devices if "devices" in cfg and cfg.accelerator != "cpu" else 0
        return Resources(1, 1, gpus)
    trainers = {"trainer": cfg.trainer}
    if "prior" in cfg and "trainer" in cfg.prior:
        trainers["prior.trainer"] = cfg.prior.trainer
    needs = {}
    for place, trainer in trainers.items():
        devices = trainer.devices
        if not isinstance(devices, int) or devices < 1:
            raise InputError(
                f"{place}.devices={devices}: hydra/launcher=slurm needs the number of devices of "
                "each node, as this machine may have others."
            )
        _require_choice(trainer, f"{place}.accelerator", "trainer=gpu or trainer=cpu")
        nodes = check_positive(f"{place}.num_nodes", trainer.num_nodes)
        needs[place] = Resources(nodes, devices, 0 if trainer.accelerator == "cpu" else devices)
    first = needs["trainer"]
    for place, need in needs.items():
        if need != first:
            raise InputError(
                f"{place} asks for {need.nodes} nodes of {need.tasks_per_node} devices, trainer "
                f"for {first.nodes} of {first.tasks_per_node}: one Slurm job runs both stages."
            )
    return first


def _require_choice(config: DictConfig, key: str, choices: str) -> None:
    """Refuse the CPU if this machine chose it, which is not the one that runs the job."""
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    if raw["accelerator"] == "${cuda_or_cpu:}" and config.accelerator == "cpu":
        raise InputError(
            f"{key}: this machine has no GPU, those that Slurm chooses may: add {choices}."
        )


class _JobLauncher(Launcher):
    """Knows a sweep, as Hydra wants its launchers to."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Keep what the jobs are made of."""
        self.context, self.function, self.config = hydra_context, task_function, config

    def jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """The jobs of the given overrides, numbered from `first`; the sweep's folder is there."""
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        state = Singleton.get_state()
        return [
            Job(self.context, self.function, self.config, list(overrides), number, state)
            for number, overrides in enumerate(job_overrides, first)
        ]


class SlurmLauncher(_JobLauncher):
    """Submit each job with what its trainer needs; jobs with equal needs are one array.

    The keyword arguments are those of `conf/hydra/launcher/slurm.yaml`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = DictConfig(options)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submit, and wait for the results.

        Raises:
            InputError: Before anything is submitted.
            SystemExit: After a dry run, with status 0.
        """
        jobs = self.jobs(job_overrides, initial_job_idx)
        arrays: dict[Resources, list[Job]] = {}
        for job in jobs:
            arrays.setdefault(self.check(job.compose()), []).append(job)
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = self.options.signal
        try:
            from submitit.core.job_environment import JobEnvironment
            from submitit.core.utils import FailedJobError
        except ModuleNotFoundError as error:
            raise InputError(
                "hydra/launcher=slurm needs submitit: uv run --extra slurm COMMAND."
            ) from error
        JobEnvironment.USR_SIG = self.options.signal
        if self.options.dry_run:
            for need, array in arrays.items():
                sys.stdout.write(self.script(need, len(array)))
            sys.exit(0)
        submitted: dict[int, Any] = {}
        for need, array in arrays.items():
            executor = self.executor(need)
            try:
                with executor.batch():
                    handles = [executor.submit(job) for job in array]
            except FailedJobError as error:
                said = str(error).strip().splitlines()
                raise InputError(f"Slurm refuses the job: {said[-1] if said else error}") from error
            for job, handle in zip(array, handles, strict=True):
                submitted[job.number] = handle
                sys.stderr.write(
                    f"job {job.number} is {self.options.executor} job {handle.job_id}: "
                    f"{need.nodes} x {need.tasks_per_node} tasks, its output: "
                    f"{handle.task(0).paths.stderr}\n"
                )
        return [_outcome(job, submitted[job.number].task(0)) for job in jobs]

    def check(self, cfg: DictConfig) -> Resources:
        """What a job needs.

        Raises:
            InputError: If an option of the launcher, or the job, cannot work.
        """
        need = resources(cfg)
        for key, count in need._asdict().items():
            if self.options[key] not in (None, count):
                raise InputError(
                    f"hydra.launcher.{key}={self.options[key]} must be {count}, which "
                    "trainer.devices and trainer.num_nodes ask for; leave it out."
                )
        for key in ("timeout_min", "cpus_per_task", "signal_delay_s", "array_parallelism"):
            check_positive(f"hydra.launcher.{key}", self.options[key])
        name = f"SIG{self.options.signal}"
        if name not in signal.Signals.__members__:
            raise InputError(
                f"hydra.launcher.signal={self.options.signal} must be the name of a signal "
                "without SIG, such as USR2."
            )
        stages = [cfg, cfg.prior] if "prior" in cfg else [cfg]
        for stage in stages:
            last = stage.callbacks.last if "callbacks" in stage else None
            if last is not None and name not in last.signals:
                raise InputError(
                    f"hydra.launcher.signal={self.options.signal} must be among "
                    f"callbacks.last.signals={list(last.signals)}, or nothing is saved at it."
                )
        if self.options.executor not in ("slurm", "local"):
            raise InputError(
                f"hydra.launcher.executor={self.options.executor} must be slurm or local."
            )
        if self.options.executor == "local" and (need.nodes > 1 or self.options.dry_run):
            raise InputError(
                "hydra.launcher.executor=local starts processes on this machine only, without an "
                "sbatch script."
            )
        return need

    def executor(self, need: Resources) -> Any:
        """Of submitit, for jobs with this need.

        Raises:
            InputError: If there is no Slurm here.
        """
        from submitit import LocalExecutor, SlurmExecutor

        options = self.options
        if options.executor == "local":
            local = LocalExecutor(options.folder, max_num_timeout=options.max_num_timeout)
            local.update_parameters(
                tasks_per_node=need.tasks_per_node,
                gpus_per_node=need.gpus_per_node,
                timeout_min=options.timeout_min,
                signal_delay_s=options.signal_delay_s,
            )
            return local
        if SlurmExecutor.affinity() < 0:
            raise InputError(
                "hydra/launcher=slurm: there is no srun here; --dry-run prints the script, "
                "hydra.launcher.executor=local starts the ranks on this machine."
            )
        slurm = SlurmExecutor(options.folder, max_num_timeout=options.max_num_timeout)
        slurm.update_parameters(**self.parameters(need))
        return slurm

    def script(self, need: Resources, jobs: int) -> str:
        """The sbatch script of an array of that many jobs; no Slurm is needed."""
        from submitit import SlurmExecutor

        class Printed(SlurmExecutor):
            @classmethod
            def affinity(cls) -> int:
                return 1

        printed = Printed(self.options.folder)
        printed.update_parameters(**self.parameters(need))
        if jobs > 1:
            printed.parameters["map_count"] = jobs
        return f"{printed._make_submission_file_text(printed._submitit_command_str, '')}\n"

    def parameters(self, need: Resources) -> dict[str, Any]:
        """Options of sbatch, by submitit's names."""
        options = OmegaConf.to_container(self.options)
        assert isinstance(options, dict)
        same = ("partition", "account", "qos", "constraint", "signal_delay_s")
        memory = options["mem_gb"]
        found = {
            **{key: options[key] for key in (*same, "array_parallelism", "additional_parameters")},
            "job_name": str(self.config.study),
            "time": options["timeout_min"],
            "nodes": need.nodes,
            "ntasks_per_node": need.tasks_per_node,
            "gpus_per_node": need.gpus_per_node or None,
            "cpus_per_task": options["cpus_per_task"],
            "mem": None if memory is None else f"{memory}GB",
            "setup": [
                *options["setup"],
                f"export SUBMITIT_PREEMPT_SIGNAL={options['signal']}",
            ],
            # srun neither ends a job of which a task has failed, nor takes this number from sbatch.
            "srun_args": [
                "--kill-on-bad-exit=1",
                f"--cpus-per-task={options['cpus_per_task']}",
            ],
        }
        return {key: value for key, value in found.items() if value is not None}


def _outcome(job: Job, handle: Any) -> JobReturn:
    """What a submitted job returned; one that did not gives a failed JobReturn."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        (done,) = handle.results()
    except (FailedJobError, UncompletedJobError) as error:
        lines = [line for line in str(error).splitlines() if line and not line.startswith("-")]
        # submitit's text: a heading, the traceback, then where the output is.
        said = [line for line in lines[1:] if not line.startswith((" ", "You can", "or at"))]
        last = said[-1].partition("Error: ")[2] or said[-1] if said else lines[0]
        output = f"(its output: {handle.paths.stderr})"
        done = JobReturn(overrides=job.overrides, status=JobStatus.FAILED)
        done.return_value = RankError(f"job {job.number} failed: {last} {output}")
    assert isinstance(done, JobReturn)
    return done


def _as_torchrun() -> None:
    """Name the ranks of submitit's local executor as torchrun would."""
    from submitit.helpers import TorchDistributedEnvironment

    ranks = TorchDistributedEnvironment()
    if ranks.world_size > 1:
        ranks.master_addr = "127.0.0.1"
        ranks.export(set_cuda_visible_devices=False, overwrite=True)
        os.environ["TORCHELASTIC_RUN_ID"] = os.environ["SUBMITIT_LOCAL_JOB_ID"]


class JoblibLauncher(_JobLauncher):
    """Run jobs side by side, each in a process with a share of the threads and a GPU of its own.

    Args:
        n_jobs: Jobs at a time; None for one per GPU, or per CPU core where there is no GPU.
    """

    def __init__(self, n_jobs: int | None) -> None:
        self.n_jobs = n_jobs

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run them all.

        Raises:
            InputError: If there are fewer GPUs than jobs at a time.
            Interrupted: If the sweep was told to stop.
            RankError: If a worker was killed.
        """
        import tempfile

        try:
            import joblib
            from joblib.externals.loky.process_executor import TerminatedWorkerError
        except ModuleNotFoundError as error:
            raise InputError(
                "hydra/launcher=joblib needs joblib: uv run --extra joblib COMMAND."
            ) from error

        gpus = visible_gpus()
        count = self.n_jobs
        if count is None:
            count = len(gpus) or _usable_cores()
        check_positive("hydra.launcher.n_jobs", count)
        if gpus and count > len(gpus):
            raise InputError(
                f"hydra.launcher.n_jobs={count} must be at most {len(gpus)}, the GPUs of this "
                "machine: each job has its own."
            )
        count = min(count, len(job_overrides))
        jobs = self.jobs(job_overrides, initial_job_idx)
        share = [gpus[number::count] for number in range(count)] if gpus else []
        with tempfile.TemporaryDirectory() as place, _passing_on(Path(place)) as asked:
            pool = joblib.Parallel(
                n_jobs=count,
                backend="loky",
                batch_size=1,
                pre_dispatch=count,  # so that none waits in a worker when the sweep is to stop
                initializer=_start_worker,
                initargs=(place, share),
            )
            todo = (job for job in jobs if not asked)
            try:
                done = list(pool(joblib.delayed(_ended)(job) for job in todo))
            except TerminatedWorkerError as error:
                if not asked:
                    raise RankError(
                        "a process that ran a job was killed, for want of memory perhaps, and the "
                        "others with it: start the same command again with resume=auto."
                    ) from error
                done = []
        stops = [end for end in done if isinstance(end, Interrupted)]
        if asked or stops:
            status = next((stop.status for stop in stops), 130)
            raise Interrupted(
                "Interrupted; the jobs have saved what they had. Go on with the same command, "
                "resume=auto and hydra.sweep.dir=FOLDER.",
                status,
            )
        return done


def _ended(job: Job) -> JobReturn | Interrupted:
    """Run a job in a worker; being told to stop is no error, or joblib would kill the others."""
    try:
        return job.run()
    except Interrupted as stop:
        return stop


@contextmanager
def _passing_on(place: Path) -> Iterator[list[int]]:
    """Pass signals to stop on to the workers, which save, instead of dying of them.

    Args:
        place: The folder with a file for each worker, named by its process.

    Yields:
        The signals that have come. At a second Ctrl-C all ends at once.
    """
    asked: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)
        for worker in place.glob("*.worker"):
            with suppress(ProcessLookupError):
                # Not SIGINT, which the terminal has sent to them already.
                os.kill(int(worker.stem), signal.SIGTERM)

    names = ("SIGINT", "SIGTERM", "SIGUSR2")  # Windows lacks the last one
    wanted = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_worker(place: str, shares: list[list[str]]) -> None:
    Path(place, f"{os.getpid()}.worker").touch()
    take_gpus(place, shares)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[: torch.cuda.device_count()] or [
        str(number) for number in range(torch.cuda.device_count())
    ]


def _usable_cores() -> int:
    """Cores that this process may use; all of them where, as on macOS, the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_taken: list[Any] = []


def _lock(file: Any) -> None:
    """Lock an open file until this process ends.

    Raises:
        OSError: If another process has locked it.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def take_gpus(locks: str, shares: list[list[str]]) -> None:
    """Make this process see one of the `shares` of GPUs, which no other living process has.

    Locks on files, and not a queue: a worker that joblib replaces gives its share back.

    Args:
        locks: A folder that the processes share.
        shares: Names of GPUs; none to leave everything as it is.

    Raises:
        RankError: If all are taken.
    """
    for number, share in enumerate(shares):
        file = Path(locks, str(number)).open("w")  # noqa: SIM115  (closed with the process)
        try:
            _lock(file)
        except OSError:
            file.close()
            continue
        _taken.append(file)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share)
        return
    if shares:
        raise RankError("every GPU is taken by another job of the sweep.")

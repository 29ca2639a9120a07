"""`hydra/launcher=slurm`: submit each job of a sweep to Slurm, through submitit."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf

from vqvae_lightning.errors import InputError, check_positive
from vqvae_lightning.jobs.launcher import (
    Job,
    JobLauncher,
    Resources,
    count_resources,
    wait_for_result,
)

if TYPE_CHECKING:
    import submitit


class SlurmLauncher(JobLauncher):
    """Submit each job with the resources of its trainer; jobs with equal resources form an array.

    Args:
        **options: Options of the launcher; `conf/hydra/launcher/slurm.yaml` explains each.
    """

    def __init__(self, **options: Any) -> None:
        self.options = DictConfig(options)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submit the jobs and wait for their results.

        Raises:
            InputError: If an option cannot work or submitit is missing, before any job is
                submitted; or if Slurm refuses a job.
            SystemExit: After a dry run, with status 0.
        """
        jobs = self.make_jobs(job_overrides, initial_job_idx)
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
                sys.stdout.write(self.make_script(need, len(array)))
            sys.exit(0)
        submitted: dict[int, submitit.Job[JobReturn | None]] = {}
        for need, array in arrays.items():
            executor = self.make_executor(need)
            try:
                with executor.batch():
                    handles = [executor.submit(job) for job in array]
            except FailedJobError as error:
                lines = str(error).strip().splitlines()
                reason = lines[-1] if lines else error
                raise InputError(f"Slurm refuses the job: {reason}") from error
            for job, handle in zip(array, handles, strict=True):
                submitted[job.number] = handle
                sys.stderr.write(
                    f"job {job.number} is {self.options.executor} job {handle.job_id}: "
                    f"{need.nodes} x {need.tasks_per_node} tasks, output in "
                    f"{handle.task(0).paths.stderr}\n"
                )
        return [wait_for_result(job, submitted[job.number].task(0)) for job in jobs]

    def check(self, cfg: DictConfig) -> Resources:
        """Check the options of the launcher for a job, and count the resources of the job.

        Args:
            cfg: Composed config of the job.

        Raises:
            InputError: If an option of the launcher or of the job cannot work.
        """
        need = count_resources(cfg)
        for key, count in need._asdict().items():
            if self.options[key] not in (None, count):
                raise InputError(
                    f"hydra.launcher.{key}={self.options[key]} must be {count}, as derived from "
                    "trainer.devices and trainer.num_nodes; leave it out."
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
                    f"callbacks.last.signals={list(last.signals)}, or the run would not save."
                )
        if self.options.executor not in ("slurm", "local"):
            raise InputError(
                f"hydra.launcher.executor={self.options.executor} must be slurm or local."
            )
        if self.options.executor == "local" and (need.nodes > 1 or self.options.dry_run):
            raise InputError(
                "hydra.launcher.executor=local starts processes on this machine only and has no "
                "sbatch script."
            )
        return need

    def make_executor(self, need: Resources) -> "submitit.Executor":
        """Make submitit's executor for jobs with these resources.

        Raises:
            InputError: If this machine has no Slurm.
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
                "hydra/launcher=slurm: srun is not installed here; --dry-run prints the script, "
                "hydra.launcher.executor=local starts the ranks on this machine."
            )
        slurm = SlurmExecutor(options.folder, max_num_timeout=options.max_num_timeout)
        slurm.update_parameters(**self.make_parameters(need))
        return slurm

    def make_script(self, need: Resources, jobs: int) -> str:
        """Write the sbatch script of an array of `jobs` jobs, even without Slurm."""
        from submitit import SlurmExecutor

        class Printed(SlurmExecutor):
            # submitit's check for srun
            @classmethod
            def affinity(cls) -> int:
                return 1

        printed = Printed(self.options.folder)
        printed.update_parameters(**self.make_parameters(need))
        if jobs > 1:
            printed.parameters["map_count"] = jobs
        return f"{printed._make_submission_file_text(printed._submitit_command_str, '')}\n"

    def make_parameters(self, need: Resources) -> dict[str, Any]:
        """Make the options of sbatch, under submitit's names."""
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
            # By default srun does not end a job when a task fails, and ignores sbatch's number.
            "srun_args": [
                "--kill-on-bad-exit=1",
                f"--cpus-per-task={options['cpus_per_task']}",
            ],
        }
        return {key: value for key, value in found.items() if value is not None}

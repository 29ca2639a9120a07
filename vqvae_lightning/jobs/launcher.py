"""One job of a sweep and its resources, for the Slurm and the joblib launcher."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from vqvae_lightning.configs import register_resolvers
from vqvae_lightning.errors import Failed, InputError, Interrupted, RankError, check_positive
from vqvae_lightning.jobs.ranks import lead_ranks

if TYPE_CHECKING:
    import submitit
    from submitit.helpers import DelayedSubmission

PLUGINS = "hydra_plugins.vqvae_lightning"  # module of this package's plugins in a `_target_`


@dataclass
class Job:
    """One job of a sweep, which is pickled and run by another process.

    Args:
        context: Hydra's context.
        function: Function that runs the command on a config.
        config: Config of the sweep.
        overrides: Overrides of the job.
        number: Number of the job in the sweep.
        state: Hydra's singletons.
    """

    context: HydraContext
    function: TaskFunction
    config: DictConfig
    overrides: list[str]
    number: int
    state: Any

    def compose(self) -> DictConfig:
        """Compose the config of the job."""
        config = self.context.config_loader.load_sweep_config(self.config, self.overrides)
        with open_dict(config):
            config.hydra.job.num = self.number
            config.hydra.job.id = f"{config.hydra.job.name}_{self.number}"
        assert isinstance(config, DictConfig)
        return config

    def run(self) -> JobReturn:
        """Compose the config and run the job in this process."""
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
        """Run the job on rank 0 of a submitted job; the other ranks follow.

        Raises:
            Exception: Error of the job, if it failed.
            SystemExit: With the status of an interrupted job.
        """
        if os.environ["SUBMITIT_EXECUTOR"] == "local":
            _export_torchrun_variables()
        try:
            done = lead_ranks(self.run)
        except Failed as failure:
            raise failure.error from None
        except Interrupted as stop:
            sys.stderr.write(f"{stop}\n")
            sys.exit(stop.status)
        if done is not None and done.status == JobStatus.FAILED:
            raise done._return_value
        return done

    def checkpoint(self) -> "DelayedSubmission":
        """Tell submitit how to resume the job after requeueing it."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self, overrides=[*self.overrides, "resume=auto"]))


class Resources(NamedTuple):
    """Nodes, tasks and GPUs that the trainer of a job asks for."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int


def count_resources(cfg: DictConfig) -> Resources:
    """Count the resources that a job needs.

    Args:
        cfg: Composed config of the job.

    Raises:
        InputError: If a number is missing, or the stages of a pipeline need different resources.
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
                f"{place}.devices={devices}: hydra/launcher=slurm needs the number of devices per "
                "node, because the nodes may differ from this machine."
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
    """Refuse a CPU that was chosen because this machine has no GPU: another one runs the job.

    Raises:
        InputError: With `key` and `choices`.
    """
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    if raw["accelerator"] == "${cuda_or_cpu:}" and config.accelerator == "cpu":
        raise InputError(
            f"{key}: this machine has no GPU, but the nodes of the job may: add {choices}."
        )


class JobLauncher(Launcher):
    """Base class of the launchers: makes the jobs of a sweep."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store what Hydra passes for all jobs of the sweep."""
        self.context, self.function, self.config = hydra_context, task_function, config

    def make_jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """Make a job of each list of overrides, numbered from `first`, and the sweep's folder."""
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        state = Singleton.get_state()
        return [
            Job(self.context, self.function, self.config, list(overrides), number, state)
            for number, overrides in enumerate(job_overrides, first)
        ]


def wait_for_result(job: Job, handle: "submitit.Job[JobReturn | None]") -> JobReturn:
    """Wait for a submitted job.

    Args:
        job: Job that was submitted.
        handle: submitit's handle of its first task.

    Returns:
        Result of the job, marked as failed if the job raised an error or did not complete.
    """
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        (done,) = handle.results()
    except (FailedJobError, UncompletedJobError) as error:
        lines = [line for line in str(error).splitlines() if line and not line.startswith("-")]
        # submitit's message is a heading, the traceback, and the place of the output.
        errors = [line for line in lines[1:] if not line.startswith((" ", "You can", "or at"))]
        last = errors[-1].partition("Error: ")[2] or errors[-1] if errors else lines[0]
        output = f"(its output: {handle.paths.stderr})"
        done = JobReturn(overrides=job.overrides, status=JobStatus.FAILED)
        done.return_value = RankError(f"job {job.number} failed: {last} {output}")
    assert isinstance(done, JobReturn)
    return done


def _export_torchrun_variables() -> None:
    """Set torchrun's variables for a task of submitit's local executor."""
    from submitit.helpers import TorchDistributedEnvironment

    ranks = TorchDistributedEnvironment()
    if ranks.world_size > 1:
        ranks.master_addr = "127.0.0.1"
        ranks.export(set_cuda_visible_devices=False, overwrite=True)
        os.environ["TORCHELASTIC_RUN_ID"] = os.environ["SUBMITIT_LOCAL_JOB_ID"]

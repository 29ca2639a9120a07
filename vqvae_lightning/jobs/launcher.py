"""What the Slurm and the joblib launcher share: one job of a sweep and its resources."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from vqvae_lightning.configs import register_resolvers
from vqvae_lightning.errors import Failed, InputError, Interrupted, RankError, check_positive
from vqvae_lightning.jobs.ranks import lead_ranks

_PLACE = "hydra_plugins.vqvae_lightning"


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
            done = lead_ranks(self.run)
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

"""Weights & Biases: one run per job, with artifacts and their lineage."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import WandbLogger
from torch import nn

from vqvae_lightning.console import console
from vqvae_lightning.errors import InputError, Key
from vqvae_lightning.units import UNITS

HISTOGRAM_BINS = 512  # the most that Weights & Biases takes


def name_run(cfg: Any, job_type: str) -> None:
    """Fill in what names a job's Weights & Biases run, before its ranks share the config.

    Args:
        cfg: Of the job; its `folder` gives the run's name.
        job_type: `vqvae`, `prior` or `evaluation`.
    """
    for part in (cfg.logger or {}).values():
        if part is not None and "job_type" in part:
            part.job_type = job_type
            part.name = part.name or "/".join(Path(cfg.folder).absolute().parts[-2:])
            part.id = part.id or secrets.token_hex(4)


class WandbRun(WandbLogger):
    """One Weights & Biases run per training job: Lightning's logger, made safe for sweeps.

    A job never logs into another job's run, an unreachable server is a warning and the run goes on
    offline, and the run's id is in the config, so that a resumed job continues its run.

    Args:
        save_dir: The run folder; wandb's own files go below it.
        project: Of Weights & Biases.
        group: Runs that belong together.
        job_type: What the run does: `vqvae`, `prior`, `evaluation`.
        name: Shown in the dashboard.
        id: Unique in the project.
        offline: Keep the run on disk, for `wandb sync`. No account and no network.
        watch: Also log histograms of the network's gradients, its parameters, or all.
        artifacts: Also keep the best checkpoint as an artifact, with the data or the VQ-VAE that it
            was made from as the run's input.
        init_timeout: Seconds to wait for the server.

    Raises:
        InputError: If `watch` is none of these.
    """

    def __init__(
        self,
        save_dir: str,
        project: str,
        group: str | None = None,
        job_type: str | None = None,
        name: str | None = None,
        id: str | None = None,
        offline: bool = False,
        watch: Literal["gradients", "parameters", "all"] | None = None,
        artifacts: bool = False,
        init_timeout: float = 60.0,
    ) -> None:
        if watch not in (None, "gradients", "parameters", "all"):
            raise InputError(
                Key("watch"), f"={watch} must be one of null, gradients, parameters, all."
            )
        try:
            super().__init__(
                save_dir=save_dir,
                project=project,
                group=group,
                job_type=job_type,
                name=name,
                id=id,
                offline=offline,
            )
        except ModuleNotFoundError as error:
            raise InputError(
                "logger=wandb needs wandb: uv run --extra wandb ..., or pip install wandb."
            ) from error
        self.network = watch
        self.artifacts = artifacts
        self.init_timeout = init_timeout

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run, begun at the first use.

        Raises:
            InputError: If wandb refuses the settings, or knows no account.
        """
        if self._experiment is None:
            import wandb

            # Lightning would write WANDB_MODE, which the next job would find, and log into a run
            # that an earlier job had left open.
            options: dict[str, Any] = {
                **self._wandb_init,
                "settings": wandb.Settings(init_timeout=self.init_timeout),
                "reinit": "finish_previous",
            }
            try:
                run = wandb.init(**options, mode="offline" if self._offline else None)
            except wandb.errors.CommError as error:
                reason = str(error).splitlines()[0]
                console.print(
                    f"warning: Weights & Biases cannot be reached ({reason}); the run goes on "
                    "offline, for `wandb sync`.",
                    highlight=False,
                )
                wandb.teardown()  # its service holds the id for the run that did not start
                run = wandb.init(**options, mode="offline")
            except wandb.errors.UsageError as error:
                raise InputError(
                    f"logger=wandb: {error} Or set logger.wandb.offline=true, which needs no "
                    "account."
                ) from error
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            self._experiment = run
        return self._experiment

    def begin(self, net: nn.Module, every: int, facts: Mapping[str, Any]) -> None:
        """Watch the network if asked to, and keep what is known before the first step.

        Args:
            net: The network to train.
            every: Steps between two histograms.
            facts: Into the run's config, beside the units of the logged names.
        """
        self.log_hyperparams({"facts": dict(facts), "units": UNITS})
        if self.network is not None:
            self.watch(net, log=self.network, log_freq=every, log_graph=False)

    def keep(self, kind: str, name: str, checkpoint: Path, made_from: "Input") -> None:
        """Log a checkpoint as an artifact, and what it was made from as the input of the run.

        Offline, where wandb takes no inputs, the artifact's metadata still names it.

        Args:
            kind: `vqvae` or `prior`: the artifact's type.
            name: Of the artifact.
            checkpoint: The file.
            made_from: The data set, or the VQ-VAE.
        """
        import wandb

        if not self.artifacts:
            return
        run = self.experiment
        if not run.offline:
            source = wandb.Artifact(made_from.name, made_from.kind, metadata=made_from.facts)
            if made_from.file is not None:
                source.add_file(str(made_from.file))
            run.use_artifact(source)
        facts = {"made_from": made_from.name, **made_from.facts}
        artifact = wandb.Artifact(name, kind, metadata=facts)
        artifact.add_file(str(checkpoint))
        run.log_artifact(artifact, aliases=["best"])

    def finish(self, status: int) -> None:
        """End the run, if it has begun; `status` is 0 if the job did what it should."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=status)
            self._experiment = None


class Input(NamedTuple):
    """What a checkpoint was made from, as an artifact."""

    name: str
    kind: str
    facts: dict[str, Any]
    file: Path | None = None

"""Weights & Biases: one run per job, with pictures, artifacts and their lineage."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import WandbLogger
from torch import nn

from vqvae_lightning.console import console
from vqvae_lightning.errors import InputError, Key
from vqvae_lightning.loggers.writer import Array, Histogram
from vqvae_lightning.units import UNITS

if TYPE_CHECKING:
    from omegaconf import DictConfig


def name_run(cfg: "DictConfig", job_type: str) -> None:
    """Set the name, id and type of a job's Weights & Biases run in the config.

    This happens before the ranks share the config, so that all ranks have the same run.

    Args:
        cfg: Config of the job; the run is named after its `folder`.
        job_type: `vqvae`, `prior` or `evaluation`.
    """
    for part in (cfg.logger or {}).values():
        if part is not None and "job_type" in part:
            part.job_type = job_type
            part.name = part.name or "/".join(Path(cfg.folder).absolute().parts[-2:])
            part.id = part.id or secrets.token_hex(4)


class WandbRun(WandbLogger):
    """Lightning's logger with one Weights & Biases run per job, also within a sweep.

    A job never logs into another job's run. If the server cannot be reached, the job prints a
    warning and logs offline. The config contains the run's id, so that a resumed job continues its
    run.

    Args:
        save_dir: Run folder; wandb writes its files below it.
        project: Project in Weights & Biases.
        group: Name shared by runs that belong together.
        job_type: `vqvae`, `prior` or `evaluation`.
        name: Name in the dashboard.
        id: Id of the run, unique in the project.
        offline: Write the run to disk only, for `wandb sync`. Needs no account and no network.
        watch: Whether to log histograms of the network's gradients, its parameters, or both.
        artifacts: Whether to log the best checkpoint as an artifact, with the data or the VQ-VAE
            that it was made from as the run's input.
        init_timeout: Seconds to wait for the server.

    Raises:
        InputError: If `watch` is not one of these values, or wandb is not installed.
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
        """The wandb run, which starts at the first use.

        Raises:
            InputError: If wandb refuses the settings or finds no account.
        """
        if self._experiment is None:
            import wandb

            # Lightning would set WANDB_MODE, which affects the next job, and would log into a run
            # that an earlier job left open.
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
                    f"warning: Weights & Biases cannot be reached ({reason}); logging offline, "
                    "for `wandb sync`.",
                    highlight=False,
                )
                wandb.teardown()  # its service reserves the id for the run that did not start
                run = wandb.init(**options, mode="offline")
            except wandb.errors.UsageError as error:
                raise InputError(
                    f"logger=wandb: {error} Without an account, set logger.wandb.offline=true."
                ) from error
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            self._experiment = run
        return self._experiment

    def begin(self, net: nn.Module, every: int, facts: Mapping[str, Any]) -> None:
        """Add facts to the run's config, and watch the network if `watch` is set.

        Args:
            net: Network to train.
            every: Steps between two histograms.
            facts: Values for the run's config, which also gets the units of the logged metrics.
        """
        self.log_hyperparams({"facts": dict(facts), "units": UNITS})
        if self.network is not None:
            self.watch(net, log=self.network, log_freq=every, log_graph=False)

    def keep(self, kind: str, name: str, checkpoint: Path, made_from: "Input") -> None:
        """Log a checkpoint as an artifact, and what it was made from as the run's input.

        Offline, wandb accepts no inputs. The artifact's metadata names the input in any case.

        Args:
            kind: Type of the artifact, `vqvae` or `prior`.
            name: Name of the artifact.
            checkpoint: Checkpoint file.
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
        """End the run if it has started; `status` is 0 if the job succeeded."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=status)
            self._experiment = None


class Input(NamedTuple):
    """What a checkpoint was made from, as an artifact."""

    name: str
    kind: str
    facts: dict[str, Any]
    file: Path | None = None


class WandbMedia:
    """Writes pictures and histograms to a Weights & Biases logger.

    Args:
        logger: Lightning's logger.
    """

    def __init__(self, logger: WandbLogger) -> None:
        self.logger = logger

    def write_picture(
        self, name: str, picture: Array, step: int, parts: dict[str, Array] | None = None
    ) -> None:
        """Write the parts with their captions, or the whole picture if there are none."""
        if parts:
            self.logger.log_image(name, list(parts.values()), step=step, caption=list(parts))
        else:
            self.logger.log_image(name, [picture], step=step)

    def write_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Write the bars."""
        import wandb

        bars = histogram.bars.tolist(), histogram.edges.tolist()
        self.logger.log_metrics({name: wandb.Histogram(np_histogram=bars)}, step)  # type: ignore[dict-item]

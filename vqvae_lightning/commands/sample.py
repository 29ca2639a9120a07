"""vqvae-sample: new images from a prior's checkpoint."""

from typing import TYPE_CHECKING

from vqvae_lightning.commands.app import Outcome, command
from vqvae_lightning.runs.folder import RunFolder

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("vqvae-sample", config="sample")
def main(cfg: "DictConfig") -> Outcome:
    """Draw samples."""
    from vqvae_lightning.stages.sampling import draw_samples

    run = RunFolder(cfg.folder)
    result = draw_samples(cfg)
    return Outcome("samples", result["metrics"], [run.samples_picture, run.samples])


if __name__ == "__main__":
    main()

"""vqvae-sample: new images from a prior's checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from vqvae_lightning.commands.app import Outcome, command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("vqvae-sample", config="sample")
def main(cfg: "DictConfig") -> Outcome:
    """Draw samples."""
    from vqvae_lightning.stages.sampling import draw_samples

    folder = Path(cfg.folder)
    result = draw_samples(cfg)
    return Outcome("samples", result["metrics"], [folder / "samples.png", folder / "samples.npz"])


if __name__ == "__main__":
    main()

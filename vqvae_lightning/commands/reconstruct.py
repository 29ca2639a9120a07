"""vqvae-reconstruct: reconstructions of images by a VQ-VAE's checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from vqvae_lightning.commands.app import Outcome, command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("vqvae-reconstruct", config="reconstruct")
def main(cfg: "DictConfig") -> Outcome:
    """Reconstruct images."""
    from vqvae_lightning.stages.reconstructing import reconstruct

    result = reconstruct(cfg)
    picture = Path(cfg.folder) / "reconstructions.png"
    return Outcome("reconstructions", result["metrics"], [picture])


if __name__ == "__main__":
    main()

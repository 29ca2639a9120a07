"""vqvae-reconstruct: reconstructions of images by a VQ-VAE's checkpoint."""

from typing import TYPE_CHECKING

from vqvae_lightning.commands.app import Outcome, command
from vqvae_lightning.runs.folder import RunFolder

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("vqvae-reconstruct", config="reconstruct")
def main(cfg: "DictConfig") -> Outcome:
    """Reconstruct images."""
    from vqvae_lightning.stages.reconstructing import reconstruct

    result = reconstruct(cfg)
    picture = RunFolder(cfg.folder).reconstructions_picture
    return Outcome("reconstructions", result["metrics"], [picture])


if __name__ == "__main__":
    main()

"""vqvae-reconstruct: reconstructions of images by a VQ-VAE's checkpoint."""

from pathlib import Path
from typing import Any

from vqvae_lightning.commands.app import app, print_result
from vqvae_lightning.runs.resume import begin_or_resume
from vqvae_lightning.stages.reconstructing import reconstruct


@app("reconstruct")
def main(cfg: Any) -> None:
    """Reconstruct images."""
    cfg = begin_or_resume("vqvae-reconstruct", cfg)
    folder = Path(cfg.folder)
    print_result("reconstructions", reconstruct(cfg), [folder / "reconstructions.png"])


if __name__ == "__main__":
    main()

"""vqvae-sample: new images from a prior's checkpoint."""

from pathlib import Path
from typing import Any

from vqvae_lightning.commands.app import app, print_result
from vqvae_lightning.runs.resume import begin_or_resume
from vqvae_lightning.stages.sampling import draw_samples


@app("sample")
def main(cfg: Any) -> None:
    """Draw samples."""
    cfg = begin_or_resume("vqvae-sample", cfg)
    folder = Path(cfg.folder)
    print_result("samples", draw_samples(cfg), [folder / "samples.png", folder / "samples.npz"])


if __name__ == "__main__":
    main()

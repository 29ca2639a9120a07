"""What each further rank of a job runs: `python -m vqvae_lightning.further_rank CONFIG`."""

import sys
from pathlib import Path


def main(path: Path) -> None:
    """Train the stage of the resolved config at `path`, as one of its ranks."""
    from omegaconf import OmegaConf

    from vqvae_lightning.app import quiet
    from vqvae_lightning.train import fit

    quiet()
    cfg = OmegaConf.load(path)
    OmegaConf.set_struct(cfg, True)
    fit(cfg)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What each further rank of a job runs: `python -m vqvae_lightning.further_rank CONFIG`."""

import sys
from typing import Any


def run(cfg: Any) -> None:
    """Train the stage of the resolved `cfg`, as one of its ranks."""
    from omegaconf import OmegaConf

    from vqvae_lightning.app import quiet
    from vqvae_lightning.train import fit

    quiet()
    OmegaConf.set_struct(cfg, True)
    fit(cfg)


def main() -> None:
    """Do so with the config in the file that the command line names."""
    from omegaconf import OmegaConf

    run(OmegaConf.load(sys.argv[1]))


if __name__ == "__main__":
    main()

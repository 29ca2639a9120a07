"""What each further rank of a job runs: `python -m vqvae_lightning.further_rank CONFIG [PACKAGE]`.

The packages that follow CONFIG are those that the command trusts.
"""

import sys
from pathlib import Path
from typing import Any


def run(cfg: Any) -> None:
    """Do a rank's part of the resolved `cfg`: of a training stage, or of an evaluation."""
    from omegaconf import OmegaConf

    from vqvae_lightning.app import quiet
    from vqvae_lightning.evaluate import measured, subject
    from vqvae_lightning.train import fit

    quiet()
    OmegaConf.set_struct(cfg, True)
    if "classifier" in cfg:
        measured(cfg, subject(cfg))
    else:
        fit(cfg)


def main() -> None:
    """Do so with the config in the file, and the trusted packages, that the command line names."""
    from omegaconf import OmegaConf

    from vqvae_lightning.configs import read_trusted
    from vqvae_lightning.distributed import leave
    from vqvae_lightning.errors import Interrupted

    together = False
    try:
        run(OmegaConf.create(read_trusted(Path(sys.argv[1]), sys.argv[2:])))
        together = True
    except Interrupted as stop:  # rank 0 reports a stop that all ranks have agreed on
        together = stop.agreed
        if not together:
            raise
    finally:
        # The connection's threads may not outlive the interpreter, which would abort.
        leave(together)


if __name__ == "__main__":
    main()

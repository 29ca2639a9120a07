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
    import torch
    import torch.distributed as dist
    from omegaconf import OmegaConf

    from vqvae_lightning.configs import read_trusted
    from vqvae_lightning.errors import Interrupted

    failed = True
    try:
        run(OmegaConf.create(read_trusted(Path(sys.argv[1]), sys.argv[2:])))
        failed = False
    except Interrupted:  # all ranks have agreed to stop; the first one says so
        failed = False
    finally:
        # Its threads may not outlive the interpreter, which would abort; but after a failure NCCL
        # would wait here for the others.
        if dist.is_initialized() and not (failed and torch.cuda.is_available()):
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What each further rank of a job runs: `python -m vqvae_lightning.further_rank CONFIG`."""

import sys
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
    """Do so with the config in the file that the command line names."""
    import torch
    import torch.distributed as dist
    from omegaconf import OmegaConf

    from vqvae_lightning.errors import Interrupted

    failed = True
    try:
        run(OmegaConf.load(sys.argv[1]))
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

"""What each rank of a job but rank 0 runs.

`python -m vqvae_lightning.commands.worker CONFIG [PACKAGE ...]`, with the packages that the command
trusts.
"""

import sys
from pathlib import Path
from typing import Any


def run(cfg: Any) -> None:
    """Do a rank's part of the resolved `cfg`: of a training stage, or of an evaluation."""
    from omegaconf import OmegaConf

    from vqvae_lightning.commands.app import silence_warnings
    from vqvae_lightning.stages.evaluating import load_subject, measure
    from vqvae_lightning.stages.training import build_task, fit, load_data

    silence_warnings()
    OmegaConf.set_struct(cfg, True)
    if cfg.kind == "evaluation":
        measure(cfg, load_subject(cfg))
    else:
        data = load_data(cfg)
        fit(cfg, build_task(cfg), data)


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

"""The part of a job that every rank except rank 0 runs.

Usage: `python -m vqvae_lightning.commands.worker CONFIG [PACKAGE ...]`. The packages are those that
the command trusts.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


def run(cfg: DictConfig) -> None:
    """Run this rank's part of a training stage or an evaluation.

    Args:
        cfg: Resolved config of the job.
    """
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
    """Run the config and trust the packages that the command line names."""
    from vqvae_lightning.configs import read_trusted
    from vqvae_lightning.distributed import leave
    from vqvae_lightning.errors import Interrupted

    together = False
    try:
        run(OmegaConf.create(read_trusted(Path(sys.argv[1]), sys.argv[2:])))
        together = True
    except Interrupted as stop:  # rank 0 reports a stop of all ranks
        together = stop.agreed
        if not together:
            raise
    finally:
        # The interpreter would abort if threads of the connection outlived it.
        leave(together)


if __name__ == "__main__":
    main()

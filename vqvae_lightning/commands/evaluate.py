"""vqvae-evaluate: metrics of finished checkpoints on a held-out split."""

from typing import TYPE_CHECKING

from vqvae_lightning.commands.app import Outcome, command
from vqvae_lightning.runs.folder import RunFolder

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("vqvae-evaluate", config="evaluate")
def main(cfg: "DictConfig") -> Outcome:
    """Evaluate checkpoints."""
    from vqvae_lightning.stages.evaluating import evaluate

    run = RunFolder(cfg.folder)
    result = evaluate(cfg)
    return Outcome("evaluation", result["metrics"], [run.result, run.reconstructions_picture])


if __name__ == "__main__":
    main()

"""vqvae-evaluate: metrics of finished checkpoints on a held-out split."""

from pathlib import Path
from typing import TYPE_CHECKING

from vqvae_lightning.commands.app import Outcome, command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("vqvae-evaluate", config="evaluate")
def main(cfg: "DictConfig") -> Outcome:
    """Evaluate checkpoints."""
    from vqvae_lightning.stages.evaluating import evaluate

    folder = Path(cfg.folder)
    result = evaluate(cfg)
    paths = [folder / "result.json", folder / "reconstructions.png"]
    return Outcome("evaluation", result["metrics"], paths)


if __name__ == "__main__":
    main()

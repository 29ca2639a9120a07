"""vqvae-train: train one stage."""

from typing import TYPE_CHECKING

from vqvae_lightning.commands.app import Outcome, command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("vqvae-train", config="vqvae")
def main(cfg: "DictConfig") -> Outcome | None:
    """Train one stage."""
    from vqvae_lightning.stages.training import train

    result = train(cfg)
    if cfg.preflight:
        return None
    return Outcome("test", result["metrics"], [cfg.folder], result["objective"])


if __name__ == "__main__":
    main()

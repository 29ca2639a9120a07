"""vqvae-shards: a data set, or a folder of images, as tar shards."""

from typing import TYPE_CHECKING

from vqvae_lightning.commands.app import Outcome, command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("vqvae-shards", config="shards")
def main(cfg: "DictConfig") -> Outcome:
    """Write shards."""
    from vqvae_lightning.stages.sharding import make_shards

    return Outcome(lines=[f"train on them with: vqvae-pipeline {make_shards(cfg)}"])


if __name__ == "__main__":
    main()

"""vqvae-shards: a data set, or a folder of images, as tar shards."""

from typing import Any

from vqvae_lightning.commands.app import app
from vqvae_lightning.runs.resume import begin_or_resume
from vqvae_lightning.stages.sharding import make_shards


@app("shards")
def main(cfg: Any) -> None:
    """Write shards."""
    from vqvae_lightning.console import console

    cfg = begin_or_resume("vqvae-shards", cfg)
    overrides = make_shards(cfg)
    console.print(
        f"train on them with: vqvae-pipeline {overrides}", soft_wrap=True, highlight=False
    )


if __name__ == "__main__":
    main()

"""vqvae-pipeline: from images to new images, each stage resumable."""

from typing import TYPE_CHECKING

from vqvae_lightning.commands.app import Outcome, command
from vqvae_lightning.runs.folder import STAGES, RunFolder

if TYPE_CHECKING:
    from omegaconf import DictConfig

HEADLINES = (
    "mse",
    "nmse",
    "psnr_db",
    "perplexity",
    "codebook_use",
    "nats_per_code",
    "unigram_nats_per_code",
    "total_bits_per_dim",
    "real_accuracy",
    "sample_accuracy",
)
"""Metrics of the evaluation that are printed at the end, where there are any."""


@command("vqvae-pipeline", config="pipeline", parts=STAGES)
def main(cfg: "DictConfig") -> Outcome | None:
    """Train, evaluate, sample and report."""
    from vqvae_lightning.stages.pipeline import run_pipeline

    result = run_pipeline(cfg)
    if cfg.preflight:
        return None
    run = RunFolder(cfg.folder)
    keys = [f"{result['split']}/{name}" for name in HEADLINES]
    metrics = {key: result["metrics"][key] for key in keys if key in result["metrics"]}
    seconds = sum(result["seconds"].values())  # including earlier parts of a resumed run
    return Outcome(
        f"results on {result['images']} {result['split']} images, {seconds:.0f} s",
        metrics,
        [run.report, run.reconstructions_picture, run.samples_picture, run.result],
        result["objective"],
    )


if __name__ == "__main__":
    main()

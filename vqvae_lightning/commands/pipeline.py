"""vqvae-pipeline: from images to new images, each stage resumable."""

from pathlib import Path
from typing import Any

from vqvae_lightning.commands.app import app, print_result
from vqvae_lightning.jobs.signals import handle_signals
from vqvae_lightning.runs.resume import begin_or_resume
from vqvae_lightning.stages.pipeline import HEADLINES, STAGES, run_pipeline


@app("pipeline", parts=STAGES[:-1])
def main(cfg: Any) -> float | None:
    """From images to new images."""
    cfg = begin_or_resume("vqvae-pipeline", cfg)
    with handle_signals("vqvae-pipeline", cfg):
        result = run_pipeline(cfg)
    folder = Path(cfg.folder)
    if cfg.preflight:
        return None
    shown = [f"{result['split']}/{key}" for key in HEADLINES]
    short = {key: result["metrics"][key] for key in shown if key in result["metrics"]}
    took = sum(result["seconds"].values())  # of all parts, if the run was resumed
    title = f"results on {result['images']} {result['split']} images, {took:.0f} s"
    names = ("report.html", "reconstructions.png", "samples.png", "result.json")
    print_result(title, {"metrics": short}, [folder / name for name in names])
    return result["objective"]  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()

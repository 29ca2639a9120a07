"""vqvae-evaluate: metrics of finished checkpoints on a held-out split."""

from pathlib import Path
from typing import Any

from vqvae_lightning.commands.app import app, print_result
from vqvae_lightning.jobs.signals import handle_signals
from vqvae_lightning.runs.resume import begin_or_resume
from vqvae_lightning.stages.evaluating import evaluate


@app("evaluate")
def main(cfg: Any) -> None:
    """Evaluate checkpoints."""
    cfg = begin_or_resume("vqvae-evaluate", cfg)
    folder = Path(cfg.folder)
    with handle_signals("vqvae-evaluate", cfg):
        result = evaluate(cfg)
    print_result("evaluation", result, [folder / "result.json", folder / "reconstructions.png"])


if __name__ == "__main__":
    main()

"""vqvae-train: train one stage."""

from pathlib import Path
from typing import Any

from vqvae_lightning.commands.app import app, print_result
from vqvae_lightning.jobs.signals import handle_signals
from vqvae_lightning.runs.resume import begin_or_resume
from vqvae_lightning.stages.training import train


@app("vqvae")
def main(cfg: Any) -> float | None:
    """Train one stage."""
    cfg = begin_or_resume("vqvae-train", cfg)
    with handle_signals("vqvae-train", cfg):
        result = train(cfg)
    if cfg.preflight:
        return None
    print_result("test", result, [Path(cfg.folder)])
    return result["objective"]  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()

"""vqvae-sample: new images out of a prior's checkpoint."""

import time
from pathlib import Path
from typing import Any

from vqvae_lightning.app import app, print_result, started


def check_sampling(cfg: Any, num_classes: int, prefix: str = "") -> None:
    """Refuse settings of a draw that cannot work.

    Raises:
        InputError: Naming the key, with `prefix` before it.
    """
    from omegaconf import ListConfig

    from vqvae_lightning.errors import InputError, check_positive, check_range

    for name in ("num_samples", "batch_size"):
        check_positive(f"{prefix}{name}", cfg[name])
    check_range(f"{prefix}temperature", cfg.temperature, 0)
    if cfg.top_k is not None:
        check_positive(f"{prefix}top_k", cfg.top_k)
    if cfg.labels is None:
        return
    if not num_classes:
        raise InputError(f"{prefix}labels={cfg.labels}: this prior has no classes; drop labels.")
    if not isinstance(cfg.labels, ListConfig) or not cfg.labels:
        raise InputError(f"{prefix}labels={cfg.labels} must be a list, such as [0,3].")
    bad = [label for label in cfg.labels if label not in range(num_classes)]
    if bad:
        raise InputError(f"{prefix}labels={bad} must be among 0 to {num_classes - 1}.")


def draw(cfg: Any) -> dict[str, Any]:
    """Draw images.

    Args:
        cfg: The composed config `conf/sample.yaml`.

    Returns:
        The contents of `result.json`; beside it lie `samples.png` (a column per class) and
        `samples.npz` (images uint8 (N, H, W, C), codes, labels).

    Raises:
        InputError: If a checkpoint cannot be used, or an option is outside its range.
    """
    import numpy as np
    import torch

    from vqvae_lightning.checkpoints import load_pair
    from vqvae_lightning.devices import device_for
    from vqvae_lightning.evaluation import draw_images
    from vqvae_lightning.networks.autoencoder import from_uint8
    from vqvae_lightning.pictures import grid, save_png
    from vqvae_lightning.results import read_result, write_config, write_result

    folder = Path(cfg.folder)
    finished = read_result(folder)
    if finished is not None:
        return finished
    start = time.perf_counter()
    loaded, vqvae = load_pair(cfg.prior_checkpoint, cfg.vqvae_checkpoint)
    check_sampling(cfg, loaded.net.num_classes)
    device = device_for(cfg.accelerator)
    prior, count = loaded.net, cfg.num_samples
    labels, chosen, columns = None, [], 10
    if prior.num_classes:
        chosen = list(range(prior.num_classes) if cfg.labels is None else cfg.labels)
        labels = torch.tensor(chosen)[torch.arange(count) % len(chosen)]
        # A column per class where they fit; more classes follow each other in rows.
        columns = len(chosen) if len(chosen) <= 20 else 10
    write_config(cfg, folder)
    images, codes = draw_images(
        vqvae.net,
        prior,
        count,
        labels,
        cfg.seed,
        device,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        batch_size=cfg.batch_size,
    )
    shown = from_uint8(images[: 10 * columns])
    save_png(grid(shown, columns), folder / "samples.png")
    arrays: dict[str, Any] = {"images": images.movedim(1, -1), "codes": codes}
    if labels is not None:
        arrays["labels"] = labels
    np.savez_compressed(folder / "samples.npz", **{k: v.numpy() for k, v in arrays.items()})
    return write_result(
        folder,
        {"images": float(count)},
        seed=cfg.seed,
        commit=cfg.commit,
        seconds=time.perf_counter() - start,
        prior_checkpoint=str(cfg.prior_checkpoint),
        column_classes=chosen if len(chosen) == columns <= count else [],
    )


@app("sample")
def main(cfg: Any) -> None:
    """Draw samples."""
    cfg = started("vqvae-sample", cfg)
    folder = Path(cfg.folder)
    print_result("samples", draw(cfg), [folder / "samples.png", folder / "samples.npz"])


if __name__ == "__main__":
    main()

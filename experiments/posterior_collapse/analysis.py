"""Measure whether the decoders of a sweep use their latents.

uv run python experiments/posterior_collapse/analysis.py FOLDER

FOLDER is the folder of a finished `vqvae-train sweep=posterior_collapse` or `sweep=beta`. The
script writes `SWEEP_latents.csv`, a row per job, and `SWEEP_samples.png` to this folder. README.md
says what the numbers mean.
"""

import argparse
import csv
import io
import math
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vqvae_lightning.checkpoints import load
from vqvae_lightning.console import print_line
from vqvae_lightning.errors import InputError
from vqvae_lightning.files import replace_file, write_text
from vqvae_lightning.likelihoods.protocol import PixelDistribution
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.pictures import arrange_grid
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.quantizers import GaussianBottleneck
from vqvae_lightning.randomness import derive_seed
from vqvae_lightning.report.jobs import Job, read_jobs
from vqvae_lightning.report.sweep import (
    get_value,
    keep_chosen,
    label_job,
    list_differing_keys,
    shorten_keys,
)
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.stages.inputs import load_checkpoint_images

HERE = Path(__file__).parent
COLUMNS = ("folder", "rate", "own", "other")
"""Of `SWEEP_latents.csv`; the last three in bits per dimension."""
BATCH = 50
SHOWN = 12  # images in a row of the picture
DRAWN = 3  # samples given the latents of each
DPI = 100
LARGE = 18  # points


def name_settings(jobs: list[Job]) -> list[str]:
    """Name what the sweep varies between the jobs, except seed and decoder."""
    swept = keep_chosen(list_differing_keys(jobs), jobs)
    titles = shorten_keys([key for key in swept if key not in ("seed", "model/decoder")])
    starts = {key: "" if key == "quantizer" else f"{title}=" for key, title in titles.items()}
    return [
        ", ".join(f"{start}{get_value(job, key)}" for key, start in starts.items()) for job in jobs
    ]


def draw_latents(net: VQVAE, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Encode images as latents that the decoder knows from its training.

    They are the rows of the codes of a VQ-VAE, or draws from the posterior q(z | x) of a VAE.

    Args:
        net: Network in evaluation mode.
        images: (B, C, H, W) in [-1, 1].
        generator: Of the draws.

    Returns:
        The latents (B, D, h, w), and the cost in nats (B,) of telling them: log K per code, or the
        divergence of the posterior from N(0, I).
    """
    z = net.encoder(images)
    if isinstance(net.quantizer, GaussianBottleneck):
        mean, log_variance = net.quantizer.split_posterior(z)
        noise = torch.randn(mean.shape, generator=generator)
        cost = net.quantizer.compute_kl(mean, log_variance).flatten(1).sum(1)
        return mean + (log_variance / 2).exp() * noise, cost
    codes = net.quantizer.encode(z)
    cost = torch.full((len(z),), codes[0].numel() * math.log(net.quantizer.num_codes))
    return net.quantizer.decode(codes), cost


@torch.inference_mode()
def measure(net: VQVAE, levels: Tensor, seed: int) -> dict[str, float]:
    """Measure rate and distortion of images, with their own latents and with those of another one.

    Args:
        net: Network whose likelihood is a distribution, in evaluation mode.
        levels: Images (N, C, H, W) uint8, N at least 2.
        seed: Seed for the posterior's draws, and for the choice of the other image.

    Returns:
        `rate`, `own` and `other` in bits per dimension, means over the images.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "bound"))
    encoded = [draw_latents(net, from_uint8(part), generator) for part in levels.split(BATCH)]
    latents, costs = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    # Each image gets the latents of the next one in a random order, so never its own.
    order = torch.randperm(len(levels), generator=generator)
    others = torch.empty_like(latents)
    others[order] = latents[order.roll(1)]
    bits = levels[0].numel() * math.log(2)
    return {
        "rate": float(costs.mean()) / bits,
        "own": score(net, latents, levels) / bits,
        "other": score(net, others, levels) / bits,
    }


def score(net: VQVAE, latents: Tensor, levels: Tensor) -> float:
    """Compute the mean of -log p(x | z) over images (N, C, H, W) uint8, in nats per image."""
    assert isinstance(net.likelihood, PixelDistribution)
    total = 0.0
    for vectors, part in zip(latents.split(BATCH), levels.split(BATCH), strict=True):
        logs = net.likelihood.log_prob(net.compute_output(vectors, part), part)
        total -= float(logs.double().sum())
    return total / len(levels)


@torch.inference_mode()
def draw_images(net: VQVAE, levels: Tensor, seed: int) -> list[Tensor]:
    """Draw `DRAWN` images for the latents of each image (N, C, H, W) uint8, all of another seed."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "bound"))
    latents, _ = draw_latents(net, from_uint8(levels), generator)
    streams = (derive_seed(seed, "pixels", number) for number in range(DRAWN))
    return [
        to_uint8(net.decode_vectors(latents, torch.Generator().manual_seed(stream)))
        for stream in streams
    ]


def save_picture(path: Path, levels: Tensor, drawn: dict[str, list[Tensor]]) -> None:
    """Write test images above the samples that each model draws given their latents."""
    heights = [1, *(len(images) for images in drawn.values())]
    figure = Figure(figsize=(13, 1.0 + sum(heights)), layout="constrained")
    figure.suptitle("Samples given the latents of a test image", fontsize=LARGE + 2)
    places = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    rows = {"test image": [levels], **drawn}
    for axes, (label, images) in zip(places, rows.items(), strict=True):
        picture = arrange_grid(torch.cat(images), len(levels)).movedim(0, -1).numpy()
        axes.imshow(picture, interpolation="nearest")
        axes.set_ylabel(label, fontsize=LARGE, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    with replace_file(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI)


def analyse(folder: Path, output: Path, images: int | None = None) -> None:
    """Measure all jobs and write the results.

    Args:
        folder: Folder of the sweep.
        output: Folder of the results.
        images: Number of test images; None for all.

    Raises:
        InputError: If a job has not finished.
    """
    jobs = sorted(read_jobs(folder), key=lambda job: int(job.name))
    for job in jobs:
        if job.state != "finished":
            raise InputError(
                f"{job.folder} is {job.state} {job.note}".rstrip()
                + f": repeat the sweep with resume=auto hydra.sweep.dir={folder}."
            )
    rows: list[dict[str, Any]] = []
    drawn: dict[str, list[Tensor]] = {}
    shown = torch.empty(0)
    for number, (job, setting) in enumerate(zip(jobs, name_settings(jobs), strict=True), start=1):
        print_line(f"job {number}/{len(jobs)}: {label_job(job, list(job.chosen))}")
        loaded = load(RunFolder(job.folder).best_checkpoint, "vqvae")
        data = load_checkpoint_images(loaded, ())
        levels = data.datasets["test"].preview(images or sys.maxsize).data
        seed = int(job.config["seed"])
        rows.append({"folder": job.name, **measure(loaded.net, levels, seed)})
        if loaded.net.autoregressive and setting not in drawn:
            shown = levels[:SHOWN]
            drawn[setting] = draw_images(loaded.net, shown, seed)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: format_value(value) for key, value in row.items()} for row in rows)
    study = jobs[0].config["study"]
    write_text(output / f"{study}_latents.csv", text.getvalue())
    if drawn:
        save_picture(output / f"{study}_samples.png", shown, drawn)


def format_value(value: str | float) -> str:
    """Format a value of a row, a number with six digits."""
    return value if isinstance(value, str) else f"{value:.6g}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the sweep")
    parser.add_argument("--output", type=Path, default=HERE, help="default: the study's folder")
    parser.add_argument("--images", type=int, help="number of test images; default: all")
    given = parser.parse_args()
    try:
        analyse(given.folder, given.output, given.images)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

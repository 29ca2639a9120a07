"""Compare the finished jobs of `vqvae-train sweep=traditional_autoencoders`.

uv run python experiments/traditional_autoencoders/analysis.py FOLDER

FOLDER is the folder of the sweep. The folder of each VQ-VAE's job holds its prior, in `prior`. The
script writes `results.csv` (a row per job), `results.md` (mean and standard deviation over the
seeds) and four pictures. README.md defines every number.
"""

import argparse
import csv
import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from torch import Tensor

from vqvae_lightning.checkpoints import Loaded, load, load_pair
from vqvae_lightning.configs import CONF_DIR, register_resolvers, to_plain
from vqvae_lightning.console import print_line, show_progress
from vqvae_lightning.data.images import PixelDataModule, SplitName
from vqvae_lightning.errors import InputError
from vqvae_lightning.evaluation.classifier_cache import fetch_classifier
from vqvae_lightning.evaluation.drawing import draw_images, find_nearest_images
from vqvae_lightning.evaluation.perceptual import (
    compute_sample_features,
    measure_frechet_distance,
    measure_neighbours,
)
from vqvae_lightning.files import replace_file, write_text
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.pictures import arrange_grid
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.quantizers import GaussianBottleneck
from vqvae_lightning.randomness import derive_seed
from vqvae_lightning.report.jobs import Job, read_jobs
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import read_result
from vqvae_lightning.stages.evaluating import build_classifier
from vqvae_lightning.stages.inputs import load_checkpoint_images

HERE = Path(__file__).parent
MODELS = {"none": "AE", "gaussian": "VAE", "gaussian_elbo": "VAE (ELBO)", "ema": "VQ-VAE"}
"""What the results call each `quantizer=` of the sweep."""
SOURCES = {
    "reconstruction": "reconstructions",
    "fitted": "fitted Gaussian",
    "normal": "N(0, I)",
    "uniform": "uniform codes",
    "histogram": "histogram",
    "prior": "PixelCNN",
}
"""Where images come from, by name in `results.csv`; in this order, which also seeds them."""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the linear probe; validation images choose one
VARIANCE = 0.95  # share that the counted principal components explain
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
BATCH = 256
SHOWN = 10  # images in a row of a picture
DPI = 110
LARGE = 18  # points

MODEL_COLUMNS = (
    ("NMSE", "nmse", "{:.4f}"),
    ("MSE", "mse", "{:.5f}"),
    ("codes in use", "codebook_use", "{:.1%}"),
    ("perplexity", "perplexity", "{:.0f}"),
    ("active channels", "active_dims", "{:.1f}"),
    ("KL, bits per position", "kl_bits_per_position", "{:.1f}"),
    ("components for 95 % of the variance", "principal_share", "{:.1%}"),
    ("linear probe", "probe_accuracy", "{:.1%}"),
)
"""Title, column of `results.csv` and format."""
SOURCE_COLUMNS = (
    ("Fréchet distance", "fid", "{:.2f}"),
    ("precision", "precision", "{:.1%}"),
    ("recall", "recall", "{:.1%}"),
    ("distance to the nearest training image", "nearest", "{:.4f}"),
)
"""Likewise, without the name of the source at the front."""

Row = dict[str, Any]


class Subject(NamedTuple):
    """A finished job of the sweep."""

    model: str
    seed: int
    metrics: dict[str, float]
    """Test metrics of its `result.json`, and of its prior's."""
    vqvae: Loaded
    prior: PixelCNN | None
    """None without codes."""


class Latents(NamedTuple):
    """A split as the decoder gets it."""

    vectors: Tensor
    """(N, D, h, w) float32."""
    codes: Tensor | None
    """(N, h, w) int64; None without a codebook."""
    labels: Tensor
    """(N,) int64."""


class Judge(NamedTuple):
    """Measures images against real ones."""

    features: Callable[[Tensor], Tensor]
    """Maps images (B, C, H, W) uint8 to features (B, F)."""
    images: PixelDataModule
    real: Tensor
    """Features of the reference, every other test image."""
    others: Tensor
    """The remaining test images (N, C, H, W) uint8."""

    def measure(self, found: Tensor, name: str) -> Row:
        """Measure images (N, C, H, W) uint8; the names of the metrics begin with `name`."""
        features = compute_sample_features(self.features, found, torch.device("cpu"), "features")
        near = measure_neighbours(self.real, features)
        gaps = (found.float() - find_nearest_images(self.images, found).float()) / 255
        return {
            f"{name}_fid": measure_frechet_distance(self.real, features),
            f"{name}_precision": near.precision,
            f"{name}_recall": near.recall,
            f"{name}_nearest": float(gaps.square().flatten(1).mean(1).sqrt().mean()),
        }


class Pictures(NamedTuple):
    """What the pictures show of a model; each (N, C, H, W) uint8."""

    reconstructed: Tensor
    between: Tensor
    """From one test image to another."""
    drawn: dict[str, Tensor]
    """New images by sampler."""


# Jobs


def load_subjects(folder: Path, seeds: Sequence[int]) -> list[Subject]:
    """Load the jobs of a sweep: all seeds of the first model, then of the next one.

    Raises:
        InputError: If a job or a prior is missing, unfinished or damaged, or two jobs are the same.
    """
    found: dict[tuple[str, int], Job] = {}
    for job in read_jobs(folder):
        quantizer = job.chosen.get("quantizer")
        if quantizer in MODELS:
            key = MODELS[quantizer], job.config["seed"]
            if key in found:
                raise InputError(f"{found[key].folder} and {job.folder} are both {name_job(*key)}.")
            found[key] = job
    subjects = []
    for model in MODELS.values():
        for seed in seeds:
            job = found.get((model, seed))
            if job is None or job.state != "finished":
                state = "is missing" if job is None else f"is {job.state} {job.note}".rstrip()
                raise InputError(
                    f"{name_job(model, seed)} {state} in {folder if job is None else job.folder}: "
                    f"repeat the sweep with resume=auto hydra.sweep.dir={folder}."
                )
            subjects.append(load_subject(job, model, seed))
    if len({subject.vqvae.config["data_fingerprint"] for subject in subjects}) > 1:
        raise InputError(f"the jobs in {folder} were trained on different data.")
    return subjects


def load_subject(job: Job, model: str, seed: int) -> Subject:
    """Load the networks of a finished job.

    Raises:
        InputError: If a checkpoint cannot be loaded, or a VQ-VAE has no prior without classes.
    """
    run = RunFolder(job.folder)
    vqvae = load(run.best_checkpoint, "vqvae")
    if model != "VQ-VAE":
        return Subject(model, seed, job.metrics, vqvae, None)
    place = run.stage("prior")
    result = read_result(place.path)
    advice = (
        f"train it with vqvae-train --config-name prior vqvae_checkpoint={run.best_checkpoint} "
        f"model.net.num_classes=0 seed={seed} hydra.run.dir={place.path}."
    )
    if result is None:
        raise InputError(f"{name_job(model, seed)} has no finished prior: {advice}")
    prior: PixelCNN = load_pair(place.best_checkpoint, run.best_checkpoint)[0].net
    if prior.num_classes:
        raise InputError(
            f"the prior in {place.path} needs classes, which the other samplers do not get: "
            f"remove it and {advice}"
        )
    metrics = {name: entry["value"] for name, entry in result["metrics"].items()}
    return Subject(model, seed, metrics | job.metrics, vqvae, prior)


def name_job(model: str, seed: int) -> str:
    """Name a job in messages."""
    return f"{model} with seed {seed}"


# Measurements


def prepare_judge(images: PixelDataModule, steps: int | None, output: Path) -> Judge:
    """Train or fetch the classifier of `vqvae-evaluate`, with seed 0 whatever the jobs' seeds.

    Args:
        images: Data of the jobs, set up.
        steps: Training steps of the classifier; None for the number in `conf/evaluation`.
        output: Folder of the results.

    Raises:
        InputError: If the data have no classes.
    """
    register_resolvers()
    given = ["classifier_seed=0", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    given += [f"classifier_steps={steps}"] if steps else []
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("evaluate", [*given, f"folder={output}"])
    images.seed = cfg.classifier_seed
    torch.manual_seed(derive_seed(cfg.classifier_seed, "judge"))
    task = build_classifier(cfg, images)
    if task is None:
        raise InputError("the data have no classes: the classifier and the probe need some.")
    net = fetch_classifier(
        task,
        images,
        to_plain(cfg.classifier),
        {**to_plain(cfg.trainer), "max_steps": cfg.classifier_steps},
        cfg.classifier_batch_size,
        cfg.classifier_cache,
        torch.device("cpu"),
    )

    def features(levels: Tensor) -> Tensor:
        return net.features(from_uint8(levels))

    test = images.datasets["test"].preview(len(images.datasets["test"])).data
    # Both halves have the same size, so that the distances of real images and of samples have the
    # same bias, which depends on the number of images.
    real, others = test[::2], test[1::2]
    real = compute_sample_features(features, real, torch.device("cpu"), "features")
    return Judge(features, images, real, others)


def encode(net: VQVAE, images: PixelDataModule, split: SplitName) -> Latents:
    """Encode a split as the inputs of the decoder."""
    vectors, codes, labels = [], [], []
    with show_progress("encoding", len(images.datasets[split])) as advance:
        for levels, classes in images.batches(split):
            quantized = net.quantizer(net.encoder(from_uint8(levels)))
            vectors.append(quantized.vectors)
            codes += [] if quantized.codes is None else [quantized.codes]
            labels.append(classes)
            advance(len(levels))
    return Latents(torch.cat(vectors), torch.cat(codes) if codes else None, torch.cat(labels))


def decode(net: VQVAE, vectors: Tensor) -> Tensor:
    """Decode vectors (N, D, h, w) to images (N, C, H, W) uint8."""
    parts = [to_uint8(net.likelihood.mean(net.decoder(part))) for part in vectors.split(BATCH)]
    return torch.cat(parts)


def reconstruct(net: VQVAE, levels: Tensor) -> Tensor:
    """Reconstruct images (N, C, H, W) uint8."""
    return torch.cat(
        [to_uint8(net(from_uint8(part)).reconstruction) for part in levels.split(BATCH)]
    )


def measure_principal_share(vectors: Tensor) -> float:
    """Measure the share of principal components that explain 95 % of the variance.

    Args:
        vectors: Latents (N, D, h, w); the vector at each position is one point in D dimensions.
    """
    points = vectors.movedim(1, -1).flatten(0, 2).double()
    variances = torch.linalg.eigvalsh(torch.cov(points.t())).flip(0).clamp(min=0)
    explained = variances.cumsum(0) / variances.sum()
    needed = int((explained < VARIANCE).sum()) + 1
    return needed / len(variances)


def probe(train: Latents, val: Latents, test: Latents) -> float:
    """Measure the share of test images whose class a linear layer on the latents predicts.

    The layer is fitted by least squares to the classes as one-hot vectors, with a ridge penalty.
    Each latent value is scaled to mean 0 and standard deviation 1 over the training images. The
    penalty with the highest accuracy on validation images counts, the smaller of two equal ones.
    """
    rows = train.vectors.flatten(1)
    mean, scale = rows.mean(0), rows.std(0).clamp(min=1e-6)
    rows = (rows - mean) / scale
    targets = torch.eye(int(train.labels.max()) + 1)[train.labels]
    offset = targets.mean(0)
    # In float64, because the smallest penalty leaves a matrix of almost dependent columns.
    gram = (rows.t() @ rows / len(rows)).double()
    moments = (rows.t() @ (targets - offset) / len(rows)).double()
    held_out = [((split.vectors.flatten(1) - mean) / scale, split.labels) for split in (val, test)]
    best, accuracy = -1.0, 0.0
    for penalty in PENALTIES:
        factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype))
        weights = torch.cholesky_solve(moments, factor).float()
        chosen, tested = (
            float(((part @ weights + offset).argmax(1) == labels).float().mean())
            for part, labels in held_out
        )
        if chosen > best:
            best, accuracy = chosen, tested
    return accuracy


def measure_use(model: str, metrics: dict[str, float]) -> Row:
    """Collect how the latents are used, from the test metrics of a job."""
    if model == "VQ-VAE":
        names = ("codebook_use", "perplexity", "nats_per_code")
        return {name: metrics[f"test/{name}"] for name in names}
    if model.startswith("VAE"):
        nats = sum(v for name, v in metrics.items() if name.startswith("test/kl_nats_dim"))
        return {
            "active_dims": metrics["test/active_dims"],
            "kl_bits_per_position": nats / math.log(2),
        }
    return {}


# Samples


def draw_from_fitted(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw from the Gaussian with the mean and the full covariance of `vectors` (N, D, h, w).

    A combination of the centred rows with standard normal weights has their covariance, so that
    matrix, which may be larger than the latents themselves, is never computed.
    """
    rows = vectors.flatten(1)
    mean = rows.mean(0)
    weights = torch.randn(count, len(rows), generator=generator) / math.sqrt(len(rows) - 1)
    return (mean + weights @ (rows - mean)).view(count, *vectors.shape[1:])


def draw_samples(subject: Subject, train: Latents, count: int) -> dict[str, Tensor]:
    """Draw `count` new images (N, C, H, W) uint8 with each sampler of a model, by its name."""
    net: VQVAE = subject.vqvae.net
    streams = {
        name: torch.Generator().manual_seed(derive_seed(subject.seed, "samples", number))
        for number, name in enumerate(SOURCES)
    }
    if train.codes is None:
        vectors = {"fitted": draw_from_fitted(train.vectors, count, streams["fitted"])}
        if isinstance(net.quantizer, GaussianBottleneck):
            shape = (count, *train.vectors.shape[1:])
            vectors["normal"] = torch.randn(shape, generator=streams["normal"])
        return {name: decode(net, drawn) for name, drawn in vectors.items()}
    assert subject.prior is not None
    counts = train.codes.flatten().bincount(minlength=net.quantizer.num_codes).double()
    cells = (count, *train.codes.shape[1:])
    images = {}
    for name, weights in (("uniform", torch.ones_like(counts)), ("histogram", counts)):
        codes = weights.multinomial(math.prod(cells), replacement=True, generator=streams[name])
        images[name] = decode(net, net.quantizer.decode(codes.view(cells)))
    device = torch.device("cpu")
    drawn = draw_images(net, subject.prior, count, None, subject.seed, [device])
    return {**images, "prior": drawn.images}


# Pictures


def collect_pictures(subject: Subject, judge: Judge, drawn: dict[str, Tensor]) -> Pictures:
    """Collect what the pictures show of a model."""
    net, shown = subject.vqvae.net, judge.others[:SHOWN]
    ends = [net.encoder(from_uint8(image[None])) for image in choose_pair(judge.images)]
    steps = torch.linspace(0, 1, SHOWN)[:, None, None, None]
    # The encoder of a VAE returns mean and log variance. The decoder gets the mean.
    between = net.quantizer(torch.lerp(*ends, steps)).vectors
    return Pictures(
        reconstruct(net, shown),
        decode(net, between),
        {name: images[:SHOWN] for name, images in drawn.items()},
    )


def choose_pair(images: PixelDataModule) -> tuple[Tensor, Tensor]:
    """Choose the first test image, and the first one of another class."""
    data, labels = images.datasets["test"].preview(BATCH)
    assert labels is not None
    return data[0], data[int((labels != labels[0]).int().argmax())]


def save_rows(path: Path, title: str, rows: dict[str, Tensor]) -> None:
    """Write a picture with a labelled row for each (N, C, H, W) uint8 in `rows`."""
    # "compressed", because "constrained" leaves too little room beside images for long labels.
    figure = Figure(figsize=(13, 1 + len(rows)), layout="compressed")
    figure.suptitle(title, fontsize=LARGE + 2)
    places = figure.subplots(len(rows), squeeze=False)[:, 0]
    for axes, (label, images) in zip(places, rows.items(), strict=True):
        picture = arrange_grid(images, len(images)).movedim(0, -1).numpy()
        axes.imshow(picture, interpolation="nearest")  # smoothing would make the files larger
        axes.set_ylabel(label, fontsize=LARGE, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    with replace_file(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI)


def save_pictures(output: Path, judge: Judge, pictures: dict[str, Pictures]) -> None:
    """Write the four pictures, each of one job per model."""
    real = judge.others[:SHOWN]
    rows = {model: part.reconstructed for model, part in pictures.items()}
    save_rows(
        output / "reconstructions.png",
        "Test images and their reconstructions",
        {"test": real} | rows,
    )
    rows = {
        f"{model}\n{SOURCES[name]}": images
        for model, part in pictures.items()
        for name, images in part.drawn.items()
    }
    save_rows(output / "samples.png", "New images, by sampler", {"test images": real} | rows)
    first, last = (from_uint8(image[None]) for image in choose_pair(judge.images))
    steps = torch.linspace(0, 1, SHOWN)[:, None, None, None]
    rows = {"pixels": to_uint8(torch.lerp(first, last, steps))}
    rows |= {model: part.between for model, part in pictures.items()}
    save_rows(output / "interpolation.png", "From one test image to another", rows)
    drawn = pictures["VQ-VAE"].drawn["prior"]
    save_rows(
        output / "neighbours.png",
        "Samples of the PixelCNN and their nearest training images",
        {"sample": drawn, "nearest": find_nearest_images(judge.images, drawn)},
    )


# Results


@torch.inference_mode()
def measure(subject: Subject, judge: Judge) -> tuple[Row, Pictures]:
    """Measure a job."""
    net = subject.vqvae.net
    train, val, test = (encode(net, judge.images, split) for split in SPLITS)
    drawn = draw_samples(subject, train, len(judge.others))
    row: Row = {
        "model": subject.model,
        "seed": subject.seed,
        "nmse": subject.metrics["test/nmse"],
        "mse": subject.metrics["test/mse"],
        **measure_use(subject.model, subject.metrics),
        "principal_share": measure_principal_share(test.vectors),
        "probe_accuracy": probe(train, val, test),
    }
    for name, images in {"reconstruction": reconstruct(net, judge.others), **drawn}.items():
        row |= judge.measure(images, name)
    return row, collect_pictures(subject, judge, drawn)


@torch.inference_mode()
def measure_data(judge: Judge) -> Row:
    """Measure real images as the models are measured; the probe gets the pixels."""
    pixels = [
        Latents(from_uint8(data), None, labels)
        for data, labels in (judge.images.datasets[split].preview(sys.maxsize) for split in SPLITS)
    ]
    return {"pixels_probe_accuracy": probe(*pixels), **judge.measure(judge.others, "real")}


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write a line per row, with empty cells where a model has no such value."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_tables(rows: list[Row]) -> str:
    """Return two tables in Markdown: the models, and the samplers of each model."""
    seeds = sorted({row["seed"] for row in rows})
    named = ", ".join(map(str, seeds))
    lines = [f"Mean ± standard deviation over the seeds {named}.", ""]
    lines += format_line(["model", *[title for title, _, _ in MODEL_COLUMNS]], header=True)
    for model in MODELS.values():
        own = [row for row in rows if row["model"] == model]
        cells = [summarise(own, name, form) for _, name, form in MODEL_COLUMNS]
        lines += format_line([model, *cells])
    pixels = summarise(rows[:1], "pixels_probe_accuracy", "{:.1%}")
    lines += format_line(["pixels", *["-"] * (len(MODEL_COLUMNS) - 1), pixels])
    lines += ["", *format_line(["images", *[title for title, _, _ in SOURCE_COLUMNS]], header=True)]
    cells = [summarise(rows[:1], f"real_{name}", form) for _, name, form in SOURCE_COLUMNS]
    lines += format_line(["other test images", *cells])
    for model in MODELS.values():
        own = [row for row in rows if row["model"] == model]
        for source, title in SOURCES.items():
            if f"{source}_fid" in own[0]:
                cells = [summarise(own, f"{source}_{name}", f) for _, name, f in SOURCE_COLUMNS]
                lines += format_line([f"{model}, {title}", *cells])
    return "\n".join(lines) + "\n"


def summarise(rows: list[Row], name: str, form: str) -> str:
    """Format mean and standard deviation (n - 1) of a column, `-` if the model has no such value.

    A single row has no deviation.
    """
    values = [row[name] for row in rows if name in row]
    if not values:
        return "-"
    found = [np.mean(values), *([np.std(values, ddof=1)] if len(values) > 1 else [])]
    return " ± ".join(form.format(float(value)).replace("%", " %") for value in found)


def format_line(cells: Sequence[str], header: bool = False) -> list[str]:
    """Format a line of a table in Markdown, with the line below it if it is the header."""
    line = f"| {' | '.join(cells)} |"
    return [line, "| --- |" + " ---: |" * (len(cells) - 1)] if header else [line]


def analyse(folder: Path, output: Path, seeds: Sequence[int], steps: int | None = None) -> None:
    """Measure all jobs and write the results.

    Args:
        folder: Folder of the sweep.
        output: Folder of the results.
        seeds: Seeds of the sweep.
        steps: Training steps of the classifier; None for the number in `conf/evaluation`.

    Raises:
        InputError: If a job or a prior is missing or unfinished.
    """
    subjects = load_subjects(folder, seeds)
    judge = prepare_judge(load_checkpoint_images(subjects[0].vqvae, ()), steps, output)
    data, rows, pictures = measure_data(judge), [], {}
    for number, subject in enumerate(subjects, start=1):
        print_line(f"job {number}/{len(subjects)}: {name_job(subject.model, subject.seed)}")
        row, shown = measure(subject, judge)
        rows.append(row | data)
        pictures.setdefault(subject.model, shown)
    write_csv(output / "results.csv", rows)
    write_text(output / "results.md", write_tables(rows))
    save_pictures(output, judge, pictures)
    print_line((output / "results.md").read_text())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the sweep")
    parser.add_argument("--output", type=Path, default=HERE, help="default: the study's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--classifier-steps", type=int, help="default: classifier_steps in conf/evaluation"
    )
    given = parser.parse_args()
    try:
        analyse(given.folder, given.output, given.seeds, given.classifier_steps)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Time the prior: sampling against full re-evaluation, encoding, training.

    uv run python experiments/benchmarks/sampling.py --markdown table.md
    python experiments/benchmarks/sampling.py --sizes 8 --batches 16 --parts sampling

Sampling: a gated PixelCNN with random weights, because its cost does not depend on them.

- ours: `vqvae_lightning.networks.sampling.sample`;
- naive: the whole network again for every position, with the same weights, as in public priors. Up
  to `--complete` positions it runs in full, and its codes are compared with those of `sample`.
  Above that, its time is that of one pass, the median of `--rounds`, times the number of positions,
  marked "~";
- floor: the floating-point operations of one forward pass, divided by the rate of a large matrix
  product on this machine, measured in the same run.

Encoding: images per second of `CodesDataModule.encode`, including its files, against the bare
encoder on batches in memory. Training: images per second of Lightning's Trainer with the prior's
task, against a bare loop over the same network, optimizer and batches. Each pair alternates in one
run.
"""

import argparse
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vqvae_lightning.data import BundledSource, CodesDataModule, ImageDataModule
from vqvae_lightning.data.sources import Split, Splits
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.networks.sampling import choose_codes, compute_distribution, sample
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.quantizers import EMAQuantizer
from vqvae_lightning.tasks import PriorTask

PARTS = ("sampling", "encoding", "training")


def time_call(function: Callable[[], object]) -> float:
    """Time a call, in seconds."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Measure the median seconds of each function over rounds that call all of them.

    A first round is a warm-up.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            took = time_call(function)
            if number:
                taken[name].append(took)
    return {name: median(values) for name, values in taken.items()}


def measure_matrix_rate(device: torch.device) -> float:
    """Measure the floating-point operations per second of a float32 product of side 2048."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    return 2 * 2048**3 / alternate({"product": lambda: a @ b}, 5)["product"]


@torch.no_grad()
def sample_naively(prior: PixelCNN, size: int, batch: int, seed: int) -> Tensor:
    """Sample codes (batch, size, size) with a full forward pass for each position."""
    generator = torch.Generator().manual_seed(seed)
    device = prior.embedding.weight.device
    uniform = torch.rand(batch, size, size, generator=generator, dtype=torch.float64).to(device)
    codes = torch.zeros(batch, size, size, dtype=torch.int64, device=device)
    for row in range(size):
        for column in range(size):
            logits = prior(codes)[:, :, row, column]
            codes[:, row, column] = choose_codes(
                compute_distribution(logits), uniform[:, row, column]
            )
    return codes


def bench_sampling(args: argparse.Namespace, console: Console) -> list[dict[str, str]]:
    """Measure sampling: one row per grid and batch."""
    device = torch.device(args.device)
    rate = measure_matrix_rate(device)
    console.print(f"matrix products: {rate / 1e9:.0f} GFLOP/s")
    rows = []
    for size in args.sizes:
        prior = PixelCNN(
            args.codes, size, size, channels=args.channels, layers=args.layers, dropout=0.0
        )
        prior = prior.to(device, memory_format=torch.channels_last).eval()
        for batch in args.batches:
            codes = torch.zeros(batch, size, size, dtype=torch.int64, device=device)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                prior(codes)
            floor = counter.get_total_flops() / rate
            shape = (batch, size, size)

            def ours(shape: tuple[int, int, int] = shape, prior: PixelCNN = prior) -> Tensor:
                generator = torch.Generator().manual_seed(0)
                return sample(prior, shape, generator=generator, batch_size=shape[0])

            @torch.no_grad()
            def one_pass(codes: Tensor = codes, prior: PixelCNN = prior) -> Tensor:
                return prior(codes)

            complete = size * size <= args.complete
            times = alternate({"ours": ours, "pass": one_pass}, args.rounds)
            whole, equal = times["pass"] * size * size, "-"
            if complete:
                start = time.perf_counter()
                slow = sample_naively(prior, size, batch, 0)
                whole = time.perf_counter() - start
                equal = f"{float((slow == ours()).float().mean()):.2%}"
            rows.append(
                {
                    "grid": f"{size}x{size}",
                    "batch": str(batch),
                    "ours, s": f"{times['ours']:.3f}",
                    "naive, s": f"{'' if complete else '~'}{whole:.1f}",
                    "naive / ours": f"{whole / times['ours']:.0f}",
                    "floor, s": f"{floor:.3f}",
                    "ours / floor": f"{times['ours'] / floor:.2f}",
                    "one pass / floor": f"{times['pass'] / floor:.2f}",
                    "equal codes": equal,
                }
            )
            console.print(rows[-1])
    return rows


class FiveTimes(BundledSource):
    """The bundled images repeated five times: 60 000, as many as CIFAR-10 has."""

    def load(self) -> Splits:
        """Read the images and repeat them."""
        *splits, names = super().load()
        repeated = [
            split and Split(split.images.repeat(5, 1, 1, 1), split.labels.repeat(5))
            for split in splits
        ]
        return Splits(*repeated, names)


def make_inputs(args: argparse.Namespace) -> tuple[ImageDataModule, VQVAE]:
    """Make the images and a network of the recipe's size."""
    images = ImageDataModule(FiveTimes())
    images.setup()
    quantizer = EMAQuantizer(args.codes, 64, init="uniform", warmup_steps=0)
    vqvae = VQVAE(quantizer, images.image_shape[0], hidden=64)
    return images, vqvae.to(args.device, memory_format=torch.channels_last).eval()


def bench_encoding(args: argparse.Namespace, console: Console) -> list[dict[str, str]]:
    """Measure the code store against the bare encoder."""
    images, vqvae = make_inputs(args)
    device = torch.device(args.device)
    splits = [dataset.data for dataset in images.datasets.values()]
    total = sum(len(data) for data in splits)

    def store() -> None:
        folder = Path(tempfile.mkdtemp())
        CodesDataModule(images, vqvae, "benchmark", str(folder), 64).encode(device)
        shutil.rmtree(folder)

    @torch.inference_mode()
    def bare() -> None:
        for data in splits:
            for part in data.split(images.eval_batch_size):
                vqvae.encode(from_uint8(part.to(device)))

    times = alternate({"store": store, "bare": bare}, args.rounds)
    return [
        {
            "images": str(total),
            "code store, images/s": f"{total / times['store']:.0f}",
            "bare encoder, images/s": f"{total / times['bare']:.0f}",
            "share": f"{times['bare'] / times['store']:.1%}",
        }
    ]


def bench_training(args: argparse.Namespace, console: Console) -> list[dict[str, str]]:
    """Measure Lightning's Trainer against a bare loop."""
    images, vqvae = make_inputs(args)
    folder = Path(tempfile.mkdtemp())
    data = CodesDataModule(images, vqvae, "benchmark", str(folder), 64)
    data.encode(torch.device(args.device))
    data.setup()
    net = PixelCNN(data.num_codes, *data.grid, images.num_classes)
    task = PriorTask(net, lambda parameters: torch.optim.AdamW(parameters, 2e-3, fused=True))
    accelerator = "gpu" if args.device.startswith("cuda") else "cpu"

    def lightning() -> None:
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=args.steps,
            max_epochs=-1,
            precision=args.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        trainer.fit(task, datamodule=data)

    def bare() -> None:
        net.to(args.device).train()
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3, fused=True)
        rows = torch.arange(64 * args.steps).view(args.steps, 64) % len(data.datasets["train"])
        batches = [data.datasets["train"].__getitems__(part) for part in rows]
        half = args.precision == "bf16-mixed"
        for batch in batches:
            optimizer.zero_grad()
            codes, labels = batch.data.long().to(args.device), batch.labels.to(args.device)
            with torch.autocast(codes.device.type, torch.bfloat16, enabled=half):
                logits = net(codes, labels)
            F.cross_entropy(logits.float(), codes).backward()
            optimizer.step()

    times = alternate({"lightning": lightning, "bare": bare}, min(args.rounds, 3))
    shutil.rmtree(folder)
    count = 64 * args.steps
    return [
        {
            "precision": args.precision,
            "Trainer, images/s": f"{count / times['lightning']:.0f}",
            "bare loop, images/s": f"{count / times['bare']:.0f}",
            "outside the network": f"{1 - times['bare'] / times['lightning']:.1%}",
        }
    ]


def main() -> None:
    """Measure the chosen parts and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--precision", default="32-true", help="precision of training")
    parser.add_argument(
        "--complete",
        type=int,
        default=64,
        help="up to this many positions, run naive sampling in full",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console = Console()
    lines = [
        f"{platform.machine()}, {args.threads} threads, {args.device}, torch {torch.__version__}"
    ]
    runs = {"sampling": bench_sampling, "encoding": bench_encoding, "training": bench_training}
    for part in args.parts:
        rows = runs[part](args, console)
        table = Table(title=part)
        for heading in rows[0]:
            table.add_column(heading, justify="right")
        lines += ["", f"### {part}", "", "| " + " | ".join(rows[0]) + " |"]
        lines.append("| " + " | ".join("---:" for _ in rows[0]) + " |")
        for row in rows:
            table.add_row(*row.values())
            lines.append("| " + " | ".join(row.values()) + " |")
        console.print(table)
    if args.markdown is not None:
        partial = args.markdown.with_suffix(".partial")
        partial.write_text("\n".join(lines) + "\n")
        partial.replace(args.markdown)


if __name__ == "__main__":
    main()

"""Measure images per second of stage 1, from the textbook loop to `vqvae-train`.

    python experiments/benchmarks/training.py
    python experiments/benchmarks/training.py --compile --rounds 15

The network is that of sonnet's CIFAR-10 example (32x32 colour images, width 128, 8x8 codes, K=512,
D=64), with a batch of 256. Each row of the table includes all changes above it:

- textbook: PIL images through ToTensor in a DataLoader, a quantizer with one-hot products, float32;
- in memory: the batches of `ImageDataModule`, which stay uint8 until they are on the device;
- quantizer: `EMAQuantizer`;
- channels last, fused Adam, bfloat16, and with --compile `torch.compile`, one after the other;
- vqvae-train: the command's own Trainer, with its callbacks, its metrics file and its schedule, for
  comparison with the hand-written loop of the same settings.

Blocks of a few steps alternate in rotating order, so that a slow phase of the machine affects all
rows. The first steps of a block are not timed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from PIL import Image
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from vqvae_lightning.commands.app import silence_warnings
from vqvae_lightning.configs import CONF_DIR, build, register_resolvers
from vqvae_lightning.data import ImageDataModule
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.quantizers import EMAQuantizer, QuantizerOutput
from vqvae_lightning.stages.inputs import load_images
from vqvae_lightning.stages.training import build_task, complete_config

IMAGES = 10_240
CODES, DIM, HIDDEN, RESIDUAL = 512, 64, 128, 32
UNTIMED = 2  # steps at the start of each block
RATE = 2e-3


class Pictures(Dataset):
    """Images as torchvision's CIFAR10 returns them: one PIL image at a time, then a transform."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        return self.transform(Image.fromarray(self.images[row]))


class TextbookQuantizer(nn.Module):
    """Sonnet's `VectorQuantizerEMA` as usually written in torch, in float32."""

    codes_per_position = 1
    encoder_channels = code_dim = DIM
    num_codes = CODES

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.randn(CODES, DIM))
        self.register_buffer("sums", self.rows.clone())
        self.register_buffer("counts", torch.ones(CODES))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize (B, D, H, W) and move the rows."""
        z = z.float()
        flat = z.permute(0, 2, 3, 1).reshape(-1, DIM)
        squares = flat.square().sum(1, keepdim=True)
        distances = squares + self.rows.square().sum(1) - 2 * flat @ self.rows.t()
        codes = distances.argmin(1)
        one_hot = torch.zeros(len(codes), CODES, device=z.device).scatter_(1, codes[:, None], 1)
        chosen = (one_hot @ self.rows).view(*z.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        if self.training:
            with torch.no_grad():
                self.counts.lerp_(one_hot.sum(0), 0.01)
                self.sums.lerp_(one_hot.t() @ flat, 0.01)
                total = self.counts.sum()
                share = (self.counts + 1e-5) / (total + CODES * 1e-5)
                self.rows = self.sums / (share * total)[:, None]
        loss = 0.25 * F.mse_loss(chosen.detach(), z)
        return QuantizerOutput(z + (chosen - z).detach(), codes, loss, {})


def repeat_batches(loader: Any) -> Iterator[Tensor]:
    """Yield batches of images in [-1, 1], epoch after epoch."""
    while True:
        for batch in loader:
            yield batch if isinstance(batch, Tensor) else from_uint8(batch.data)


class ByHand:
    """A training loop without Lightning."""

    def __init__(
        self,
        images: ImageDataModule,
        in_memory: bool = True,
        quantizer: bool = True,
        channels_last: bool = True,
        fused: bool = True,
        bfloat16: bool = True,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        bottleneck = EMAQuantizer(CODES, DIM, warmup_steps=1) if quantizer else TextbookQuantizer()
        self.net = VQVAE(bottleneck, 3, HIDDEN, residual_hidden=RESIDUAL)
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        if compiled:
            self.net.encoder.compile()
            self.net.decoder.compile()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=RATE, fused=fused)
        self.bfloat16 = bfloat16
        self.variance = 4 * images.pixel_variance
        pictures = Pictures(images.datasets["train"].data.movedim(1, -1).contiguous().numpy())
        self.batches = repeat_batches(
            images.train_dataloader()
            if in_memory
            else DataLoader(pictures, images.batch_size, shuffle=True, drop_last=True)
        )

    def step(self) -> None:
        """Train on one batch."""
        images = next(self.batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            output = self.net(images)
            error = F.mse_loss(output.reconstruction.float(), images) / self.variance
            loss = error + output.quantized.loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if isinstance(self.net.quantizer, EMAQuantizer):
            self.net.quantizer.update(0.5)

    def run(self, steps: int) -> float:
        """Time `steps` steps, in seconds."""
        for _ in range(UNTIMED):
            self.step()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return time.perf_counter() - start


class Clock(Callback):
    """Notes when each step starts."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time at the start of a step."""
        self.starts.append(time.perf_counter())


class Command:
    """The task, Trainer and callbacks that `vqvae-train` runs."""

    def __init__(
        self, images: ImageDataModule, folder: Path, precision: str, compiled: bool
    ) -> None:
        overrides = [
            f"folder={folder}",
            "dataset=npz",
            f"dataset.source.path={folder.parent}/images.npz",
            f"dataset.batch_size={images.batch_size}",
            f"trainer.precision={precision}",
            "trainer.accelerator=cpu",
            "model.net.quantizer.warmup_steps=1",
            f"compile={compiled}",
        ]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            self.cfg = compose("vqvae", overrides)
        self.images = images
        complete_config(self.cfg, images)
        self.task = build_task(self.cfg)

    def run(self, steps: int) -> float:
        """Time `steps` steps, in seconds."""
        clock = Clock()
        parts = [build(part) for part in self.cfg.callbacks.values() if part is not None]
        trainer = build(
            self.cfg.trainer,
            max_steps=UNTIMED + steps + 1,
            limit_val_batches=0,
            callbacks=[*parts, clock],
            logger=[build(part) for part in self.cfg.logger.values()],
        )
        trainer.fit(self.task, datamodule=self.images)
        return clock.starts[UNTIMED + steps] - clock.starts[UNTIMED]


def make_runs(
    images: ImageDataModule, folder: Path, compiled: bool
) -> dict[str, Callable[[int], float]]:
    """Make the `run` method of each row, in the order of the table."""
    ladder: dict[str, dict[str, bool]] = {"textbook": {}}
    names = {
        "in memory": "in_memory",
        "quantizer": "quantizer",
        "channels last": "channels_last",
        "fused Adam": "fused",
        "bfloat16": "bfloat16",
    }
    for title, change in names.items():
        ladder[f"+ {title}"] = {**list(ladder.values())[-1], change: True}
    off = dict.fromkeys(names.values(), False)
    runs = {title: ByHand(images, **{**off, **on}).run for title, on in ladder.items()}
    runs["vqvae-train, float32"] = Command(images, folder / "float32", "32-true", False).run
    runs["vqvae-train, bfloat16"] = Command(images, folder / "bfloat16", "bf16-mixed", False).run
    if compiled:
        runs["+ compile"] = ByHand(images, compiled=True).run
        runs["vqvae-train, bfloat16, compile=true"] = Command(
            images, folder / "compiled", "bf16-mixed", True
        ).run
    return runs


def measure(
    runs: dict[str, Callable[[int], float]], steps: int, rounds: int, console: Console
) -> dict[str, list[float]]:
    """Measure the seconds per step of each block, by row; the first round does not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            seconds = runs[name](steps) / steps
            if turn:
                taken[name].append(seconds)
        console.print(f"round {turn}/{rounds}")
    return taken


def measure_convolutions(run: Callable[[int], float]) -> float:
    """Measure the share of convolutions in the time of a few steps, with torch's profiler."""
    with torch.profiler.profile() as profile:
        run(3)
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return sum(e.self_cpu_time_total for e in events if "convolution" in e.key) / total


def main() -> None:
    """Measure all rows and print the table, also in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="timed steps per block")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="add rows with torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    register_resolvers()
    silence_warnings()
    console = Console()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        generator = np.random.default_rng(0)
        # Coarse noise, so that neighbouring pixels correlate as in photographs.
        coarse = generator.integers(0, 256, (IMAGES + 512, 8, 8, 3), dtype=np.uint8)
        pixels = coarse.repeat(4, 1).repeat(4, 2)
        arrays = {"train": pixels[:IMAGES], "val": pixels[IMAGES:-256], "test": pixels[-256:]}
        np.savez(folder / "images.npz", **{f"{k}_images": v for k, v in arrays.items()})
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            data = [f"dataset.source.path={folder}/images.npz", f"dataset.batch_size={args.batch}"]
            cfg = compose("vqvae", ["dataset=npz", *data])
        images = load_images(cfg.dataset)
        runs = make_runs(images, folder, args.compile)
        taken = measure(runs, args.steps, args.rounds, console)
        share = measure_convolutions(runs["+ bfloat16"])
    table = Table(title=f"images/s at batch {args.batch}, medians of {args.rounds} blocks")
    for heading in ("loop", "ms per step", "images/s", "times the textbook", "best to worst, ms"):
        table.add_column(heading, justify="left" if heading == "loop" else "right")
    base = median(taken["textbook"])
    lines = []
    for name, seconds in taken.items():
        middle = median(seconds)
        cells = (
            name,
            f"{middle * 1e3:.1f}",
            f"{args.batch / middle:.0f}",
            f"{base / middle:.2f}",
            f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}",
        )
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    console.print(table)
    console.print(*lines, sep="\n", soft_wrap=True, highlight=False)
    console.print(f"Convolutions in the bfloat16 step: {share:.0%} of the time")
    pairs = {"float32": ("+ fused Adam", "vqvae-train, float32")}
    pairs["bfloat16"] = ("+ bfloat16", "vqvae-train, bfloat16")
    for precision, (hand, command) in pairs.items():
        # Ratios within a round, because the machine's speed varies between rounds.
        ratios = sorted(c / h for c, h in zip(taken[command], taken[hand], strict=True))
        console.print(
            f"Overhead of Lightning over the same loop by hand, {precision}: "
            f"{median(ratios) - 1:+.1%} (rounds: {ratios[0] - 1:+.1%} to {ratios[-1] - 1:+.1%})"
        )


if __name__ == "__main__":
    main()

"""Time a training step of `EMAQuantizer` against a library and against the textbook formula.

    uv run --extra library python experiments/benchmarks/quantizers.py
    python experiments/benchmarks/quantizers.py --shapes 16384x512x64 --markdown table.md
    python experiments/benchmarks/quantizers.py --shapes 16384x512x64 16384x8192x64 --busy

A step is forward, backward and the update of the codebook, in float32. The contestants:

- ours: `vqvae_lightning.quantizers.EMAQuantizer`;
- library: `VectorQuantize` of vector-quantize-pytorch, if it is installed;
- textbook: the N x K matrix |z|^2 - 2 z.e + |e|^2, its argmin, and one-hot products for the look-up
  and for the sums of the moving averages, as in sonnet.

All three start from one codebook, drawn from the input vectors. They have the same decay and
commitment weight and no revival of dead codes, so that they compute the same result. Each round
times every contestant once, in rotating order, so that a slow phase of the machine affects all of
them.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vqvae_lightning.quantizers import EMAQuantizer

DECAY = 0.99
COMMITMENT = 0.25
EPSILON = 1e-5
SIDE = 8  # the vectors come in grids of 8x8, those of a VQ-VAE on 32x32 pixels
WARM_UP_ROUNDS = 2
SLOW_STEP = 2.0  # seconds; a shape with a slower step gets SLOW_ROUNDS rounds
SLOW_ROUNDS = 3
TOLERANCE = 1e-5  # relative difference of two distances at which both codes count as right
NOT_INSTALLED = "not installed (uv run --extra library)"

Step = Callable[[Tensor], Tensor]
"""One training step for `z` (B, D, H, W); returns the codes (N,)."""


class Shape(NamedTuple):
    """N vectors of D values, K codes."""

    vectors: int
    codes: int
    dim: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = [Shape(n, k, d) for n in (16384, 65536) for k in (512, 1024, 8192) for d in (64, 256)]


def make_ours(tables: Tensor, code_dim: int, **options: Any) -> EMAQuantizer:
    """Make a quantizer of `code_dim` channels whose rows are `tables` ([Q,] K, D')."""
    quantizer = EMAQuantizer(
        tables.shape[-2],
        code_dim,
        epsilon=EPSILON,
        commitment=COMMITMENT,
        decay=DECAY,
        init="uniform",
        warmup_steps=0,
        revive_below=0,
        **options,
    ).to(tables.device)
    everywhere = torch.ones(tables.shape[:-1], dtype=torch.bool, device=tables.device)
    quantizer.set_rows(tables, everywhere, tables.new_ones(()))
    return quantizer


def ours(codebook: Tensor) -> Step:
    """Make a step of `EMAQuantizer`, called as the tasks call it."""
    quantizer = make_ours(codebook, codebook.shape[1])

    def step(z: Tensor) -> Tensor:
        out = quantizer(z)
        (out.vectors.square().mean() + out.loss).backward()
        quantizer.update(0.0)
        return out.codes.flatten()

    return step


def library(codebook: Tensor) -> Step:
    """Make a step of `VectorQuantize`, which updates its codebook in the forward pass."""
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(
        dim=codebook.shape[1],
        codebook_size=len(codebook),
        decay=DECAY,
        eps=EPSILON,
        commitment_weight=COMMITMENT,
        kmeans_init=False,
        threshold_ema_dead_code=0,
        accept_image_fmap=True,
        rotation_trick=False,  # True by default: another gradient, and more work than `ours`
    ).to(codebook.device)
    rows = {"_codebook.embed": codebook[None], "_codebook.embed_avg": codebook[None]}
    quantizer.load_state_dict({**quantizer.state_dict(), **rows})

    def step(z: Tensor) -> Tensor:
        vectors, codes, loss = quantizer(z)
        (vectors.square().mean() + loss).backward()
        return codes.flatten()

    return step


def textbook(codebook: Tensor) -> Step:
    """Make a step of sonnet's `VectorQuantizerEMA`, whose averages start from the codebook."""
    rows, sums = codebook.clone(), codebook.clone()
    # One hit per code: counts that start at zero would throw unused rows far away.
    counts = codebook.new_ones(len(codebook))

    def step(z: Tensor) -> Tensor:
        nonlocal rows
        channels_last = z.movedim(1, -1)
        with torch.no_grad():
            flat = channels_last.reshape(-1, z.shape[1])
            squares = flat.square().sum(1, keepdim=True)
            distances = squares - 2 * (flat @ rows.t()) + rows.square().sum(1)
            codes = distances.argmin(1)
            one_hot = torch.zeros_like(distances).scatter_(1, codes[:, None], 1)
            chosen = (one_hot @ rows).view_as(channels_last)
        commitment = F.mse_loss(channels_last, chosen)
        vectors = z + (chosen.movedim(-1, 1) - z).detach()
        (vectors.square().mean() + COMMITMENT * commitment).backward()
        with torch.no_grad():
            counts.lerp_(one_hot.sum(0), 1 - DECAY)
            sums.lerp_(one_hot.t() @ flat, 1 - DECAY)
            total = counts.sum()
            share = (counts + EPSILON) / (total + len(counts) * EPSILON)
            rows = sums / (share * total)[:, None]
        return codes

    return step


class Contestant(NamedTuple):
    """One row of the comparison."""

    make: Callable[[Tensor], Step]
    """Makes a step that starts from a codebook."""
    matrices: int
    """N x K float32 matrices that a step holds at once."""


# Six for the library: three distances kept by autograd, a one-hot in int64 (two) and in float32.
CONTESTANTS = {
    "ours": Contestant(ours, 0),
    "library": Contestant(library, 6),
    "textbook": Contestant(textbook, 2),
}


@dataclass
class Row:
    """Measurements of a shape, per contestant."""

    shape: Shape
    left_out: dict[str, str] = field(default_factory=dict)
    """Reason why a contestant did not run."""
    rounds: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Median time of a step."""
    busy_seconds: dict[str, float] = field(default_factory=dict)
    """Median time of a step next to a busy process."""
    agreement: dict[str, float] = field(default_factory=dict)
    """Share of the first step's codes that are the nearest ones."""
    memory: dict[str, float] = field(default_factory=dict)
    """Peak memory above the start, in bytes."""


def make_input(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make grids `z` (B, D, 8, 8) with a gradient, and a codebook of K of their vectors."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(shape.vectors, shape.dim, generator=generator)
    codebook = flat[torch.randperm(shape.vectors, generator=generator)[: shape.codes]]
    # A permuted view of (N, D) rows has the memory format channels_last.
    z = flat.view(-1, SIDE, SIDE, shape.dim).movedim(-1, 1).to(device).requires_grad_()
    return z, codebook.to(device)


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, because launching a kernel returns before its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_step(step: Step, z: Tensor) -> float:
    """Time one step, in seconds."""
    z.grad = None
    synchronise(z.device)
    start = time.perf_counter()
    step(z)
    synchronise(z.device)
    return time.perf_counter() - start


def time_interleaved(steps: dict[str, Step], z: Tensor, rounds: int) -> tuple[dict, int]:
    """Measure the median seconds per contestant; also return the number of rounds."""
    names = list(steps)
    warm_up = [time_step(steps[name], z) for _ in range(WARM_UP_ROUNDS) for name in names]
    if max(warm_up) > SLOW_STEP:
        rounds = min(rounds, SLOW_ROUNDS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(time_step(steps[name], z))
    return {name: median(values) for name, values in seconds.items()}, rounds


@torch.no_grad()
def judge(z: Tensor, codebook: Tensor, codes: dict[str, Tensor]) -> dict[str, float]:
    """Compute the share of vectors whose code is the nearest in float64, up to TOLERANCE."""
    right = dict.fromkeys(codes, 0)
    flat = z.detach().movedim(1, -1).reshape(-1, z.shape[1])
    wide = codebook.double()
    block = max(1, 2**24 // len(codebook))  # 128 MiB of distances
    for start in range(0, len(flat), block):
        vectors = flat[start : start + block].double()
        nearest = torch.addmm(wide.square().sum(1), vectors, wide.t(), alpha=-2).argmin(1)
        # The difference, unlike the formula above, is exact for a vector that is itself a code.
        best = (vectors - wide[nearest]).square().sum(1)
        for name, chosen in codes.items():
            distance = (vectors - wide[chosen[start : start + block]]).square().sum(1)
            right[name] += int((distance <= best * (1 + TOLERANCE)).sum())
    return {name: count / len(flat) for name, count in right.items()}


def read_memory(key: str) -> int:
    """Read the bytes of this process: `VmRSS` for now, `VmHWM` for the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {key}")


def measure_peak(name: str, shape: Shape, device: torch.device) -> int:
    """Measure the peak memory above the start, in bytes; call it in a fresh process."""
    z, codebook = make_input(shape, device)
    step = CONTESTANTS[name].make(codebook)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Not ru_maxrss: a child inherits the peak of its parent, and making the input would count.
        # Writing 5 resets VmHWM to the current size.
        Path("/proc/self/clear_refs").write_text("5")
        before = read_memory("VmRSS")
    for _ in range(2):
        z.grad = None
        step(z)
    synchronise(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return read_memory("VmHWM") - before


def measure_memory(name: str, shape: Shape, args: argparse.Namespace) -> float:
    """Run `measure_peak` in a separate process."""
    options = {"--shapes": shape, "--device": args.device, "--threads": args.threads}
    command = [sys.executable, __file__, "--memory-of", name]
    command += [str(part) for pair in options.items() for part in pair]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout))


@contextmanager
def keep_core_busy() -> Iterator[None]:
    """Keep one core busy with another process while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)  # until the interpreter has started
        yield
    finally:
        process.kill()
        process.wait()


def find_reason_to_leave_out(name: str, shape: Shape, memory_gb: float) -> str | None:
    """Return why this contestant cannot run here, or None if it can."""
    if name == "library":
        try:
            version("vector-quantize-pytorch")
        except PackageNotFoundError:
            return NOT_INSTALLED
    gigabytes = CONTESTANTS[name].matrices * shape.vectors * shape.codes * 4 / 1e9
    return f"needs {gigabytes:.1f} GB" if gigabytes > memory_gb else None


def measure(shape: Shape, args: argparse.Namespace, console: Console) -> Row:
    """Measure one shape."""
    row = Row(shape)
    for name in CONTESTANTS:
        reason = find_reason_to_leave_out(name, shape, args.memory_gb)
        if reason is not None:
            row.left_out[name] = reason
            console.print(f"{shape}: {name} left out, {reason}")
    present = [name for name in CONTESTANTS if name not in row.left_out]
    row.memory = {name: measure_memory(name, shape, args) for name in present}
    z, codebook = make_input(shape, torch.device(args.device))
    steps = {name: CONTESTANTS[name].make(codebook) for name in present}
    row.agreement = judge(z, codebook, {name: step(z) for name, step in steps.items()})
    row.seconds, row.rounds = time_interleaved(steps, z, args.rounds)
    if args.busy:
        with keep_core_busy():
            row.busy_seconds, _ = time_interleaved(steps, z, args.rounds)
    return row


def format_row(row: Row) -> dict[str, str]:
    """Format a row of the table: heading to text."""
    texts = {"N": str(row.shape.vectors), "K": str(row.shape.codes), "D": str(row.shape.dim)}
    for name in CONTESTANTS:
        if name in row.left_out:
            texts[f"{name}, ms"] = row.left_out[name]
            continue
        texts[f"{name}, ms"] = f"{row.seconds[name] * 1e3:.1f}"
        if name != "ours":
            texts[f"{name}, ms"] += f" ({row.seconds[name] / row.seconds['ours']:.2f}x)"
    if row.busy_seconds:
        for name in CONTESTANTS:
            slower = row.busy_seconds.get(name, 0) / row.seconds.get(name, 1)
            text = f"{row.busy_seconds.get(name, 0) * 1e3:.1f} ({slower:.2f} x quiet)"
            texts[f"{name} busy, ms"] = text if name in row.busy_seconds else "-"
    for name in CONTESTANTS:
        known = name in row.memory
        texts[f"{name}, MB"] = f"{row.memory[name] / 1e6:.0f}" if known else "-"
    wrong = {name: share for name, share in row.agreement.items() if share < 1}
    misses = [f"{name} {1 - share:.1e} off" for name, share in wrong.items()]
    texts["codes"] = ", ".join(misses) or "all right"
    texts["rounds"] = str(row.rounds)
    return texts


def describe_machine(args: argparse.Namespace) -> str:
    """Describe the machine in one line: processor, threads, versions."""
    processor = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    if args.device.startswith("cuda"):
        processor = f"{torch.cuda.get_device_name(args.device)}, {processor}"
    try:
        rival = f"vector-quantize-pytorch {version('vector-quantize-pytorch')}"
    except PackageNotFoundError:
        rival = "no vector-quantize-pytorch"
    return f"{processor}, {args.threads} threads, torch {torch.__version__}, {rival}"


def make_table(rows: list[Row]) -> Table:
    """Make the table for the terminal."""
    table = Table(caption="median per training step; in brackets the multiple of the column ours")
    for heading in format_row(rows[0]):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*format_row(row).values())
    return table


def write_markdown(path: Path, rows: list[Row], args: argparse.Namespace) -> None:
    """Write the table, the command and the machine to a Markdown file, atomically."""
    headings = list(format_row(rows[0]))
    lines = [
        "Median time of a training step (in brackets: multiple of the column ours), and peak",
        f"memory above the start. {describe_machine(args)}.",
        "",
        "```bash",
        shlex.join(["python", *sys.argv]),
        "```",
        "",
        f"| {' | '.join(headings)} |",
        f"|{' ---: |' * len(headings)}",
        *(f"| {' | '.join(format_row(row).values())} |" for row in rows),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(path)


def parse_shape(text: str) -> Shape:
    """Parse `NxKxD`."""
    try:
        shape = Shape(*map(int, text.split("x")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text} is not NxKxD, as in 16384x512x64") from None
    if min(shape) < 1 or shape.vectors % SIDE**2:
        raise argparse.ArgumentTypeError(f"{text}: N must be a multiple of {SIDE**2}")
    if not 2 <= shape.codes <= shape.vectors:
        raise argparse.ArgumentTypeError(f"{text}: K must lie between 2 and N")
    return shape


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="NxKxD")
    add("--rounds", type=int, default=7, help=f"{SLOW_ROUNDS} if a step takes over 2 s")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu or cuda")
    add("--memory-gb", type=float, default=12, help="leave out contestants that need more")
    add("--busy", action="store_true", help="time again next to a process that spins")
    add("--markdown", type=Path, metavar="PATH", help="also write the table here")
    add("--memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return args


def main() -> None:
    """Measure all shapes and print the table."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of is not None:
        print(json.dumps(measure_peak(args.memory_of, args.shapes[0], torch.device(args.device))))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # the default of 80 would break each cell into three lines
    console.print(describe_machine(args))
    start = time.perf_counter()
    rows = []
    for shape in args.shapes:
        rows.append(measure(shape, args, console))
        console.print(f"{shape}: done after {time.perf_counter() - start:.0f} s")
        if args.markdown is not None:
            write_markdown(args.markdown, rows, args)
    console.print(make_table(rows))


if __name__ == "__main__":
    main()

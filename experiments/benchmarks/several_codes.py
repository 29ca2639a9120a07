"""Time a training step of product and residual codes against separate calls and a library.

    uv run --extra library python experiments/benchmarks/several_codes.py
    uv run --extra library python experiments/benchmarks/several_codes.py --vectors 65536

A step is forward, backward and the update of the codebooks, in float32. The contestants:

- ours: `EMAQuantizer` with `codes_per_position`;
- separate: one `EMAQuantizer` per group of channels, called one after the other (product only);
- library: `GroupedResidualVQ` with one stage per group, or `ResidualVQ`, of
  vector-quantize-pytorch.

All start from the library's first rows, with the same decay and commitment weight and no revival,
so that they choose the same codes. Each round times every contestant once, in rotating order.
"""

import argparse
import os
from typing import NamedTuple

import torch
import vector_quantize_pytorch as vqp
from quantizers import (
    COMMITMENT,
    DECAY,
    Shape,
    Step,
    describe_machine,
    make_input,
    make_ours,
    time_interleaved,
)
from torch import Tensor

SHARED = {
    "decay": DECAY,
    "kmeans_init": False,
    "threshold_ema_dead_code": 0,
    "rotation_trick": False,  # True by default: another gradient, and more work than `ours`
}


class Case(NamedTuple):
    """One row of the table."""

    arrangement: str
    count: int
    """Codes per position (Q)."""
    codes: int
    """Rows of each codebook (K)."""
    dim: int
    """Channels of a vector (D)."""


CASES = [
    Case("product", 8, 128, 64),
    Case("product", 8, 128, 256),
    Case("residual", 4, 512, 64),
    Case("residual", 4, 512, 256),
]


def ours(case: Case, tables: Tensor) -> Step:
    """Make a step of one quantizer with Q codes."""
    several = {"codes_per_position": case.count, "arrangement": case.arrangement}
    quantizer = make_ours(tables, case.dim, **several)

    def step(z: Tensor) -> Tensor:
        out = quantizer(z)
        (out.vectors.square().mean() + out.loss).backward()
        quantizer.update(0.0)
        return out.codes.flatten(0, -2)

    return step


def separate(case: Case, tables: Tensor) -> Step:
    """Make a step of Q quantizers, each for its channels."""
    quantizers = [make_ours(table, table.shape[1]) for table in tables]

    def step(z: Tensor) -> Tensor:
        parts = zip(quantizers, z.chunk(case.count, 1), strict=True)
        outs = [quantizer(part) for quantizer, part in parts]
        loss = torch.stack([out.loss for out in outs]).mean()
        (torch.cat([out.vectors for out in outs], 1).square().mean() + loss).backward()
        for quantizer in quantizers:
            quantizer.update(0.0)
        return torch.stack([out.codes.flatten() for out in outs], -1)

    return step


def library(case: Case, device: torch.device) -> tuple[Step, Tensor]:
    """Make a step of the library, and return it with its first rows (Q, K, D')."""
    if case.arrangement == "product":
        grouped = {"groups": case.count, "num_quantizers": 1}
        quantizer = vqp.GroupedResidualVQ(
            dim=case.dim,
            codebook_size=case.codes,
            commitment_weight=COMMITMENT,
            **grouped,
            **SHARED,
        )
        layers = [part.layers[0] for part in quantizer.rvqs]
    else:
        quantizer = vqp.ResidualVQ(
            dim=case.dim,
            codebook_size=case.codes,
            num_quantizers=case.count,
            commitment_weight=COMMITMENT,
            **SHARED,
        )
        layers = list(quantizer.layers)
    quantizer.to(device)
    generator = torch.Generator().manual_seed(1)
    for layer in layers:  # the scale of the vectors, so that all rows are chosen
        rows = torch.randn(layer._codebook.embed.shape, generator=generator).to(device)
        layer._codebook.embed.data.copy_(rows)
        layer._codebook.embed_avg.data.copy_(rows)
    tables = torch.cat([layer._codebook.embed.detach().clone() for layer in layers])

    def step(z: Tensor) -> Tensor:
        rows = z.movedim(1, -1).reshape(len(z), -1, case.dim)
        vectors, codes, losses = quantizer(rows)
        (vectors.square().mean() + losses.mean()).backward()
        # Codes are (groups, B, H W, 1), or (B, H W, stages).
        return (
            codes.movedim(0, -1).reshape(-1, case.count) if codes.ndim == 4 else codes.flatten(0, 1)
        )

    return step, tables


def measure(case: Case, vectors: int, device: torch.device, rounds: int) -> dict[str, str]:
    """Time one row of the table, heading to text."""
    z, _ = make_input(Shape(vectors, case.codes, case.dim), device)
    theirs, tables = library(case, device)
    steps: dict[str, Step] = {"ours": ours(case, tables), "library": theirs}
    if case.arrangement == "product":
        steps["separate"] = separate(case, tables)
    codes = {name: step(z) for name, step in steps.items()}
    same = {name: float((own == codes["ours"]).double().mean()) for name, own in codes.items()}
    seconds, _ = time_interleaved(steps, z, rounds)
    texts = {"codes": case.arrangement, "N": f"{vectors}", "Q": f"{case.count}"}
    texts |= {"K": f"{case.codes}", "D": f"{case.dim}", "ours, ms": f"{seconds['ours'] * 1e3:.1f}"}
    for name in ("separate", "library"):
        times = seconds[name] / seconds["ours"] if name in seconds else 0
        texts[f"{name}, ms"] = f"{seconds[name] * 1e3:.1f} ({times:.2f}x)" if times else "-"
    texts["same codes"] = f"{min(same.values()):.4%}"
    return texts


def main() -> None:
    """Measure all cases and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=16384, help="N, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{describe_machine(args)}, load {os.getloadavg()[0]:.1f} before the start\n")
    device = torch.device(args.device)
    for number, case in enumerate(CASES):
        row = measure(case, args.vectors, device, args.rounds)
        if number == 0:
            print(f"| {' | '.join(row)} |\n|{' ---: |' * len(row)}")
        print(f"| {' | '.join(row.values())} |", flush=True)


if __name__ == "__main__":
    main()

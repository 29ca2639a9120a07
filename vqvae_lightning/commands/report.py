"""vqvae-report: `report.html` of a sweep, or a comparison of several runs."""

import argparse
import sys
from pathlib import Path

from vqvae_lightning.errors import InputError


def main() -> None:
    """Compare the jobs of a sweep, or several runs."""
    parser = argparse.ArgumentParser("vqvae-report", description=__doc__)
    parser.add_argument(
        "folder",
        type=Path,
        nargs="+",
        help="folder of a sweep (hydra.sweep.dir), with one folder per job; "
        "or folders of several runs, of which the first is the reference",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        help="folder of comparison.html and comparison.csv for several runs (default: here)",
    )
    given = parser.parse_args()
    try:
        paths = _write(given.folder, given.output)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    for path in paths:
        print(path)


def _write(folders: list[Path], output: Path) -> list[Path]:
    # Imported here, because --help must cost little.
    if len(folders) == 1:
        from vqvae_lightning.report.sweep import write_sweep_report

        return write_sweep_report(folders[0])
    from vqvae_lightning.console import console
    from vqvae_lightning.report.comparison import compare_runs

    table, warnings, paths = compare_runs(folders, output)
    console.print(table)
    for warning in warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    return paths


if __name__ == "__main__":
    main()

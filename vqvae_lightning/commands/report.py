"""vqvae-report: `report.html` of a sweep."""

import argparse
import sys
from pathlib import Path

from vqvae_lightning.errors import InputError


def main() -> None:
    """Compare the jobs of a sweep."""
    parser = argparse.ArgumentParser("vqvae-report", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="folder of a sweep (hydra.sweep.dir), with one folder per job"
    )
    folder = parser.parse_args().folder
    from vqvae_lightning.report.sweep import write_sweep_report

    try:
        paths = write_sweep_report(folder)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    for path in paths:
        print(path)


if __name__ == "__main__":
    main()

"""The data and codes that a stage works on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vqvae_lightning.errors import InputError, prefix_keys
from vqvae_lightning.trust import DATA, Trust


def load_images(config: Any) -> Any:
    """The `PixelDataModule` of a dataset config, downloaded and set up."""
    from vqvae_lightning.configs import build

    return _set_up(build(config))


def load_checkpoint_images(
    vqvae: Any, trust: Iterable[str], way_out: str = "restore the data"
) -> Any:
    """The `PixelDataModule` that a VQ-VAE was trained on, as its checkpoint describes it.

    Args:
        vqvae: A `checkpoints.Loaded`.
        trust: Packages that the user trusts.
        way_out: What the user can do if the data have changed, for the message.

    Raises:
        InputError: If the checkpoint names other code, or no data, or the data have changed since.
    """
    images = Trust("the VQ-VAE's checkpoint", trust, DATA).build(
        vqvae.config.get("dataset"), "dataset"
    )
    if not hasattr(images, "prepare_data"):
        raise InputError("the VQ-VAE's checkpoint names no data: give dataset=NAME.")
    _set_up(images)
    known = vqvae.config.get("data_fingerprint")  # older checkpoints have none
    what = "the VQ-VAE's checkpoint was trained on"
    require_same_data(images, known, vqvae.config["dataset"], what, way_out)
    return images


def _set_up(images: Any) -> Any:
    with prefix_keys("dataset"):
        images.prepare_data()
        images.setup()
    return images


def require_same_data(
    images: Any, known: str | None, dataset: Any, what: str, way_out: str
) -> None:
    """Refuse data that have changed since a run or a checkpoint was made from them.

    Args:
        images: The `PixelDataModule` as it is now, set up.
        known: Fingerprint of the data then; None if it was not stored, as in older runs.
        dataset: Config of the data set.
        what: Start of the message: what was made from the data.
        way_out: What the user can do, for the message.

    Raises:
        InputError: If the fingerprints differ.
    """
    if known in (None, images.fingerprint):
        return
    source = dataset.get("source") or {}
    places = {
        **{f"dataset.source.{key}": source.get(key) for key in ("path", "root")},
        **{f"dataset.{key}": dataset.get(key) for key in ("root", "train")},
    }
    key, place = next(((k, v) for k, v in places.items() if v), ("dataset", "the bundled images"))
    raise InputError(
        f"{what} data with fingerprint {known}, but {key}={place} now has "
        f"{images.fingerprint}: {way_out}."
    )


def build_codes(images: Any, vqvae: Any, path: Path, cfg: Any, batch_size: int) -> Any:
    """The `CodesDataModule` of `images` under the VQ-VAE from `path`."""
    from vqvae_lightning.checkpoints import weights_hash
    from vqvae_lightning.data import CodesDataModule

    folder = cfg.codes_dir or path.parent.parent / "codes"
    return CodesDataModule(images, vqvae, weights_hash(vqvae), str(folder), batch_size)


def print_survey(title: str, survey: Any) -> None:
    """Show all that a `preflight.Survey` found of a stage."""
    from rich.table import Table

    from vqvae_lightning.console import console

    table = Table(title=title, title_justify="left", show_header=False)
    for name, text in survey.facts.items():
        table.add_row(name, text)
    console.print(table)
    for warning in survey.warnings:
        console.print(f"warning: {warning}", highlight=False)

"""Load the data and codes that a stage works on."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from rich.table import Table

from vqvae_lightning.checkpoints import Loaded, hash_weights
from vqvae_lightning.configs import build
from vqvae_lightning.console import console
from vqvae_lightning.data import CodesDataModule
from vqvae_lightning.data.images import PixelDataModule
from vqvae_lightning.errors import InputError, prefix_keys
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.trust import DATA, Trust

if TYPE_CHECKING:
    from vqvae_lightning.stages.preflight import Survey


def load_images(config: DictConfig) -> PixelDataModule:
    """Build the data of a dataset config, download them and set them up."""
    return _set_up(build(config))


def load_checkpoint_images(
    vqvae: Loaded, trust: Iterable[str], way_out: str = "restore the data"
) -> PixelDataModule:
    """Load the data that a VQ-VAE was trained on, as its checkpoint describes them.

    Args:
        vqvae: The loaded checkpoint.
        trust: Packages that the user trusts.
        way_out: Advice in the message if the data have changed.

    Raises:
        InputError: If the checkpoint names untrusted code or no data, or the data have changed.
    """
    images = Trust("the VQ-VAE's checkpoint", trust, DATA).build(
        vqvae.config.get("dataset"), "dataset"
    )
    if not hasattr(images, "prepare_data"):
        raise InputError("the VQ-VAE's checkpoint names no data: give dataset=NAME.")
    loaded = _set_up(images)
    known = vqvae.config.get("data_fingerprint")  # older checkpoints have none
    what = "the VQ-VAE's checkpoint was trained on"
    require_same_data(loaded, known, vqvae.config["dataset"], what, way_out)
    return loaded


def _set_up(images: Any) -> PixelDataModule:
    with prefix_keys("dataset"):
        images.prepare_data()
        images.setup()
    return images  # type: ignore[no-any-return]


def require_same_data(
    images: PixelDataModule,
    known: str | None,
    dataset: DictConfig | dict[str, Any],
    what: str,
    way_out: str,
) -> None:
    """Raise an error if the data have changed since a run or a checkpoint was made from them.

    Args:
        images: Data as they are now, set up.
        known: Fingerprint of the data at that time; None if it was not stored, as in older runs.
        dataset: Config of the data set.
        what: Start of the message, which says what was made from the data.
        way_out: Advice in the message.

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


def build_codes(
    images: PixelDataModule, vqvae: VQVAE, path: Path, cfg: DictConfig, batch_size: int
) -> CodesDataModule:
    """Build the codes of `images` under a VQ-VAE.

    Args:
        images: Data, set up.
        vqvae: Network in evaluation mode.
        path: Checkpoint of the VQ-VAE.
        cfg: Config with `codes_dir`; null stores the codes next to the folder of the checkpoint.
        batch_size: Images per optimizer step.
    """
    folder = cfg.codes_dir or RunFolder(path.parent.parent).code_cache
    return CodesDataModule(images, vqvae, hash_weights(vqvae), str(folder), batch_size)


def print_survey(title: str, survey: "Survey") -> None:
    """Print everything in the survey of a stage."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, text in survey.facts.items():
        table.add_row(name, text)
    console.print(table)
    print_warnings(survey)


def print_warnings(survey: "Survey") -> None:
    """Print a line for each warning in the survey of a stage."""
    for warning in survey.warnings:
        console.print(f"warning: {warning}", highlight=False)

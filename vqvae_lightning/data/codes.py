"""The second stage's data: the same splits as codes, encoded once and kept on disk."""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vqvae_lightning
from vqvae_lightning.console import progress_bar
from vqvae_lightning.data.images import ArrayDataset, Batch, PixelDataModule, StageDataModule
from vqvae_lightning.distributed import broadcast, gather, rank_and_world
from vqvae_lightning.errors import InputError, Key, rename_keys
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.pixels import from_uint8

SPLITS = ("train", "val", "test")


def require_codes(quantizer: Any) -> None:
    """Refuse a quantizer whose codes no prior could learn.

    Raises:
        InputError: If it has none, or several per position.
    """
    count = quantizer.codes_per_position
    if count != 1:
        name = getattr(quantizer, "name", type(quantizer).__name__)
        raise InputError(
            f"a prior and an evaluation need one code per position, but quantizer {name} has "
            f"{count or 'none'}: train it with vqvae-train alone, or choose another, such as "
            "quantizer=ema, loss, fsq."
        )


class CodesDataModule(StageDataModule):
    """The codes of a data set under a trained VQ-VAE.

    All splits are encoded once, into `folder`/<VQ-VAE hash>-<data fingerprint>: per split the codes
    in the smallest integer type that holds them, and the labels; and a header. Codes are written as
    they come and memory-mapped when read, so that they need not fit in memory: those of 1.3 million
    images are 2.6 GB at 32x32 codes each. The folder is written under another name and then
    renamed: an interrupted run leaves nothing behind that a later one would read, and of two runs
    that encode at once the first to finish wins. The ranks of one run share the work, and the
    folder.

    Args:
        images: The images; their batch size, seed and splits are used.
        vqvae: In evaluation mode.
        vqvae_hash: Of its weights, as `checkpoints.weights_hash` gives it.
        folder: Where the codes are kept.
        batch_size: Images per optimizer step, over all ranks together.

    Attributes:
        grid: Rows and columns of codes per image.
    """

    datasets: dict[str, ArrayDataset]
    batch_size_key = "batch_size"

    def __init__(
        self, images: PixelDataModule, vqvae: VQVAE, vqvae_hash: str, folder: str, batch_size: int
    ) -> None:
        super().__init__(batch_size, images.eval_batch_size, images.seed)
        images.setup()
        require_codes(vqvae.quantizer)
        if images.image_shape[0] != vqvae.channels:
            raise InputError(
                f"the images have {images.image_shape[0]} channels, the VQ-VAE {vqvae.channels}: "
                "choose the dataset that it was trained on."
            )
        self.images = images
        self.vqvae = vqvae
        self.vqvae_hash = vqvae_hash
        with rename_keys(lambda key: {"size": images.size_key}.get(key, key)):
            self.grid = vqvae.grid(*images.image_shape[1:])
        self.folder = Path(folder) / f"{vqvae_hash}-{images.fingerprint}"
        if self.batch_size > len(images.datasets["train"]):
            raise InputError(
                Key("batch_size"),
                f"={batch_size} is larger than the training split "
                f"({len(images.datasets['train'])} images).",
            )

    @property
    def num_codes(self) -> int:
        """Values a code can take (K)."""
        return self.vqvae.quantizer.num_codes

    @property
    def integer(self) -> np.dtype[Any]:
        """The smallest integer type that holds the codes."""
        return np.min_scalar_type(self.num_codes - 1)

    @property
    def header(self) -> dict[str, Any]:
        """What the stored codes must have been made from."""
        return {
            "num_codes": self.num_codes,
            "integer": self.integer.name,
            "grid": list(self.grid),
            "images": {split: len(self.images.datasets[split]) for split in SPLITS},
            "class_names": self.images.class_names,
            "vqvae_hash": self.vqvae_hash,
            "data_fingerprint": self.images.fingerprint,
        }

    def encode(self, device: torch.device) -> None:
        """Make the codes, unless they are there; each rank encodes its own part of each split.

        Raises:
            InputError: If the folder cannot be written.
        """
        # The first rank decides for all, so that none waits for another.
        if broadcast(self.folder.is_dir()):
            return
        partial = broadcast(self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex[:8]}"))
        rank, world = rank_and_world()
        try:
            # An error of one rank is every rank's, or the others would wait for it for ever.
            said = gather(_said(lambda: self._encode_part(partial, rank, world, device)))
            if rank == 0 and not any(said):
                said = [_said(lambda: self._join(partial, world))]
            error = next((text for text in broadcast(said) if text), None)
        finally:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        if error:
            raise InputError(
                f"codes cannot be written into {self.folder.parent}: {error}; set codes_dir."
            )

    def setup(self, stage: str | None = None) -> None:
        """Map the stored codes; inside a Trainer, make them first if need be, over all its ranks.

        Raises:
            InputError: If they are damaged or belong to another VQ-VAE or data set.
        """
        if self.datasets:
            return
        if self.trainer is not None:
            self.encode(self.trainer.strategy.root_device)
        found: dict[str, Any] = {}
        try:
            found = json.loads((self.folder / "header.json").read_text())
            arrays = {s: np.load(self.folder / f"{s}.npy", mmap_mode="r") for s in SPLITS}
            labels = {s: self._labels(s) for s in SPLITS}
        except (OSError, ValueError) as error:
            raise InputError(
                f"the codes in {self.folder} cannot be read ({error}): delete the folder to make "
                "them anew."
            ) from error
        if not isinstance(found, dict):
            raise InputError(f"{self.folder}/header.json is none: delete the folder.")
        for key, value in self.header.items():
            if found.get(key) != value:
                raise InputError(
                    f"the codes in {self.folder} were made for {key}={found.get(key)}, this run "
                    f"has {value}: delete the folder to make them anew."
                )
        for split, array in arrays.items():
            shape = (self.header["images"][split], *self.grid)
            if array.shape != shape or array.dtype != self.integer:
                raise InputError(
                    f"{self.folder}/{split}.npy has shape {array.shape} of {array.dtype}, not "
                    f"{shape} of {self.integer}: delete the folder to make the codes anew."
                )
            self.datasets[split] = ArrayDataset(array, labels[split])

    def histogram(self) -> Tensor:
        """Hits per code in the training split, (K,) int64."""
        rows = self.datasets["train"].data
        counts = torch.zeros(self.num_codes, dtype=torch.int64)
        for start in range(0, len(rows), 8192):  # all of them as int64 may not fit in memory
            part = torch.from_numpy(rows[start : start + 8192].astype(np.int64))
            counts += part.flatten().bincount(minlength=self.num_codes)
        return counts

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """To int64, on the device."""
        return Batch(batch.data.long(), batch.labels)

    def _encode(self, batch: Batch, device: torch.device) -> np.ndarray[Any, np.dtype[Any]]:
        with torch.inference_mode():
            codes = self.vqvae.to(device).encode(from_uint8(batch.data.to(device)))
        return codes.cpu().numpy().astype(self.integer)

    def _labels(self, split: str) -> Tensor | None:
        if not self.images.num_classes:
            return None
        labels = np.load(self.folder / f"{split}_labels.npy")
        wanted = (len(self.images.datasets[split]),)
        if labels.shape != wanted:
            raise ValueError(f"{split}_labels.npy has shape {labels.shape}, not {wanted}")
        return torch.from_numpy(labels)

    def _encode_part(self, partial: Path, rank: int, world: int, device: torch.device) -> None:
        """Write this rank's part of each split: the rows' bytes, of codes and of labels."""
        partial.mkdir(parents=True, exist_ok=True)
        with progress_bar("encoding", sum(self.header["images"].values())) as advance:
            for split in SPLITS:
                loader = self.images.batches(split)  # type: ignore[arg-type]
                rows = loader.rows()
                first = min((int(part[0]) for part in rows), default=0)
                with (
                    open(partial / f"{split}.{rank}.part", "wb") as codes,
                    open(partial / f"{split}_labels.{rank}.part", "wb") as labels,
                ):
                    # Each batch to its place: of several workers the batches come out of order.
                    for part, batch in zip(rows, loader, strict=True):
                        encoded = self._encode(batch, device)
                        row = int(part[0]) - first
                        codes.seek(row * encoded[0].nbytes)
                        codes.write(encoded.tobytes())
                        if batch.labels is not None:
                            labels.seek(row * batch.labels[0].nbytes)
                            labels.write(batch.labels.numpy().tobytes())
                        advance(len(batch.data) * world)

    def _join(self, partial: Path, world: int) -> None:
        """Put the ranks' parts together, write the header, and give the folder its name."""
        for split, total in self.header["images"].items():
            arrays: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = [
                (split, self.integer, (total, *self.grid))
            ]
            if self.images.num_classes:
                arrays.append((f"{split}_labels", np.dtype(np.int64), (total,)))
            for name, integer, shape in arrays:
                with open(partial / f"{name}.npy", "wb") as whole:
                    head = {"descr": integer.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(whole, head)
                    for rank in range(world):
                        with open(partial / f"{name}.{rank}.part", "rb") as part:
                            shutil.copyfileobj(part, whole)
        for path in partial.glob("*.part"):
            path.unlink()
        written = {**self.header, "version": vqvae_lightning.__version__}
        (partial / "header.json").write_text(json.dumps(written, indent=1))
        try:
            partial.rename(self.folder)
        except OSError:
            if not self.folder.is_dir():  # else another run was first
                raise


def _said(step: Callable[[], None]) -> str | None:
    """What went wrong with a file in `step`, if anything."""
    try:
        step()
    except OSError as error:
        return str(error)
    return None

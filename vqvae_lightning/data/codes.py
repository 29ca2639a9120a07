"""The data of the second stage: the same splits as codes, encoded once and stored."""

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
from vqvae_lightning.console import show_progress
from vqvae_lightning.data.images import ArrayDataset, Batch, PixelDataModule, StageDataModule
from vqvae_lightning.distributed import broadcast, gather, get_rank_and_world
from vqvae_lightning.errors import InputError, Key, rename_keys
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.quantizers.protocol import Quantizer

SPLITS = ("train", "val", "test")


def require_codes(quantizer: Quantizer) -> None:
    """Refuse a bottleneck without codes.

    Raises:
        InputError: If it is continuous.
    """
    if not quantizer.codes_per_position:
        name = getattr(quantizer, "name", type(quantizer).__name__)
        raise InputError(
            f"a prior and an evaluation need codes, but quantizer {name} is continuous and has "
            "none: train it with vqvae-train alone, or choose another, such as quantizer=ema, "
            "loss, fsq."
        )


class CodesDataModule(StageDataModule):
    """The codes of a data set under a trained VQ-VAE.

    An image has codes (h, w), or (h, w, Q) with Q codes per position. All splits are encoded once
    and stored in `folder`/<VQ-VAE hash>-<data fingerprint>. Each split has its labels and its
    codes, in the smallest integer type that holds them; a header describes them. Codes are written
    batch by batch and memory-mapped when read, because they may not fit in memory: 1.3 million
    images of 32x32 codes take 2.6 GB. The folder is written under a temporary name and then
    renamed, so that an interrupted run leaves no incomplete codes. If two runs encode at the same
    time, the first to finish wins. The ranks of a run share the encoding.

    Args:
        images: Images to encode; their evaluation batch size, seed and splits are used.
        vqvae: Trained VQ-VAE, in evaluation mode.
        vqvae_hash: Hash of its weights, from `checkpoints.hash_weights`.
        folder: Folder in which codes are stored.
        batch_size: Grids of codes per optimizer step, over all ranks together.

    Attributes:
        grid: Rows and columns of the positions that have codes.
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
            self.grid = vqvae.compute_grid(*images.image_shape[1:])
        self.folder = Path(folder) / f"{vqvae_hash}-{images.fingerprint}"
        if self.batch_size > len(images.datasets["train"]):
            raise InputError(
                Key("batch_size"),
                f"={batch_size} is larger than the training split: it must be at most its "
                f"{len(images.datasets['train'])} images.",
            )

    @property
    def num_codes(self) -> int:
        """Number of values that a code can take (K)."""
        return self.vqvae.quantizer.num_codes

    @property
    def codes_per_position(self) -> int:
        """Number of codes at each position (Q)."""
        return self.vqvae.quantizer.codes_per_position

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of an image's codes: (h, w), or (h, w, Q) with several codes per position."""
        return (*self.grid, self.codes_per_position) if self.codes_per_position > 1 else self.grid

    @property
    def integer(self) -> np.dtype[Any]:
        """The smallest integer type that holds the codes."""
        return np.min_scalar_type(self.num_codes - 1)

    @property
    def header(self) -> dict[str, Any]:
        """What the stored codes are made from, and their format."""
        return {
            "num_codes": self.num_codes,
            "codes_per_position": self.codes_per_position,
            "integer": self.integer.name,
            "grid": list(self.grid),
            "images": {split: len(self.images.datasets[split]) for split in SPLITS},
            "class_names": self.images.class_names,
            "vqvae_hash": self.vqvae_hash,
            "data_fingerprint": self.images.fingerprint,
        }

    def encode(self, device: torch.device) -> None:
        """Encode all splits, unless the codes are stored; each rank encodes a part of each split.

        Raises:
            InputError: If the folder cannot be written to.
        """
        # Rank 0 decides for all ranks. If they differed, some would wait for others forever.
        if broadcast(self.folder.is_dir()):
            return
        partial = broadcast(self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex[:8]}"))
        rank, world = get_rank_and_world()
        try:
            # All ranks learn of an error in one. Otherwise they would wait for it forever.
            errors = gather(_catch_error(lambda: self._encode_part(partial, rank, world, device)))
            if rank == 0 and not any(errors):
                errors = [_catch_error(lambda: self._join_parts(partial, world))]
            error = next((text for text in broadcast(errors) if text), None)
        finally:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        if error:
            raise InputError(
                f"codes cannot be written to {self.folder.parent}: {error}; set ",
                Key("codes_dir"),
                ".",
            )

    def setup(self, stage: str | None = None) -> None:
        """Map the stored codes; within a Trainer, encode them first if they are missing.

        Raises:
            InputError: If the codes are damaged, or belong to another VQ-VAE or data set.
        """
        if self.datasets:
            return
        if self.trainer is not None:
            self.encode(self.trainer.strategy.root_device)
        found: dict[str, Any] = {}
        try:
            found = json.loads((self.folder / "header.json").read_text())
            arrays = {s: np.load(self.folder / f"{s}.npy", mmap_mode="r") for s in SPLITS}
            labels = {s: self._load_labels(s) for s in SPLITS}
        except (OSError, ValueError) as error:
            raise InputError(
                f"the codes in {self.folder} cannot be read ({error}): delete the folder to "
                "encode them again."
            ) from error
        if not isinstance(found, dict):
            raise InputError(
                f"{self.folder}/header.json is not a header: delete the folder to encode again."
            )
        found = {"codes_per_position": 1, **found}  # older headers lack the key
        for key, value in self.header.items():
            if found.get(key) != value:
                raise InputError(
                    f"the codes in {self.folder} were made for {key}={found.get(key)}, this run "
                    f"has {value}: delete the folder to encode them again."
                )
        for split, array in arrays.items():
            shape = (self.header["images"][split], *self.code_shape)
            if array.shape != shape or array.dtype != self.integer:
                raise InputError(
                    f"{self.folder}/{split}.npy has shape {array.shape} of {array.dtype}, not "
                    f"{shape} of {self.integer}: delete the folder to encode again."
                )
            self.datasets[split] = ArrayDataset(array, labels[split])

    def histogram(self) -> Tensor:
        """Count how often each code occurs in the training split, as `count_codes` does."""
        rows = self.datasets["train"].data
        counts = self.count_codes(torch.zeros(0, *self.code_shape, dtype=torch.int64))
        for start in range(0, len(rows), 8192):  # all rows as int64 may not fit in memory
            counts += self.count_codes(
                torch.from_numpy(rows[start : start + 8192].astype(np.int64))
            )
        return counts

    def count_codes(self, codes: Tensor) -> Tensor:
        """Count how often each code occurs in `codes` (B, h, w) or (B, h, w, Q) int64.

        Returns:
            Counts (K,) int64, or (Q, K) for several codes per position.
        """
        each, size = self.codes_per_position, self.num_codes
        if each == 1:
            return codes.flatten().bincount(minlength=size)
        numbers = (
            codes + torch.arange(each, device=codes.device) * size
        )  # no two codebooks share a number
        return numbers.flatten().bincount(minlength=each * size).view(each, size)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Convert codes to int64, on the device."""
        return Batch(batch.data.long(), batch.labels)

    def _encode(self, batch: Batch, device: torch.device) -> np.ndarray[Any, np.dtype[Any]]:
        with torch.inference_mode():
            codes = self.vqvae.to(device).encode(from_uint8(batch.data.to(device)))
        return codes.cpu().numpy().astype(self.integer)

    def _load_labels(self, split: str) -> Tensor | None:
        if not self.images.num_classes:
            return None
        labels = np.load(self.folder / f"{split}_labels.npy")
        wanted = (len(self.images.datasets[split]),)
        if labels.shape != wanted:
            raise ValueError(f"{split}_labels.npy has shape {labels.shape}, not {wanted}")
        return torch.from_numpy(labels)

    def _encode_part(self, partial: Path, rank: int, world: int, device: torch.device) -> None:
        """Write the bytes of this rank's codes and labels of each split."""
        partial.mkdir(parents=True, exist_ok=True)
        with show_progress("encoding", sum(self.header["images"].values())) as advance:
            for split in SPLITS:
                loader = self.images.batches(split)  # type: ignore[arg-type]
                rows = loader.rows()
                first = min((int(part[0]) for part in rows), default=0)
                with (
                    open(partial / f"{split}.{rank}.part", "wb") as codes,
                    open(partial / f"{split}_labels.{rank}.part", "wb") as labels,
                ):
                    # Seek, because with several workers the batches come out of order.
                    for part, batch in zip(rows, loader, strict=True):
                        encoded = self._encode(batch, device)
                        row = int(part[0]) - first
                        codes.seek(row * encoded[0].nbytes)
                        codes.write(encoded.tobytes())
                        if batch.labels is not None:
                            labels.seek(row * batch.labels[0].nbytes)
                            labels.write(batch.labels.numpy().tobytes())
                        advance(len(batch.data) * world)

    def _join_parts(self, partial: Path, world: int) -> None:
        """Join the parts of all ranks, write the header and rename the folder."""
        for split, total in self.header["images"].items():
            arrays: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = [
                (split, self.integer, (total, *self.code_shape))
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
            if not self.folder.is_dir():  # otherwise another run was first
                raise


def _catch_error(step: Callable[[], None]) -> str | None:
    """Run `step`; the text of the OSError that it raised, or None."""
    try:
        step()
    except OSError as error:
        return str(error)
    return None

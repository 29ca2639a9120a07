"""Pictures of reconstructions and samples during training."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import PixelDataModule
from vqvae_lightning.loggers.media import log_histogram, log_picture
from vqvae_lightning.networks.sampling import sample
from vqvae_lightning.pictures import arrange_grid, arrange_pairs, draw_code_maps
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.randomness import derive_seed

PICTURED = 20  # images in a picture of reconstructions


class ReconstructionPictures(Callback):
    """Shows validation images above their reconstructions and above their codes.

    An autoregressive decoder draws one sample for each image.
    Pictures are made after each validation. Loggers that show histograms also get the hits of each
    code in the validation split.

    Args:
        folder: Folder for the PNGs, which every logger gets too.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Make the pictures, in evaluation mode, so that the codebook does not change."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        data: PixelDataModule = trainer.datamodule  # type: ignore[attr-defined]
        images = data.datasets["val"].preview(PICTURED).data
        # The same each time, so that sampled pictures can be compared.
        generator = torch.Generator().manual_seed(derive_seed(0, "pictures"))
        with torch.no_grad():
            quantized = pl_module.net.quantize(from_uint8(images.to(pl_module.device)))
            decoded = pl_module.net.decode_vectors(quantized.vectors, generator)
        reconstructions = to_uint8(decoded).cpu()
        log_picture(trainer, "reconstructions", arrange_pairs(images, reconstructions), self.folder)
        codes = quantized.codes
        if codes is not None:
            log_picture(trainer, "codes", draw_code_maps(images, codes), self.folder)
        if pl_module.code_counts is not None:
            log_histogram(trainer, "val/codebook_histogram", pl_module.code_counts)


class SamplePictures(Callback):
    """Shows decoded samples of the prior after each validation, with one column per class.

    Args:
        folder: Folder for the PNGs, which every logger gets too.
        seed: Seed for sampling, the same each time, so that pictures can be compared.
        rows: Samples per class.
    """

    def __init__(self, folder: str, seed: int, rows: int = 4) -> None:
        self.folder = Path(folder)
        self.seed = seed
        self.rows = rows

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Sample while the averaged weights are still in place."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        net, data = pl_module.net, trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, CodesDataModule)
        columns = min(net.num_classes or 10, 10)
        count = columns * self.rows
        labels = torch.arange(count) % columns if net.num_classes else None
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "pictures"))
        codes = sample(net, (count, *data.grid), labels, generator=generator)
        with torch.no_grad():
            images = to_uint8(data.vqvae.to(codes.device).decode(codes, generator)).cpu()
        names = data.images.class_names[:columns] if net.num_classes else []
        parts = {name: arrange_grid(images[row::columns], 1) for row, name in enumerate(names)}
        log_picture(trainer, "samples", arrange_grid(images, columns), self.folder, parts)

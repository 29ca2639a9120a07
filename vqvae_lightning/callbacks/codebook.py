"""Codebook health: collapse and drift."""

import hashlib
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from vqvae_lightning.callbacks.counting import count_images
from vqvae_lightning.console import console
from vqvae_lightning.data.images import PixelDataModule
from vqvae_lightning.distributed import gather
from vqvae_lightning.errors import DivergenceError, check_positive, check_range
from vqvae_lightning.quantizers import GaussianBottleneck, SonnetEMAQuantizer, VectorQuantizer


class CollapseWarning(Callback):
    """Warns when few codes or latents are used for several validations, and suggests changes.

    Args:
        threshold: Smallest share of codes in use that does not count as collapse. For a variational
            autoencoder, the share of active latent channels.
        patience: Validations in a row below the threshold before the warning.

    Raises:
        InputError: If a value is outside its range.
    """

    def __init__(self, threshold: float = 0.3, patience: int = 2) -> None:
        self.threshold = check_range("threshold", threshold, 0, 1)
        self.patience = check_positive("patience", patience)
        self._below = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Check the metrics of this validation."""
        quantizer = pl_module.net.quantizer
        if trainer.sanity_checking or not getattr(quantizer, "initialised", True):
            return
        metrics = trainer.callback_metrics
        if "val/codebook_use" in metrics:
            data: PixelDataModule = trainer.datamodule  # type: ignore[attr-defined]
            rows, columns = pl_module.net.compute_grid(*data.image_shape[1:])
            books = quantizer.codes_per_position
            total = quantizer.num_codes * books
            # Few validation images cannot use all codes of a large codebook.
            seen = count_images(trainer, "val") * rows * columns * books
            use = float(metrics["val/codebook_use"]) * total / min(total, seen)
            what = f"{total} codes are in use"
            if seen < total:
                what = f"{seen} codes that the validation images could have are in use"
        elif "val/active_dims" in metrics:
            total = quantizer.code_dim
            use = float(metrics["val/active_dims"]) / total
            what = f"{total} latent channels are active"
        else:
            return
        self._below = self._below + 1 if use < self.threshold else 0
        if self._below == self.patience and trainer.is_global_zero:
            limit = f"callbacks.collapse.threshold={self.threshold:g}"
            console.print(
                f"warning: {use:.1%} of the {what}, below {limit} for {self.patience} "
                f"validations. Try {_suggest_changes(quantizer)}",
                highlight=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """Validations in a row below the threshold."""
        return {"below": self._below}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._below = state_dict["below"]


class CodebookDrift(Callback):
    """Logs how far the codebook moved, and checks that all ranks have the same codebook.

    `val/codebook_drift` is the mean distance that a row moved since the last validation, divided by
    the mean length of a row. It includes the jumps of revived rows. It should fall towards 0:
    the decoder learns to read codes that hold still.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Compare the rows with those of the last validation.

        Raises:
            DivergenceError: If the ranks' codebooks differ.
        """
        quantizer = pl_module.net.quantizer
        if trainer.sanity_checking or not isinstance(quantizer, VectorQuantizer):
            return
        rows = quantizer.table().detach().clone()
        # A hash of the bytes, because permuted rows have the same sum.
        digest = hashlib.sha256(rows.cpu().contiguous().numpy().data).hexdigest()
        if len(set(gather(digest))) > 1:
            raise DivergenceError(
                f"step {trainer.global_step}: the ranks' codebooks differ; was the quantizer "
                "called, or updated, on some ranks only?"
            )
        if self._last is not None and quantizer.initialised:
            moved = (rows - self._last.to(rows)).norm(dim=-1).mean()
            pl_module.log("val/codebook_drift", moved / rows.norm(dim=-1).mean())
        self._last = rows if quantizer.initialised else None

    def state_dict(self) -> dict[str, Any]:
        """The rows of the last validation."""
        return {"rows": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._last = state_dict["rows"]


def _suggest_changes(quantizer: Any) -> str:
    """Suggest options for the quantizer that make more codes be used."""
    key = "model.net.quantizer"
    if isinstance(quantizer, GaussianBottleneck):
        return f"a lower {key}.beta, or {key}.free_bits=0.05."
    if isinstance(quantizer, SonnetEMAQuantizer):  # it lacks the options below
        return f"quantizer=ema, or a smaller {key}.code_dim or num_codes."
    if not isinstance(quantizer, VectorQuantizer):
        return f"other {key}.options, or quantizer=ema."
    suggestions = []
    if quantizer.revive_below == 0:
        suggestions.append(f"{key}.revive_below=0.03")
    if quantizer.init == "uniform":
        suggestions.append(f"{key}.init=kmeans")
    if quantizer.warmup_steps < 100:
        suggestions.append(f"{key}.warmup_steps=200")
    return " or ".join([*suggestions, f"a smaller {key}.code_dim or num_codes."])

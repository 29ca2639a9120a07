"""Pictures and histograms in TensorBoard."""

import numpy as np
from pytorch_lightning.loggers import TensorBoardLogger

from vqvae_lightning.loggers.writer import Array, Histogram


class TensorBoardMedia:
    """Writes to a TensorBoard logger.

    Args:
        logger: Lightning's logger.
    """

    def __init__(self, logger: TensorBoardLogger) -> None:
        self.logger = logger

    def write_picture(
        self, name: str, picture: Array, step: int, parts: dict[str, Array] | None = None
    ) -> None:
        """Write the whole picture: TensorBoard shows no captions."""
        self.logger.experiment.add_image(name, picture, step, dataformats="HWC")

    def write_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Write the bars and the moments of the positions."""
        counts = histogram.counts
        positions = np.arange(len(counts))
        self.logger.experiment.add_histogram_raw(
            name,
            min=0.0,
            max=float(len(counts)),
            num=float(counts.sum()),
            sum=float((counts * positions).sum()),
            sum_squares=float((counts * positions**2).sum()),
            bucket_limits=histogram.edges[1:].tolist(),
            bucket_counts=histogram.bars.tolist(),
            global_step=step,
        )

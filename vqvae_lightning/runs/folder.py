"""The layout of a run's folder: the name of every file and folder in it."""

from pathlib import Path

STAGES = ("vqvae", "prior", "evaluation", "samples")
"""Stages of a pipeline, in order; each has a folder of this name in the pipeline's."""

CLAIM = ".claim"
SWEEP_CLAIM = ".sweep.claim"
"""Differs from a run's, because a sweep's folder may also be the folder of its only job."""
PREVIOUS_CHECKPOINT = "previous.ckpt"


class RunFolder:
    """Paths in the folder of a run, of a stage of a pipeline, or of a job of a sweep.

    A property is only a path: the file need not exist, and most runs have only some of them.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        """The whole resolved config, written when the run begins."""
        return self.path / "config.yaml"

    @property
    def result(self) -> Path:
        """Metrics and facts, written when the run has finished."""
        return self.path / "result.json"

    @property
    def metrics(self) -> Path:
        """Curves, one row per logged step."""
        return self.path / "metrics.csv"

    @property
    def seconds(self) -> Path:
        """How long an unfinished run has taken so far."""
        return self.path / "seconds.json"

    @property
    def failure(self) -> Path:
        """Why a job of a sweep failed."""
        return self.path / "failure.txt"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint with the best score."""
        return self.checkpoints / "best.ckpt"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint to resume from."""
        return self.checkpoints / "last.ckpt"

    @property
    def pictures(self) -> Path:
        """Folder of the pictures that are logged during training."""
        return self.path / "pictures"

    @property
    def code_cache(self) -> Path:
        """Folder of the data's codes under this run's VQ-VAE."""
        return self.path / "codes"

    @property
    def ranks(self) -> Path:
        """Folder of the config and the logs of the ranks that a command starts."""
        return self.path / "ranks"

    @property
    def codes(self) -> Path:
        """Histogram of the training codes, and codes of the pictured images of an evaluation."""
        return self.path / "codes.npz"

    @property
    def nearest_picture(self) -> Path:
        """Samples of an evaluation above their nearest training images."""
        return self.path / "nearest.png"

    @property
    def reconstructions(self) -> Path:
        """Images, their reconstructions and their codes."""
        return self.path / "reconstructions.npz"

    @property
    def reconstructions_picture(self) -> Path:
        """Images above their reconstructions."""
        return self.path / "reconstructions.png"

    @property
    def samples(self) -> Path:
        """New images, their codes and their labels."""
        return self.path / "samples.npz"

    @property
    def samples_picture(self) -> Path:
        """New images, a column per class, or originals and their completions."""
        return self.path / "samples.png"

    @property
    def report(self) -> Path:
        """The page of a pipeline or of a sweep."""
        return self.path / "report.html"

    @property
    def jobs(self) -> Path:
        """Table of the jobs of a sweep."""
        return self.path / "jobs.csv"

    @property
    def is_begun(self) -> bool:
        """Whether a run has begun here."""
        return self.config.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the run has a result."""
        return self.result.is_file()

    def stage(self, name: str) -> "RunFolder":
        """The folder of a stage of this pipeline."""
        return RunFolder(self.path / name)

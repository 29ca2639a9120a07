"""Lightning callbacks for checkpoints, pictures, codebook health and reproducibility."""

from vqvae_lightning.callbacks.averaging import AveragedWeights
from vqvae_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint, TimeKeeper
from vqvae_lightning.callbacks.codebook import CodebookDrift, CollapseWarning
from vqvae_lightning.callbacks.pictures import ReconstructionPictures, SamplePictures
from vqvae_lightning.callbacks.progress import StepProgress
from vqvae_lightning.callbacks.pruning import MedianPruning
from vqvae_lightning.callbacks.reproducibility import ConfigComparison, FinalValidation, SeedSteps

__all__ = [
    "AveragedWeights",
    "BestCheckpoint",
    "CodebookDrift",
    "CollapseWarning",
    "ConfigComparison",
    "FinalValidation",
    "LastCheckpoint",
    "MedianPruning",
    "ReconstructionPictures",
    "SamplePictures",
    "SeedSteps",
    "StepProgress",
    "TimeKeeper",
]

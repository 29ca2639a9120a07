"""Lightning callbacks: checkpoints, pictures, codebook health, reproducibility."""

from vqvae_lightning.callbacks.averaging import AveragedWeights
from vqvae_lightning.callbacks.checkpoints import BestCheckpoint, KeepTime, LastCheckpoint
from vqvae_lightning.callbacks.codebook import CodebookDrift, CollapseWarning
from vqvae_lightning.callbacks.pictures import ReconstructionPictures, SamplePictures
from vqvae_lightning.callbacks.progress import StepProgress
from vqvae_lightning.callbacks.pruning import MedianPruning
from vqvae_lightning.callbacks.reproducibility import FinalValidation, SameConfig, SeedSteps

__all__ = [
    "AveragedWeights",
    "BestCheckpoint",
    "CodebookDrift",
    "CollapseWarning",
    "FinalValidation",
    "KeepTime",
    "LastCheckpoint",
    "MedianPruning",
    "ReconstructionPictures",
    "SameConfig",
    "SamplePictures",
    "SeedSteps",
    "StepProgress",
]

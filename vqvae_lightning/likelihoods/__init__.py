"""What the decoder's output means: squared error, or a distribution over a pixel's 256 levels."""

from vqvae_lightning.likelihoods.categorical import Categorical
from vqvae_lightning.likelihoods.mixture import LogisticMixture
from vqvae_lightning.likelihoods.protocol import Likelihood, PixelDistribution, SquaredError
from vqvae_lightning.likelihoods.scaled import Gaussian, Logistic

__all__ = [
    "Categorical",
    "Gaussian",
    "Likelihood",
    "Logistic",
    "LogisticMixture",
    "PixelDistribution",
    "SquaredError",
]

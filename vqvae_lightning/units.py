"""Units of the logged metrics, and whether lower or higher is better."""

from typing import Literal

UNITS = {
    "accuracy": "share of codes predicted",
    "active_dims": "latent channels",
    "auxiliary": "1",
    "auxiliary_weighted": "1",
    "bits_per_code": "bits/code",
    "code_entropy_bits": "bits/code",
    "codebook": "squared latent value",
    "codebook_drift": "share of mean row length",
    "codebook_use": "share of codes",
    "codebook_weighted": "1",
    "commitment": "squared latent value",
    "commitment_weighted": "1",
    "dead_codes": "codes",
    "elbo_bits_per_dim": "bits/dim",
    "entropy_nats_per_code": "nats/code",
    "histogram_bits_per_dim": "bits/dim",
    "images": "images",
    "importance_bits_per_dim": "bits/dim",
    "kl": "nats per latent value",
    "kl_bits_per_dim": "bits/dim",
    "kl_clamped": "nats per latent value",
    "kl_clamped_weighted": "1",
    "kl_nats_dim": "nats per latent value",
    "kl_weighted": "1",
    "latent_power": "squared latent value",
    "learning_rate": "1",
    "loss": "1",
    "lpips_alex": "weighted squared distance of unit features",
    "mse": "squared pixel value in [0, 1]",
    "mse_unrounded": "squared pixel value in [0, 1]",
    "nats_per_code": "nats/code",
    "nll_nats_per_dim": "nats/dim",
    "nll_nats_per_dim_weighted": "1",
    "nmse": "mse / variance of training pixels",
    "perplexity": "codes",
    "perplexity_batch32": "codes, mean over batches of 32 images",
    "position_nats_per_code": "nats/code, histogram per position",
    "prior_bits_per_dim": "bits/dim",
    "psnr_db": "dB",
    "psnr_per_image_db": "dB, mean over images",
    "real_accuracy": "share of images",
    "reconstruction_accuracy": "share of images",
    "reconstruction_bits_per_dim": "bits/dim",
    "reconstruction_efficientnet_distance": "squared distance of unit features",
    "reconstruction_efficientnet_frechet": "squared distance of EfficientNet-Lite0 features",
    "reconstruction_fid": "squared distance of classifier features",
    "reconstruction_inception_fid": "squared distance of Inception features",
    "reconstruction_inception_kid": "squared discrepancy of Inception features",
    "revived_codes": "codes",
    "sample_accuracy": "share of images",
    "sample_efficientnet_frechet": "squared distance of EfficientNet-Lite0 features",
    "sample_efficientnet_precision": "share of samples",
    "sample_efficientnet_recall": "share of images",
    "sample_fid": "squared distance of classifier features",
    "sample_inception_fid": "squared distance of Inception features",
    "sample_inception_kid": "squared discrepancy of Inception features",
    "sample_inception_precision": "share of samples",
    "sample_inception_recall": "share of images",
    "ssim": "1",
    "total_bits_per_dim": "bits/dim",
    "unigram_nats_per_code": "nats/code",
    "uniform_bits_per_dim": "bits/dim",
    "uniform_nats_per_code": "nats/code",
}
"""Units by the last part of a metric's name, without a number at its end."""
LOWER = {
    "bits_per_code",
    "codebook",
    "commitment",
    "kl",
    "kl_clamped",
    "loss",
    "mse",
    "nats_per_code",
    "nll_nats_per_dim",
    "nmse",
    "prior_bits_per_dim",
}
HIGHER = {"accuracy", "active_dims", "codebook_use", "perplexity", "psnr_db"}
"""Validation metrics that can select the best run, by the last part of their name.

Lower is better for those in `LOWER`, and higher for those in `HIGHER`.
"""


def get_direction(name: str) -> Literal["min", "max"] | None:
    """Return whether the lowest or highest value of a metric such as `val/nmse` is the best."""
    last = name.rpartition("/")[2]
    if last in HIGHER:
        return "max"
    return "min" if last in LOWER else None


def get_unit(name: str) -> str:
    """Return the unit of a metric such as `val/kl_nats_dim7`, `unknown` for a user's own."""
    last = name.rpartition("/")[2]
    return UNITS.get(last) or UNITS.get(last.rstrip("0123456789"), "unknown")

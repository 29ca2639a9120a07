"""A small VQ-VAE and prior on images whose splits differ, to measure on one rank or several."""

from types import SimpleNamespace

import numpy as np
import scipy.linalg
import torch
from torch import nn

from vqvae_lightning.data import CodesDataModule, ImageDataModule
from vqvae_lightning.data.sources import Split, Splits
from vqvae_lightning.evaluation.likelihood import measure_likelihood
from vqvae_lightning.evaluation.reconstruction import measure_reconstruction
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.quantizers import EMAQuantizer

CPU = torch.device("cpu")
SIZES = {"train": 60, "val": 21, "test": 70}
NUM_CODES = 16


class TinyFeatures(nn.Module):
    """Two maps and three features of an image."""

    num_features = 3

    def forward(self, levels):
        return self.compute_features(levels)[1]

    def compute_features(self, levels):
        images = levels.float() / 255
        maps = [images, images.square()[:, :, ::2, ::2]]
        return maps, torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)[:, [0, 1, 3]]


def compute_frechet(one, other):
    """Fréchet distance (arXiv:1706.08500, equation 6) of features (N, D)."""
    mean = one.mean(0) - other.mean(0)
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return (mean**2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)


def compute_coverage(points, centres, count=3):
    """Share of points within the radius of a centre, from a search over all pairs."""
    covered = 0
    for point in points:
        hits = []
        for centre in centres:
            near = sorted(np.sqrt(((centres - centre) ** 2).sum(1)))[count]
            hits.append(np.sqrt(((point - centre) ** 2).sum()) <= near)
        covered += any(hits)
    return covered / len(points)


def make_images(split):
    """Make colour images of 16x20; each split has its own brightness and noise."""
    middle, noise = {"train": (90, 20), "val": (128, 45), "test": (170, 12)}[split]
    generator = np.random.default_rng(len(split))
    levels = generator.normal(middle, noise, (SIZES[split], 3, 16, 20))
    # Coarse shapes, which a code can tell, and channels of unlike contrast.
    coarse = generator.normal(0, 40, (SIZES[split], 3, 4, 5)).repeat(4, 2).repeat(4, 3)
    levels += coarse * np.array([1.0, 0.5, 0.2])[:, None, None]
    labels = torch.arange(SIZES[split]) % 3
    return Split(torch.from_numpy(levels.clip(0, 255).astype(np.uint8)), labels)


def make_image_data():
    """Make the three splits, evaluated in batches of 8 images, of which the last is smaller."""
    splits = Splits(*[make_images(split) for split in SIZES], ["a", "b", "c"])
    source = SimpleNamespace(load=lambda: splits, prepare=lambda: None)
    data = ImageDataModule(source, batch_size=12, eval_batch_size=8)
    data.setup()
    return data


def make_vqvae(data):
    """Make an untrained VQ-VAE whose codebook has encoder vectors of training and test images."""
    torch.manual_seed(1)
    quantizer = EMAQuantizer(NUM_CODES, 4, init="uniform", warmup_steps=0)
    net = VQVAE(quantizer, 3, hidden=8, residual_blocks=1, residual_hidden=4).eval()
    with torch.no_grad():
        # Untrained weights are small: scaled, so that a reconstruction depends on its codes, and
        # some of its values leave [-1, 1].
        for name, parameter in net.named_parameters():
            parameter.mul_(0 if name.endswith("bias") else 3)
        train, test = (
            net.encoder(from_uint8(data.datasets[split].data)).movedim(1, -1).reshape(-1, 4)
            for split in ("train", "test")
        )
        quantizer.codebook[:10] = train[:: len(train) // 10][:10]
        # The test vectors farthest from all training vectors: codes that training never uses.
        quantizer.codebook[10:14] = test[torch.cdist(test, train).amin(1).topk(4).indices]
        quantizer.codebook[14:] = 1000.0  # never chosen
    return net


def make_prior(codes):
    """Make an untrained, conditional prior."""
    torch.manual_seed(2)
    net = PixelCNN(NUM_CODES, *codes.grid, 3, channels=8, layers=3, first_kernel=3, dropout=0.0)
    return net.eval()


def make_codes_data(folder):
    """Encode the toy images into `folder`, and load their codes."""
    data = make_image_data()
    codes = CodesDataModule(data, make_vqvae(data), "hash", str(folder), 12)
    codes.encode(CPU)
    codes.setup()
    return codes


def measure(folder, split="test"):
    """Measure everything that `evaluation` measures on a split without drawing samples."""
    codes = make_codes_data(folder)
    return {
        **measure_reconstruction(codes, split, CPU),
        **measure_likelihood(codes, make_prior(codes), split, CPU),
    }

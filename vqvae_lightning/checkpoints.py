"""Load networks from checkpoints, without Lightning or Hydra and without running foreign code."""

import hashlib
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vqvae_lightning.errors import InputError
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.trust import NETWORKS, Trust

KINDS: dict[str, type[nn.Module]] = {"vqvae": VQVAE, "prior": PixelCNN}


class Loaded(NamedTuple):
    """Result of `load`."""

    net: Any
    """A `VQVAE` or `PixelCNN` in evaluation mode, without gradients."""
    config: dict[str, Any]
    """The complete resolved config of its run."""


def load(path: str | Path, kind: str | None = None, trust: str | Iterable[str] = ()) -> Loaded:
    """Rebuild the network in a checkpoint from the config that the checkpoint contains.

    Args:
        path: Checkpoint of `vqvae-train` or `vqvae-pipeline`.
        kind: Required kind of network, `vqvae` or `prior`, None for either.
        trust: Packages besides this one whose classes the checkpoint may name, such as
            `["my_package"]`. Their code runs.

    Raises:
        InputError: If the file is missing, truncated, not written by this package, of another kind,
            or names code that is neither a network of `vqvae_lightning` nor in `trust`.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path} does not exist.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["hyper_parameters"]
        weights = checkpoint["state_dict"]
        settings = config["model"]["net"]
        own = {k.removeprefix("net."): v for k, v in weights.items() if k.startswith("net.")}
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"checkpoint {path} is damaged or not a checkpoint: {reason}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"checkpoint {path} was not written by vqvae_lightning.") from error
    net = Trust(f"checkpoint {path}", trust, NETWORKS).build(settings, "model.net")
    found = next((name for name, cls in KINDS.items() if isinstance(net, cls)), "unknown")
    if not isinstance(net, nn.Module) or kind not in (None, found):
        raise InputError(f"checkpoint {path} holds a {found}, not a {kind or 'network'}.")
    try:
        net.load_state_dict(own)
    except RuntimeError as error:
        raise InputError(
            f"checkpoint {path}: its weights do not fit its config: {error}"
        ) from error
    return Loaded(net.eval().requires_grad_(False), config)


def load_pair(
    prior_path: str | Path,
    vqvae_path: str | Path | None = None,
    trust: str | Iterable[str] = (),
) -> tuple[Loaded, Loaded]:
    """Load a prior and the VQ-VAE whose codes it was trained on.

    Args:
        prior_path: Checkpoint of the prior.
        vqvae_path: Checkpoint of the VQ-VAE, None for the path in the prior's config.
        trust: Packages besides this one whose classes the checkpoints may name.

    Raises:
        InputError: If a checkpoint cannot be loaded (see `load`), or the VQ-VAE is neither the one
            that the prior was trained with nor a decoder trained on its codes.
    """
    prior = load(prior_path, "prior", trust)
    vqvae_path = vqvae_path or prior.config["vqvae_checkpoint"]
    if not Path(vqvae_path).is_file():
        raise InputError(
            f"prior {prior_path} needs its VQ-VAE, which is not at {vqvae_path}: set "
            "vqvae_checkpoint=PATH."
        )
    vqvae = load(vqvae_path, "vqvae", trust)
    found, wanted = hash_weights(vqvae.net), prior.config["vqvae_hash"]
    # A decoder that was trained on kept codes has another hash, but the codes are the same.
    if wanted not in (found, vqvae.config.get("vqvae_hash")):
        raise InputError(
            f"prior {prior_path} was trained on the codes of VQ-VAE {wanted}, but "
            f"vqvae_checkpoint={vqvae_path} "
            f"is {found}: its codes mean something else."
        )
    return prior, vqvae


def hash_weights(net: nn.Module) -> str:
    """Return 16 hexadecimal digits that change with any weight or buffer of `net`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

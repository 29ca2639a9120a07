"""Keep the trained classifier of a data set, so that later evaluations need not train it."""

import copy
import hashlib
import inspect
import json
import pickle
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import vqvae_lightning.callbacks.reproducibility
import vqvae_lightning.data.images
import vqvae_lightning.evaluation.classifier
import vqvae_lightning.networks.classifier
import vqvae_lightning.pixels
import vqvae_lightning.randomness
import vqvae_lightning.tasks.classifier
import vqvae_lightning.tasks.optimization
from vqvae_lightning.checkpoints import hash_weights
from vqvae_lightning.console import print_line
from vqvae_lightning.data.images import ImageDataModule, PixelDataModule
from vqvae_lightning.errors import join_lines
from vqvae_lightning.evaluation.classifier import train_classifier
from vqvae_lightning.files import replace_file
from vqvae_lightning.tasks.classifier import ClassifierTask
from vqvae_lightning.trust import find_foreign

if TYPE_CHECKING:
    from vqvae_lightning.networks.classifier import Classifier

MODULES = (
    vqvae_lightning.callbacks.reproducibility,
    vqvae_lightning.data.images,
    vqvae_lightning.evaluation.classifier,
    vqvae_lightning.networks.classifier,
    vqvae_lightning.pixels,
    vqvae_lightning.randomness,
    vqvae_lightning.tasks.classifier,
    vqvae_lightning.tasks.optimization,
)
"""Modules whose code decides how the classifier is trained."""


def fetch_classifier(
    task: ClassifierTask,
    images: PixelDataModule,
    config: dict[str, Any],
    trainer_options: dict[str, Any],
    batch_size: int,
    folder: str | None,
    device: torch.device,
) -> "Classifier":
    """Read the trained classifier from `folder`, or train it and store it there.

    A stored classifier is used only if training would give the same one: same images, initial
    weights, settings, code, versions and kind of machine. Data sets other than `ImageDataModule`
    and settings that name foreign code are never stored, because their batches or their code may
    change without notice. A damaged file is replaced, and a folder that cannot be written to only
    costs the time of training; one line says so.

    Args:
        task: Untrained task.
        images: Images, set up.
        config: Config of the task.
        trainer_options: Arguments of Lightning's Trainer, including `max_steps`.
        batch_size: Images per step.
        folder: Folder of the stored classifiers; None to train in any case.
        device: Device that the Trainer uses.

    Returns:
        The network in evaluation mode; its parameters need no gradients.
    """
    if folder is None or type(images) is not ImageDataModule or find_foreign(config):
        return train_classifier(task, images, trainer_options, batch_size)
    recipe = describe_recipe(task, images, config, trainer_options, batch_size)
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    path = Path(folder) / f"{images.fingerprint}-{digest}.pt"
    if path.is_file():
        try:
            return _load(copy.deepcopy(task.net), path, recipe).to(device)
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError) as error:
            print_line(f"classifier {path} is damaged, so it is trained again: {join_lines(error)}")
        except pickle.UnpicklingError:
            print_line(
                f"classifier {path} is damaged, so it is trained again: it is not plain weights"
            )
    net = train_classifier(task, images, trainer_options, batch_size)
    stored = {
        "recipe": recipe,
        "hash": hash_weights(net),
        "weights": {name: value.cpu() for name, value in net.state_dict().items()},
    }
    try:
        with replace_file(path) as partial:
            torch.save(stored, partial)
    except OSError as error:
        print_line(f"warning: classifier_cache={folder} cannot be written to: {join_lines(error)}")
    return net


def describe_recipe(
    task: ClassifierTask,
    images: ImageDataModule,
    config: dict[str, Any],
    trainer_options: dict[str, Any],
    batch_size: int,
) -> str:
    """Describe, as JSON, everything that decides the trained weights.

    The number of threads and the instructions of the processor are part of it, because sums on a
    CPU depend on both in their last bits.
    """
    code = hashlib.sha256("".join(map(inspect.getsource, MODULES)).encode())
    cuda = torch.cuda.is_available()
    facts = {
        "data": images.fingerprint,
        "order": images.seed,
        "flip": images.flip,
        "initial_weights": hash_weights(task.net),
        "config": config,
        "trainer": trainer_options,
        "batch_size": batch_size,
        "code": code.hexdigest(),
        "versions": {
            name: version(name) for name in ("vqvae-lightning", "torch", "pytorch-lightning")
        },
        "machine": [
            platform.machine(),
            torch.backends.cpu.get_cpu_capability(),
            torch.get_num_threads(),
            torch.cuda.get_device_name() if cuda else None,
        ],
    }
    return json.dumps(facts, sort_keys=True)


def _load(net: "Classifier", path: Path, recipe: str) -> "Classifier":
    """Load stored weights; raises an error if the file is not what `fetch_classifier` wrote."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if stored["recipe"] != recipe:
        raise ValueError("it belongs to another recipe")
    net.load_state_dict(stored["weights"])
    # Reading a checkpoint does not notice a changed byte.
    if hash_weights(net) != stored["hash"]:
        raise ValueError("its weights have changed")
    return net.eval().requires_grad_(False)

"""What a run is going to be, before its first step: sizes, memory, data, and what cannot work."""

import copy
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqvae_lightning.checks import check_types
from vqvae_lightning.data import CodesDataModule
from vqvae_lightning.data.images import StageDataModule, check_divides
from vqvae_lightning.devices import measure_available_memory
from vqvae_lightning.errors import (
    InputError,
    Key,
    check_positive,
    check_range,
    prefix_keys,
    rename_keys,
)
from vqvae_lightning.jobs.ranks import count_ranks
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.quantizers import VectorQuantizer
from vqvae_lightning.units import get_direction

PROBED = 2  # images in the batch on which activations are measured
CHECKPOINTS = 4  # best, last, the one before, and the one being written
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Survey(NamedTuple):
    """What `survey` found."""

    facts: dict[str, str]
    """Name and text of each, in reading order."""
    warnings: list[str]
    """What will work, but probably not as meant."""

    @property
    def line(self) -> str:
        """The facts in short, for the start of every run."""
        facts = self.facts
        return (
            f"{facts['devices']}, batch {facts['batch']}; {facts['parameters']} parameters, "
            f"{facts['memory']}; {facts['codes']}; checkpoints of {facts['checkpoints']}"
        )


def check_monitor(monitor: str, task: Any, data: StageDataModule) -> None:
    """Refuse a score that no validation of the stage logs, or that has no best value.

    Args:
        monitor: Its name, such as `val/nmse`.
        task: The `VQVAETask` or `PriorTask`.
        data: The data of the stage.

    Raises:
        InputError: With the names that can be chosen, and which of their values is the best.
    """
    codes = isinstance(data, CodesDataModule)
    grid = data.grid if codes else task.net.compute_grid(*data.image_shape[1:])  # type: ignore[attr-defined]
    names = sorted(task.list_validation_metrics(grid))
    known = {name: best for name in names if (best := get_direction(name))}
    if monitor not in known:
        accepted = ", ".join(f"{name} ({best})" for name, best in known.items())
        raise InputError(Key("monitor"), f"={monitor} must be one of {accepted}.")


def check_trainer(trainer: Any) -> None:
    """Refuse values of `conf/trainer` that Lightning takes, or refuses without naming the key.

    Raises:
        InputError: With the key.
    """
    check_types(trainer)
    with prefix_keys("trainer"):
        for name in ("log_every_n_steps", "accumulate_grad_batches"):
            check_positive(name, trainer[name])
        for name in ("max_steps", "max_epochs"):
            if trainer[name] not in (-1, None):
                check_range(name, trainer[name], 1)
        if trainer.gradient_clip_val is not None:
            check_range("gradient_clip_val", trainer.gradient_clip_val, 0)
        check_range("num_sanity_val_steps", trainer.num_sanity_val_steps, -1)
        for split in ("train", "val", "test"):
            _check_limit(f"limit_{split}_batches", trainer[f"limit_{split}_batches"])
        every = trainer.val_check_interval
        if trainer.check_val_every_n_epoch is None:
            # A text is a time between validations, which Lightning reads.
            if not isinstance(every, str):
                check_positive("val_check_interval", every)
            return
        check_positive("check_val_every_n_epoch", trainer.check_val_every_n_epoch)
        if isinstance(every, float) or every is None:  # a share of the epoch
            check_range("val_check_interval", 1.0 if every is None else every, 1e-9, 1)
        elif not isinstance(every, str):
            check_positive("val_check_interval", every)


def _check_limit(name: str, limit: object) -> None:
    """Refuse what is neither a number of batches (an integer) nor a share of them (a float)."""
    if limit is None or (isinstance(limit, float) and 0 <= limit <= 1):
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise InputError(
            Key(name), f"={limit} must be a number of batches, or a share of them as in 0.5."
        )


def survey(cfg: Any, net: nn.Module, data: StageDataModule, optimizer_states: float) -> Survey:
    """Look a stage over, before any of its steps.

    Args:
        cfg: The stage's config, with what the data decide filled in.
        net: The network built from it.
        data: The stage's data, set up, but for the codes of a prior, which may not be made yet.
        optimizer_states: Values that the optimizer keeps per value of a parameter.

    Raises:
        InputError: If it cannot work: a batch that does not divide over the devices, a state larger
            than the device, checkpoints larger than what is free on the disk, a precision that the
            device has not got.
    """
    images = data.images if isinstance(data, CodesDataModule) else data
    sizes = {split: len(images.datasets[split]) for split in ("train", "val", "test")}
    shape = images.image_shape  # type: ignore[attr-defined]
    ranks, nodes = count_ranks(cfg.trainer), int(cfg.trainer.num_nodes)
    world = ranks * nodes
    batch = data.batch_size
    check_divides(data.batch_size_key, batch, world)
    for split in ("val", "test"):
        if sizes[split] < world:
            raise InputError(
                Key("trainer.devices"),
                f"={cfg.trainer.devices}: the {split} split has {sizes[split]} images for {world} "
                "devices, and each device needs one.",
            )
    device = _device(cfg.trainer, ranks)
    if cfg.compile and device == "cpu" and not _cpp_compiler():
        raise InputError("compile=true needs a C++ compiler on a CPU: install g++, or set CXX.")
    warnings: list[str] = []

    with rename_keys(lambda key: {"size": images.size_key}.get(key, key)):  # type: ignore[attr-defined]
        codes, found = _codes(net, data, shape, batch, sizes["train"])
    warnings += found
    parameters = sum(p.numel() for p in net.parameters())
    weights = _bytes(net.state_dict().values())
    states = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    optimizer = round(states * optimizer_states)
    averages = cfg.callbacks.average is not None if "average" in cfg.callbacks else False
    pool = _pool(net)
    fixed = weights * (2 if averages else 1) + optimizer + states * (2 if world > 1 else 1) + pool
    local = batch // world
    step = batch * cfg.trainer.accumulate_grad_batches
    training = local * _activations(net, data, cfg.trainer.precision)
    evaluated = min(data.eval_batch_size, max(sizes["val"], sizes["test"]))
    validating = -(-evaluated // world) * _logits(net, data)
    running = max(training, validating)
    held = images.memory  # type: ignore[attr-defined]
    free_memory = measure_available_memory()
    copies = held * (ranks - 1)  # this process has its own already
    room, where = _room(device, ranks, max(0, free_memory - copies))
    if copies > free_memory:
        warnings.append(
            f"the images take {_size(held)} in each of {ranks} processes, and this machine has "
            f"{_size(free_memory)} left for them."
        )
    mapped = images.mapped  # type: ignore[attr-defined]
    if mapped > free_memory:
        warnings.append(
            f"the images take {_size(mapped)} and this machine has {_size(free_memory)} left: each "
            "epoch reads them from the disk."
        )
    if fixed > room:
        raise InputError(
            f"weights, gradients and optimizer take {_size(fixed)}, but {where} has "
            f"{_size(room)}: choose a smaller model.net.hidden, channels or num_codes."
        )
    if fixed + running > room:
        larger = data.batch_size_key if training >= validating else "dataset.eval_batch_size"
        warnings.append(
            f"about {_size(fixed + running)} are needed and {where} has {_size(room)}: choose a "
            f"smaller {larger}, or more devices."
        )
    checkpoint = weights * (2 if averages else 1) + optimizer
    largest = checkpoint + pool  # within the warm-up
    free = shutil.disk_usage(_existing(Path(cfg.folder))).free
    # Those that are there already, of a run that goes on, will be replaced.
    written = sum(path.stat().st_size for path in Path(cfg.folder, "checkpoints").glob("*.ckpt"))
    if CHECKPOINTS * largest > free + written:
        raise InputError(
            f"{CHECKPOINTS} checkpoints of {_size(largest)} do not fit into the {_size(free)} "
            f"that are free at {cfg.folder}: set hydra.run.dir to another disk."
        )
    steps = cfg.trainer.max_steps
    places = f" on each of {nodes} nodes" if nodes > 1 else ""
    compiled = ", compiled" if cfg.compile else ""
    each = f" ({local} each)" if world > 1 else ""
    facts = {
        "devices": f"{ranks} x {device}{places}, {cfg.trainer.precision}{compiled}",
        "batch": f"{batch}{each}",
        "parameters": f"{parameters:,}",
        "memory": f"{_size(fixed + running)} per device",
        "codes": codes,
        "data": f"{sizes['train']:,} train, {sizes['val']:,} val, {sizes['test']:,} test images of "
        f"{'x'.join(map(str, shape))}, {len(images.class_names) or 'no'} classes, fingerprint "  # type: ignore[attr-defined]
        f"{images.fingerprint}, {_kept(images)}",  # type: ignore[attr-defined]
        "length": f"{steps:,} steps, {steps * step / sizes['train']:.1f} epochs"
        if steps > 0
        else f"{cfg.trainer.max_epochs} epochs",
        "checkpoints": f"{_size(checkpoint)}, {_size(free)} free",
    }
    return Survey(facts, warnings)


def _codes(
    net: nn.Module, data: StageDataModule, shape: tuple[int, int, int], batch: int, total: int
) -> tuple[str, list[str]]:
    """The latent grid against what sees it, and the codes of a batch against K."""
    if isinstance(net, PixelCNN):
        assert isinstance(data, CodesDataModule)
        rows, columns = data.grid
        layers, needed = len(net.layers), net.layers_needed
        text = f"{rows}x{columns} codes of {net.num_codes}, seen by {needed} of {layers} layers"
        if needed <= layers:
            return text, []
        warning = (
            f"model.net.layers={layers} leaves some of the {rows}x{columns} codes unseen; "
            f"{needed} layers see all."
        )
        return f"{rows}x{columns} codes of {net.num_codes}, not all seen", [warning]
    assert isinstance(net, VQVAE)
    rows, columns = net.compute_grid(*shape[1:])
    seen = net.encoder.receptive_field
    grid = f"{rows}x{columns} %s, each sees {seen}x{seen} pixels"
    quantizer = net.quantizer
    if not quantizer.num_codes:
        return grid % f"vectors of {quantizer.code_dim}", []
    positions = rows * columns
    warnings = []
    if quantizer.num_codes > total * positions:
        warnings.append(
            f"model.net.quantizer.num_codes={quantizer.num_codes} cannot all be used: the {total} "
            f"training images have {total * positions} codes."
        )
    share = batch * positions / quantizer.num_codes
    text = f"{grid % f'codes of {quantizer.num_codes}'}, {share:.3g} per code and step"
    if share < 0.1:
        warnings.append(
            f"a step has {batch * positions} codes for model.net.quantizer.num_codes="
            f"{quantizer.num_codes}: each is hit every {1 / share:.0f} steps at best; choose a "
            f"larger {data.batch_size_key}."
        )
    return text, warnings


def _activations(net: nn.Module, data: StageDataModule, precision: str) -> int:
    """Bytes per image that a training step keeps for the backward pass, measured on a copy."""
    probe = copy.deepcopy(net).train()
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*probe.parameters(), *probe.buffers())}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs: tuple[Tensor, ...]
    if isinstance(net, PixelCNN):
        assert isinstance(data, CodesDataModule)
        labels = [torch.zeros(PROBED, dtype=torch.long)] if net.num_classes else []
        inputs = (torch.zeros(PROBED, *data.grid, dtype=torch.long), *labels)
    else:
        inputs = (torch.zeros(PROBED, *data.image_shape),)  # type: ignore[attr-defined]
    with (
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        output = probe(*inputs)
    del output  # kept until here, so that no storage is counted twice under one address
    return sum(kept.values()) // PROBED


def _kept(images: Any) -> str:
    """How the images are at hand."""
    if images.mapped:
        return f"{_size(images.mapped)} mapped from a file"
    return f"{_size(images.memory)} in memory" if images.memory else "read as a stream"


def _pool(net: nn.Module) -> int:
    """Bytes of the vectors that the warm-up gathers for the first codebook, at most."""
    quantizer = getattr(net, "quantizer", None)
    if not isinstance(quantizer, VectorQuantizer):
        return 0
    vector = quantizer.code_dim * quantizer.codebook.element_size() + 8  # and a random number
    return quantizer.pool_rows * vector


def _logits(net: nn.Module, data: StageDataModule) -> int:
    """Bytes per image of a prior's logits in validation; twice, for the loss takes their logarithm.

    Training keeps its own, which `_activations` counts.
    """
    if not isinstance(net, PixelCNN):
        return 0
    assert isinstance(data, CodesDataModule)
    return 2 * 4 * net.num_codes * math.prod(data.grid)


def _device(trainer: Any, ranks: int) -> str:
    """Name of a device, and whether there are as many and they have the precision.

    Raises:
        InputError: If not.
    """
    if trainer.accelerator not in ("gpu", "cuda"):
        if trainer.precision == "16-mixed":
            raise InputError(
                Key("trainer.precision"),
                f"=16-mixed: accelerator {trainer.accelerator} has no float16 training; choose "
                "bf16-mixed or 32-true.",
            )
        return str(trainer.accelerator)
    present = torch.cuda.device_count()
    if ranks > present:
        said = f"={ranks} must be at most {present}, the GPUs of this machine."
        raise InputError(Key("trainer.devices"), said)
    if trainer.precision == "bf16-mixed" and not torch.cuda.is_bf16_supported(False):
        raise InputError(
            Key("trainer.precision"),
            f"=bf16-mixed: {torch.cuda.get_device_name()} has no bfloat16; choose 16-mixed or "
            "32-true.",
        )
    return torch.cuda.get_device_name()


def _cpp_compiler() -> str | None:
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else ["g++", "clang++", "c++"]
    return next((name for name in names if shutil.which(name)), None)


def _room(device: str, ranks: int, free_memory: int) -> tuple[int, str]:
    """Bytes for each rank, and of what."""
    if device == "cpu" or not torch.cuda.is_available():
        return free_memory // ranks, "this machine (a rank's share)"
    return torch.cuda.mem_get_info()[1], device


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _size(count: float) -> str:
    """A number of bytes for people, in decimal units."""
    for power, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= power:
            return f"{count / power:.3g} {name}" if count < 1e12 else f"{count / power:,.0f} {name}"
    return f"{count / 1e3:.3g} kB"

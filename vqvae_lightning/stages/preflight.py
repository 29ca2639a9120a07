"""Check a stage before its first step, and describe its sizes, memory, data and codes."""

import copy
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vqvae_lightning.checks import check_types
from vqvae_lightning.data import CodesDataModule
from vqvae_lightning.data.images import PixelDataModule, StageDataModule, check_divides
from vqvae_lightning.devices import measure_available_memory
from vqvae_lightning.errors import (
    InputError,
    Key,
    Message,
    check_positive,
    check_range,
    prefix_keys,
    rename_keys,
)
from vqvae_lightning.jobs.ranks import count_ranks
from vqvae_lightning.likelihoods.protocol import LEVELS
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.quantizers import VectorQuantizer
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.units import get_direction

if TYPE_CHECKING:
    from vqvae_lightning.tasks import PriorTask, VQVAETask

PROBED = 2  # number of images in the batch on which activations are measured
CHECKPOINTS = 4  # best, last, the previous one, and the one being written
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Survey(NamedTuple):
    """Result of `survey`."""

    facts: dict[str, str]
    """Name and text of each fact, in reading order."""
    warnings: list[Message]
    """What works, but probably not as intended."""

    @property
    def line(self) -> str:
        """The facts in one line, which every run prints at its start."""
        facts = self.facts
        return (
            f"{facts['devices']}, batch {facts['batch']}; {facts['parameters']} parameters, "
            f"{facts['memory']}; {facts['codes']}; checkpoints of {facts['checkpoints']}"
        )

    def rename_keys(self, rename: Callable[[str], str]) -> "Survey":
        """Return the same survey with `rename` applied to each key in its warnings."""
        return self._replace(warnings=[warning.rename_keys(rename) for warning in self.warnings])


def check_monitor(monitor: str, task: "VQVAETask | PriorTask", data: StageDataModule) -> None:
    """Check that validation logs the monitored metric, and that the metric has a best value.

    Args:
        monitor: Name of the metric, such as `val/nmse`.
        task: Task of the stage.
        data: Data of the stage, set up.

    Raises:
        InputError: If not; the message lists the accepted names and whether their minimum or
            maximum is best.
    """
    if isinstance(data, CodesDataModule):
        grid = data.grid
    else:
        shape = _get_images(data).image_shape
        grid = cast("VQVAETask", task).net.compute_grid(*shape[1:])
    names = sorted(task.list_validation_metrics(grid))
    known = {name: best for name in names if (best := get_direction(name))}
    if monitor not in known:
        accepted = ", ".join(f"{name} ({best})" for name, best in known.items())
        raise InputError(Key("monitor"), f"={monitor} must be one of {accepted}.")


def check_trainer(trainer: DictConfig) -> None:
    """Check the values of `conf/trainer`.

    Lightning accepts some bad values, and does not name the key of others.

    Raises:
        InputError: If a value is bad; the message names its key.
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
            # A string is the time between validations, which Lightning parses.
            if not isinstance(every, str):
                check_positive("val_check_interval", every)
            return
        check_positive("check_val_every_n_epoch", trainer.check_val_every_n_epoch)
        if isinstance(every, float) or every is None:  # share of an epoch
            check_range("val_check_interval", 1.0 if every is None else every, 1e-9, 1)
        elif not isinstance(every, str):
            check_positive("val_check_interval", every)


def has_end(trainer: DictConfig) -> bool:
    """Whether the trainer stops by itself; Lightning trains 1000 epochs if both limits are null."""
    return trainer.max_steps not in (-1, None) or trainer.max_epochs != -1


def _check_limit(name: str, limit: object) -> None:
    """Check that a limit is a number of batches (an integer) or a share of them (a float)."""
    if limit is None or (isinstance(limit, float) and 0 <= limit <= 1):
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise InputError(
            Key(name), f"={limit} must be a number of batches, or a share of them such as 0.5."
        )


def survey(
    cfg: DictConfig, net: nn.Module, data: StageDataModule, optimizer_states: float
) -> Survey:
    """Inspect a stage before its first step.

    Args:
        cfg: Config of the stage, with the sizes that the data decide filled in.
        net: Network built from the config.
        data: Data of the stage, set up. The codes of a prior may not be encoded yet.
        optimizer_states: Number of values that the optimizer keeps per trained value.

    Raises:
        InputError: If the stage cannot work: the batch does not divide over the devices, its state
            does not fit on the device or its checkpoints on the disk, or the device lacks the
            precision.
    """
    images = _get_images(data)
    sizes = {split: len(images.datasets[split]) for split in ("train", "val", "test")}
    shape = images.image_shape
    ranks, nodes = count_ranks(cfg.trainer), int(cfg.trainer.num_nodes)
    world = ranks * nodes
    batch = data.batch_size
    check_divides(data.batch_size_key, batch, world)
    for split in ("val", "test"):
        if sizes[split] < world:
            raise InputError(
                Key("trainer.devices"),
                f"={cfg.trainer.devices}: the {split} split has {sizes[split]} images for {world} "
                "devices, but each device needs at least one.",
            )
    device = _check_device(cfg.trainer, ranks)
    if cfg.compile and device == "cpu" and not _find_cpp_compiler():
        raise InputError("compile=true needs a C++ compiler on a CPU: install g++, or set CXX.")
    warnings: list[Message] = []

    with rename_keys(lambda key: {"size": images.size_key}.get(key, key)):
        codes, found = _describe_codes(net, data, shape, batch, sizes["train"])
    warnings += found
    parameters = sum(p.numel() for p in net.parameters())
    weights = _count_bytes(net.state_dict().values())
    states = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    optimizer = round(states * optimizer_states)
    averages = cfg.callbacks.get("average") is not None
    pool = _count_pool_bytes(net)
    fixed = weights * (2 if averages else 1) + optimizer + states * (2 if world > 1 else 1) + pool
    local = batch // world
    step = batch * cfg.trainer.accumulate_grad_batches
    training = local * _measure_activations(net, data, cfg.trainer.precision)
    evaluated = min(data.eval_batch_size, max(sizes["val"], sizes["test"]))
    validating = -(-evaluated // world) * _count_logit_bytes(net, data)
    running = max(training, validating)
    held = images.memory
    free_memory = measure_available_memory()
    copies = held * (ranks - 1)  # this process has loaded its copy
    room, where = _measure_room(device, ranks, max(0, free_memory - copies))
    if copies > free_memory:
        warnings.append(
            Message(
                f"the images take {_format_bytes(held)} in each of {ranks} processes, but this "
                f"machine has only {_format_bytes(free_memory)} left."
            )
        )
    mapped = images.mapped
    if mapped > free_memory:
        warnings.append(
            Message(
                f"the images take {_format_bytes(mapped)}, but this machine has "
                f"{_format_bytes(free_memory)} left: each epoch reads them from the disk."
            )
        )
    if fixed > room:
        raise InputError(
            f"weights, gradients and optimizer take {_format_bytes(fixed)}, but {where} has "
            f"{_format_bytes(room)}: choose a smaller ",
            *_name_sizes(net),
            ".",
        )
    if fixed + running > room:
        larger = data.batch_size_key if training >= validating else "dataset.eval_batch_size"
        warnings.append(
            Message(
                f"training needs about {_format_bytes(fixed + running)}, but {where} has "
                f"{_format_bytes(room)}: choose a smaller ",
                Key(larger),
                ", or more devices.",
            )
        )
    checkpoint = weights * (2 if averages else 1) + optimizer
    largest = checkpoint + pool  # during the warm-up
    free = shutil.disk_usage(_find_existing(Path(cfg.folder))).free
    # A resumed run replaces the checkpoints that it has written.
    written = sum(path.stat().st_size for path in RunFolder(cfg.folder).checkpoints.glob("*.ckpt"))
    if CHECKPOINTS * largest > free + written:
        raise InputError(
            f"{CHECKPOINTS} checkpoints of {_format_bytes(largest)} do not fit into the "
            f"{_format_bytes(free)} free at {cfg.folder}: set hydra.run.dir to a folder on "
            "another disk."
        )
    steps = cfg.trainer.max_steps
    places = f" on each of {nodes} nodes" if nodes > 1 else ""
    compiled = ", compiled" if cfg.compile else ""
    each = f" ({local} each)" if world > 1 else ""
    facts = {
        "devices": f"{ranks} x {device}{places}, {cfg.trainer.precision}{compiled}",
        "batch": f"{batch}{each}",
        "parameters": f"{parameters:,}",
        "memory": f"{_format_bytes(fixed + running)} per device",
        "codes": codes,
        "data": f"{sizes['train']:,} train, {sizes['val']:,} val, {sizes['test']:,} test images of "
        f"{'x'.join(map(str, shape))}, {len(images.class_names) or 'no'} classes, fingerprint "
        f"{images.fingerprint}, {_describe_storage(images)}",
        "length": f"{steps:,} steps, {steps * step / sizes['train']:.1f} epochs"
        if steps > 0
        else f"{cfg.trainer.max_epochs} epochs"
        if has_end(cfg.trainer)
        else "no end",
        "checkpoints": f"{_format_bytes(checkpoint)}, {_format_bytes(free)} free",
    }
    return Survey(facts, warnings)


def _get_images(data: StageDataModule) -> PixelDataModule:
    """Return the images of a stage, from which a prior's codes are made."""
    return data.images if isinstance(data, CodesDataModule) else cast(PixelDataModule, data)


def _describe_codes(
    net: nn.Module, data: StageDataModule, shape: tuple[int, int, int], batch: int, total: int
) -> tuple[str, list[Message]]:
    """Compare the latent grid with the receptive field, and the codes of a batch with K.

    Returns:
        Text of the fact, and warnings.
    """
    if isinstance(net, PixelCNN):
        assert isinstance(data, CodesDataModule)
        rows, columns = data.grid
        layers, needed = len(net.layers), net.layers_needed
        size = "x".join(map(str, data.code_shape))
        text = f"{size} codes of {net.num_codes}, covered by {needed} of {layers} layers"
        if needed <= layers:
            return text, []
        warning = Message(
            "with ",
            Key("model.net.layers"),
            f"={layers} the receptive field does not cover the {rows}x{columns} codes; {needed} "
            "layers cover them.",
        )
        return f"{size} codes of {net.num_codes}, not covered", [warning]
    assert isinstance(net, VQVAE)
    rows, columns = net.compute_grid(*shape[1:])
    seen = net.encoder.receptive_field
    quantizer = net.quantizer
    several = f"x{quantizer.codes_per_position}" if quantizer.codes_per_position > 1 else ""
    grid = f"{rows}x{columns}{several} %s, each sees {seen}x{seen} pixels"
    if not quantizer.num_codes:
        return grid % f"vectors of {quantizer.code_dim}", []
    positions = rows * columns
    warnings = []
    if quantizer.num_codes > total * positions:
        warnings.append(
            Message(
                Key("model.net.quantizer.num_codes"),
                f"={quantizer.num_codes} cannot all be used: the {total} training images have "
                f"{total * positions} codes.",
            )
        )
    share = batch * positions / quantizer.num_codes
    text = f"{grid % f'codes of {quantizer.num_codes}'}, {share:.3g} per code and step"
    if share < 0.1:
        warnings.append(
            Message(
                f"a batch has {batch * positions} codes for ",
                Key("model.net.quantizer.num_codes"),
                f"={quantizer.num_codes}, so that each is hit every {1 / share:.0f} steps at "
                "best: choose a larger ",
                Key(data.batch_size_key),
                ".",
            )
        )
    return text, warnings


def _name_sizes(net: nn.Module) -> tuple[str, ...]:
    """Name the keys that decide the size of a network."""
    if isinstance(net, PixelCNN):
        return Key("model.net.channels"), " or ", Key("model.net.layers")
    if isinstance(net, VQVAE) and isinstance(net.quantizer, VectorQuantizer):
        return Key("model.net.hidden"), " or ", Key("model.net.quantizer.num_codes")
    return (Key("model.net.hidden"),)


def _measure_activations(net: nn.Module, data: StageDataModule, precision: str) -> int:
    """Measure the bytes per image that a training step keeps for the backward pass, on a copy."""
    probe = copy.deepcopy(net).train()
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*probe.parameters(), *probe.buffers())}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs: tuple[Tensor, ...]
    if isinstance(net, PixelCNN):
        assert isinstance(data, CodesDataModule)
        labels = [torch.zeros(PROBED, dtype=torch.long)] if net.num_classes else []
        inputs = (torch.zeros(PROBED, *data.code_shape, dtype=torch.long), *labels)
    else:
        inputs = (torch.zeros(PROBED, *_get_images(data).image_shape),)
    with (
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST),
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
    ):
        output = probe(*inputs)
    del output  # kept until here, so that no address is used by two storages
    return sum(kept.values()) // PROBED


def _describe_storage(images: PixelDataModule) -> str:
    """Describe where the images are stored, and their size."""
    if images.mapped:
        return f"{_format_bytes(images.mapped)} mapped from a file"
    return f"{_format_bytes(images.memory)} in memory" if images.memory else "read as a stream"


def _count_pool_bytes(net: nn.Module) -> int:
    """Count the bytes of the vectors that the warm-up gathers for the first codebook, at most."""
    quantizer = getattr(net, "quantizer", None)
    if not isinstance(quantizer, VectorQuantizer):
        return 0
    vector = quantizer.code_dim * quantizer.codebook.element_size() + 8  # 8 for a random number
    return quantizer.pool_rows * vector


def _count_logit_bytes(net: nn.Module, data: StageDataModule) -> int:
    """Count the bytes per image of the logits of a PixelCNN, over codes or pixels, in validation.

    They are counted twice, because the loss computes their log-softmax. `_measure_activations`
    includes those of training.
    """
    if isinstance(net, VQVAE) and net.autoregressive:
        return 2 * 4 * LEVELS * math.prod(_get_images(data).image_shape)
    if not isinstance(net, PixelCNN):
        return 0
    assert isinstance(data, CodesDataModule)
    return 2 * 4 * net.num_codes * math.prod(data.code_shape)


def _check_device(trainer: DictConfig, ranks: int) -> str:
    """Return the name of the device.

    Raises:
        InputError: If there are fewer devices than ranks, or they lack the precision.
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
        raise InputError(
            Key("trainer.devices"),
            f"={ranks} must be at most {present}, the number of GPUs of this machine.",
        )
    if trainer.precision == "bf16-mixed" and not torch.cuda.is_bf16_supported(False):
        raise InputError(
            Key("trainer.precision"),
            f"=bf16-mixed: {torch.cuda.get_device_name()} has no bfloat16; choose 16-mixed or "
            "32-true.",
        )
    return torch.cuda.get_device_name()


def _find_cpp_compiler() -> str | None:
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else ["g++", "clang++", "c++"]
    return next((name for name in names if shutil.which(name)), None)


def _measure_room(device: str, ranks: int, free_memory: int) -> tuple[int, str]:
    """Measure the bytes that each rank may use, and name the device that they are on."""
    if device == "cpu" or not torch.cuda.is_available():
        return free_memory // ranks, "this machine (share of one rank)"
    return torch.cuda.mem_get_info()[1], device


def _find_existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _count_bytes(tensors: Iterable[object]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _format_bytes(count: float) -> str:
    """Format a number of bytes in decimal units."""
    for power, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= power:
            return f"{count / power:.3g} {name}" if count < 1e12 else f"{count / power:,.0f} {name}"
    return f"{count / 1e3:.3g} kB"

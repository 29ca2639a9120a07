"""Safe building of the `_target_`s that checkpoints and run folders name.

A `_target_` is code that will run, with arguments that the file chooses. What the user types may
name any code. A file may name only what the user trusts and the members of a table. Members are
compared by identity and never by the prefix of their name.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from vqvae_lightning.errors import InputError, join_lines

_OPTIMIZERS = tuple(
    f"torch.optim.{name}"
    for name in (
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "LBFGS",
        "Muon",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
        "SparseAdam",
    )
)
NETWORKS = (
    "vqvae_lightning.EMAQuantizer",
    "vqvae_lightning.PixelCNN",
    "vqvae_lightning.VQVAE",
    "vqvae_lightning.likelihoods.Categorical",
    "vqvae_lightning.likelihoods.Gaussian",
    "vqvae_lightning.likelihoods.Logistic",
    "vqvae_lightning.likelihoods.LogisticMixture",
    "vqvae_lightning.likelihoods.SquaredError",
    "vqvae_lightning.networks.autoencoder.VQVAE",
    "vqvae_lightning.networks.pixel_decoder.PixelCNNDecoder",
    "vqvae_lightning.networks.pixelcnn.PixelCNN",
    "vqvae_lightning.quantizers.EMAQuantizer",
    "vqvae_lightning.quantizers.GaussianBottleneck",
    "vqvae_lightning.quantizers.LibraryQuantizer",
    "vqvae_lightning.quantizers.LossQuantizer",
    "vqvae_lightning.quantizers.NoQuantizer",
    "vqvae_lightning.quantizers.SonnetEMAQuantizer",
    *_OPTIMIZERS,  # some quantizers of `vector_quantize_pytorch` take one
)
"""Names that the config of a network may contain; none of them imports Lightning."""
DATA = (
    "torchvision.datasets.CIFAR10",
    "torchvision.datasets.CIFAR100",
    "torchvision.datasets.CelebA",
    "torchvision.datasets.FashionMNIST",
    "torchvision.datasets.KMNIST",
    "torchvision.datasets.MNIST",
    "torchvision.datasets.SVHN",
    "vqvae_lightning.ImageDataModule",
    "vqvae_lightning.data.BundledSource",
    "vqvae_lightning.data.ImageDataModule",
    "vqvae_lightning.data.ImageFolderSource",
    "vqvae_lightning.data.NpzSource",
    "vqvae_lightning.data.ShardDataModule",
    "vqvae_lightning.data.TorchvisionSource",
)
"""Targets allowed in the config of a data set.

Data sets of torchvision that read pickles without checking a hash are excluded.
"""
RUNS = (
    *NETWORKS,
    *DATA,
    "vqvae_lightning.callbacks.AveragedWeights",
    "vqvae_lightning.callbacks.BestCheckpoint",
    "vqvae_lightning.callbacks.CodebookDrift",
    "vqvae_lightning.callbacks.CollapseWarning",
    "vqvae_lightning.callbacks.LastCheckpoint",
    "vqvae_lightning.callbacks.MedianPruning",
    "vqvae_lightning.callbacks.ReconstructionPictures",
    "vqvae_lightning.callbacks.SamplePictures",
    "vqvae_lightning.callbacks.SeedSteps",
    "vqvae_lightning.callbacks.StepProgress",
    "vqvae_lightning.loggers.MetricsFile",
    "vqvae_lightning.loggers.WandbRun",
    "vqvae_lightning.networks.classifier.Classifier",
    "vqvae_lightning.tasks.ClassifierTask",
    "vqvae_lightning.tasks.PriorTask",
    "vqvae_lightning.tasks.VQVAETask",
    "vqvae_lightning.tasks.WarmupCosine",
    "pytorch_lightning.Trainer",
    # Callbacks that take functions, or remove files named in their state, are excluded.
    "pytorch_lightning.callbacks.DeviceStatsMonitor",
    "pytorch_lightning.callbacks.EarlyStopping",
    "pytorch_lightning.callbacks.GradientAccumulationScheduler",
    "pytorch_lightning.callbacks.LearningRateMonitor",
    "pytorch_lightning.callbacks.ModelSummary",
    "pytorch_lightning.callbacks.RichModelSummary",
    "pytorch_lightning.callbacks.Timer",
    "pytorch_lightning.loggers.CSVLogger",
    "pytorch_lightning.loggers.TensorBoardLogger",
)
"""Targets allowed in the config of a run."""
LIBRARIES = frozenset(
    {
        "PIL",
        "cloudpickle",
        "fsspec",
        "hydra",
        "jinja2",
        "joblib",
        "lightning",
        "lightning_fabric",
        "lightning_utilities",
        "matplotlib",
        "numpy",
        "omegaconf",
        "optuna",
        "pytorch_lightning",
        "rich",
        "scipy",
        "setuptools",
        "sqlalchemy",
        "submitit",
        "torch",
        "torchmetrics",
        "torchvision",
        "vector_quantize_pytorch",
        "vqvae_lightning",
        "wandb",
        "webdataset",
        "yaml",
    }
)
"""Well-known packages with functions that can run or remove anything, such as `torch.load`.

A user can trust single targets of these and of Python's standard library, but not a whole one.
"""

_TARGET, _PARTIAL = "_target_", "_partial_"


class Call(NamedTuple):
    """An allowed `_target_` with its arguments."""

    target: Callable[..., Any]
    arguments: dict[str, Any]
    partial: bool


class Trust:
    """Reads a config from a file, resolves its targets and refuses those that are not allowed.

    Args:
        place: Source of the config, for messages.
        packages: Top-level packages or single targets that the user trusts in addition to the
            table.
        table: Targets that are always allowed.
    """

    def __init__(
        self, place: str, packages: str | Iterable[str] = (), table: Iterable[str] = RUNS
    ) -> None:
        self.place = place
        self.packages = set(list_packages(packages))
        self.table = tuple(table)

    def read(self, config: Any, key: str = "") -> Any:
        """Return `config` with a `Call` in place of each mapping that has a `_target_`.

        Args:
            config: Plain data from YAML or a checkpoint.
            key: Key of `config` in the whole config, for messages.

        Raises:
            InputError: If a target is not allowed, or a value is not plain data.
        """
        try:
            return self._read(config, key)
        except RecursionError as error:  # a list in a file may contain itself
            raise InputError(f"{self.place}: refused, because the config never ends.") from error

    def build(self, config: Any, key: str) -> Any:
        """Build the object that `config` describes, without Hydra.

        Raises:
            InputError: If a target is not allowed, a value is not plain data, or a constructor
                fails.
        """
        read = self.read(config, key)
        try:
            return _build_calls(read)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{self.place}: {key} cannot be built: {type(error).__name__}: {join_lines(error)}"
            ) from error

    def _read(self, config: Any, key: str) -> Any:
        if isinstance(config, dict):
            return self._read_mapping(config, key)
        if isinstance(config, list | tuple):
            return [self._read(child, f"{key}[{place}]") for place, child in enumerate(config)]
        if isinstance(config, str) and "${" in config:
            self._refuse(key, f"is an interpolation, {config}")
        elif config is not None and not isinstance(config, str | int | float):
            self._refuse(key, f"is a {type(config).__name__}, not a plain value")
        return config

    def _read_mapping(self, config: dict[Any, Any], key: str) -> Any:
        prefix = f"{key}." if key else ""
        known = (_TARGET, _PARTIAL) if _TARGET in config else ()
        # The target is read first, so that messages about it come before others.
        target: Any = self._read_target(config[_TARGET], f"{prefix}{_TARGET}") if known else None
        for name in config:
            if isinstance(name, str) and name[:1] == name[-1:] == "_" and name not in known:
                self._refuse(f"{prefix}{name}", "is not a key that a run writes to its config")
        children = {
            name: self._read(child, f"{prefix}{name}")
            for name, child in config.items()
            if name not in known
        }
        deferred = config.get(_PARTIAL, False)
        if not isinstance(deferred, bool):
            self._refuse(f"{prefix}{_PARTIAL}", f"is {deferred!r}, but must be true or false")
        return Call(target, children, bool(deferred)) if known else children

    def _read_target(self, target: object, key: str) -> Any:
        if isinstance(target, str) and _is_name(target):
            return self._resolve(target, key)
        self._refuse(key, f"is {target!r}, not the name of a class")
        return None

    def _resolve(self, target: str, key: str) -> Any:
        """Find the class or function that `target` names."""
        found = self._find_member(target)
        if found is not None:
            return found
        self._require(_get_required_trust(target), target, key)
        found = self._import_target(target, key)
        # A trusted package exposes what it imports from others, such as my_package.os.system.
        home = getattr(found, "__module__", None) or "builtins"
        if target not in self.packages and not self._is_member(found):
            self._require(target if _is_library(home) else _get_top_package(home), target, key)
        return found

    def _find_member(self, target: str) -> Any:
        """Find the member of the table that `target` names, directly or as an alias; or None.

        Only modules of the table are imported.
        """
        if target in self.table:
            return _import_attribute(target)
        members = self._list_members(_get_top_package(target))
        modules = {member.__module__ for member in members} | {
            entry.rpartition(".")[0] for entry in self.table
        }
        module, _, name = target.rpartition(".")
        if not any(known == module or known.startswith(f"{module}.") for known in modules):
            return None
        # `getattr` could import what a module provides on demand.
        found = vars(sys.modules[module]).get(name) if module in sys.modules else None
        return found if any(found is member for member in members) else None

    def _is_member(self, found: Any) -> bool:
        home = _get_top_package(str(getattr(found, "__module__", "")))
        return any(found is member for member in self._list_members(home))

    def _list_members(self, package: str) -> list[Any]:
        return [
            _import_attribute(entry) for entry in self.table if _get_top_package(entry) == package
        ]

    def _import_target(self, target: str, key: str) -> Any:
        """Import the class or function that a trusted `target` names."""
        parts = target.split(".")
        try:
            found: Any = import_module(parts[0])
            for depth, part in enumerate(parts[1:], 2):
                if not hasattr(found, part):
                    import_module(".".join(parts[:depth]))
                found = getattr(found, part)
        except Exception as error:  # importing a package can raise anything
            raise InputError(
                f"{self.place}: {key}={target} cannot be imported: "
                f"{type(error).__name__}: {join_lines(error)}"
            ) from error
        if not callable(found):
            self._refuse(key, f"is {target}, not a class or function")
        return found

    def _require(self, name: str, target: str, key: str) -> None:
        """Refuse `target` unless the user trusts `name`."""
        if name in self.packages:
            return
        wanted = sorted({*self.packages, name})
        quoted = ", ".join(f'"{part}"' for part in wanted)
        raise InputError(
            f"{self.place}: {key}={join_lines(target)} is refused: a file may name only what "
            "vqvae_lightning knows. If you trust that code with all that you may do, add "
            f"trust=[{','.join(wanted)}] to the command, or in Python load(path, trust=[{quoted}])."
        )

    def _refuse(self, key: str, reason: str) -> None:
        raise InputError(f"{self.place}: {key or 'the config'} {join_lines(reason)}: refused.")


class _Needs(Trust):
    """Collects the packages that a config needs trust for, instead of refusing the config."""

    def __init__(self) -> None:
        super().__init__("")

    def _require(self, name: str, target: str, key: str) -> None:
        self.packages.add(name)

    def _refuse(self, key: str, reason: str) -> None:
        """Accept the value, because Hydra checks what is typed on the command line."""

    def _resolve(self, target: str, key: str) -> Any:
        try:
            return super()._resolve(target, key)
        except InputError:  # Hydra reports a failed import when it builds the object
            return None


def find_foreign(config: Any) -> list[str]:
    """List what a file with this config needs trust for: packages, or targets of `LIBRARIES`."""
    needs = _Needs()
    needs.read(config)
    return sorted(needs.packages)


def list_packages(given: Any) -> list[str]:
    """List the packages of a `trust` option, which is a name, a list of names, or None.

    Raises:
        InputError: If it is anything else.
    """
    listed = [given] if isinstance(given, str) else list(given or ())
    for name in listed:
        if not (isinstance(name, str) and _is_name(name)):
            raise InputError(f"trust={name} must be the name of a package: trust=[my_package].")
    return listed


def _build_calls(read: Any) -> Any:
    """Make each `Call` in what `Trust.read` returned."""
    if isinstance(read, Call):
        arguments = {name: _build_calls(value) for name, value in read.arguments.items()}
        return partial(read.target, **arguments) if read.partial else read.target(**arguments)
    if isinstance(read, dict):
        return {name: _build_calls(value) for name, value in read.items()}
    if isinstance(read, list):
        return [_build_calls(value) for value in read]
    return read


def _import_attribute(entry: str) -> Any:
    module, _, name = entry.rpartition(".")
    return getattr(import_module(module), name)


def _is_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _get_required_trust(target: str) -> str:
    """Get the name that the user must trust before `target` is built."""
    return target if _is_library(target) else _get_top_package(target)


def _is_library(target: str) -> bool:
    return _get_top_package(target) in LIBRARIES | sys.stdlib_module_names


def _get_top_package(target: str) -> str:
    return target.partition(".")[0]

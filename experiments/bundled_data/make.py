"""Make the bundled subset of Fashion-MNIST from the full set.

    python experiments/bundled_data/make.py DATA_DIR

DATA_DIR is the folder in which torchvision's FashionMNIST keeps its files, or downloads them. The
subset has the first 1 000 training and the first 200 test images of each class, in their original
order, so it is the same on every machine.
"""

import sys
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

TARGET = Path(__file__).parents[2] / "vqvae_lightning/data/bundled/fashion_mnist_mini.npz"
PER_CLASS = {"train": 1_000, "test": 200}


def main(root: str) -> None:
    """Write TARGET from the full set in `root`."""
    arrays: dict[str, np.ndarray] = {}
    for split, count in PER_CLASS.items():
        full = FashionMNIST(root, train=split == "train", download=True)
        labels = full.targets.numpy()
        rows = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))
        arrays[f"{split}_images"] = full.data.numpy()[rows]
        arrays[f"{split}_labels"] = labels[rows].astype(np.uint8)
    names = np.array([name.replace("/Top", "") for name in full.classes])
    partial = TARGET.with_suffix(".partial.npz")
    np.savez_compressed(partial, **arrays, class_names=names)
    partial.replace(TARGET)
    print(f"{TARGET}: {TARGET.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1])

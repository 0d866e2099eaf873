"""Images of the lab: MNIST from a folder of its idx files, or scikit-learn's 8 x 8 digits, which come with the demo
extra."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effzoo.errors import DataError
from effzoo.lab.experiment import Run
from effzoo.lab.fit import Examples

DATA = "a folder with MNIST's idx files (default: scikit-learn's 8 x 8 digits)"
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels


@dataclass(frozen=True)
class Images:
    """Digits as `pixels` [examples, 1, height, width], standardised.

    train, test: to train and to count on.
    about: which they are.
    """

    train: Examples
    test: Examples
    about: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        _, _, height, width = self.train.inputs["pixels"].shape
        return height, width


def images(run: Run, *, train: int | None = None, test: int | None = None, seed: int | None = None) -> Images:
    """MNIST in `run.data`, or the 1,797 digits of scikit-learn, 1,347 of them to train on.

    train, test: how many, the first ones; None for all of the part.
    seed: draws both parts anew, of all images together and as large as they were; None leaves each as it is.
    """
    if run.data is not None:
        parts = [_mnist(run.data, part) for part in ("train", "t10k")]
        about = "MNIST"
    else:
        pixels, labels = _digits()
        parts = [(pixels[:1347], labels[:1347]), (pixels[1347:], labels[1347:])]
        about = "scikit-learn digits, 8 x 8"
    if seed is not None:
        (pixels, labels), first = (torch.cat(pair) for pair in zip(*parts, strict=True)), len(parts[0][1])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        parts = [(pixels[places], labels[places]) for places in (order[:first], order[first:])]
    splits = [
        Examples({"pixels": pixels[:count]}, labels[:count])
        for (pixels, labels), count in zip(parts, (train, test), strict=True)
    ]
    return Images(splits[0], splits[1], about)


def _digits() -> tuple[Tensor, Tensor]:
    if importlib.util.find_spec("sklearn") is None:
        raise DataError(
            "the 8 x 8 digits come with scikit-learn, which is not installed: pip install "
            "'effzoo[demo]', or give --data with MNIST"
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return ((pixels - pixels.mean()) / pixels.std())[order], torch.tensor(digits.target)[order]


def _mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    pixels = _idx(folder, f"{part}-images-idx3-ubyte").float() / 255
    return ((pixels - MEAN) / DEVIATION)[:, None], _idx(folder, f"{part}-labels-idx1-ubyte").long()


def _idx(folder: Path, name: str) -> Tensor:
    """An idx file, packed or not: four bytes that say type and rank, the sizes, then the bytes."""
    files = [path for path in (folder / f"{name}.gz", folder / name) if path.exists()]
    if not files:
        raise DataError(f"{folder} has neither {name} nor {name}.gz; give the folder that holds MNIST's four idx files")
    raw = gzip.decompress(files[0].read_bytes()) if files[0].suffix == ".gz" else files[0].read_bytes()
    rank = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    content = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank)
    if raw[:3] != b"\x00\x00\x08" or content.size != np.prod(shape):
        raise DataError(
            f"{files[0]} is not an idx file of bytes, or is cut short: its head says {shape}, and "
            f"{content.size} bytes follow"
        )
    return torch.from_numpy(content.copy()).view(shape)

"""Real and synthetic images that need no download: scikit-learn's digits, and CURVES generated here."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import get_data_home, load_digits
from tqdm.auto import tqdm

__all__ = ["Split", "curves", "digits"]

SIDE = 28  # pixels of a CURVES image
_MARGIN = 3.0  # pixels between the border and the three points
_PEN = 0.8  # pixels at which the ink has fallen to 1/e
_RECIPE = 1  # part of the cache's file name: raise it when the drawing changes, so that no old file is read


class Split(NamedTuple):
    """Inputs `[n, features]` and integer labels `[n]`, for training and for testing."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def digits() -> Split:
    """The 1797 handwritten digits bundled with scikit-learn: 8x8 pixels in [0, 1], float32, labels 0 to 9.

    1400 for training and 397 for testing, split at random but always in the same way: the file is ordered by writer,
    and the frozen generator `RandomState` keeps its stream across versions of numpy.
    """
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.data))
    x = torch.tensor(bunch.data[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(bunch.target[order], dtype=torch.long)
    return Split(x[:1400], y[:1400], x[1400:], y[1400:])


def curves(n: int, seed: int) -> torch.Tensor:
    """`n` images of a curve through three random points, `[n, 784]` float32 in [0, 1].

    A stand-in for the CURVES set of Hinton and Salakhutdinov (2006), made anew: three points are uniform in the square
    3 pixels inside the 28x28 image, the curve is the quadratic Bézier curve that passes through them at
    `t = 0, 1/2, 1`, and the ink at distance `d` from it is `exp(-(d / 0.8)^2)`.

    Generated once (a few seconds for 10,000) and cached in scikit-learn's data folder (`get_data_home()`); a cached
    file whose contents do not match its checksum is replaced.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"curves: n must be a positive integer, got {n!r}")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"curves: seed must be a non-negative integer, got {seed!r}")
    file = Path(get_data_home()) / "kfqn" / f"curves-{_RECIPE}-{n}-{seed}.npz"
    images = _load(file, n)
    if images is None:
        images = _draw(n, seed)
        _save(file, images)
    return torch.from_numpy(images)


def _draw(n: int, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    points = _MARGIN + (SIDE - 2 * _MARGIN) * torch.rand(n, 3, 2, generator=generator)
    # Lagrange's polynomials for the nodes 0, 1/2, 1. 96 samples keep neighbours on the curve closer than a pixel.
    t = torch.linspace(0, 1, 96)
    basis = torch.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)], dim=1)
    centres = torch.arange(SIDE) + 0.5
    pixels = torch.cartesian_prod(centres, centres)
    images = []
    # 100 images at a time keep the distances of all pixels to all samples in the processor's cache.
    for chunk in tqdm(points.split(100), desc="drawing CURVES", leave=False):
        curve = basis @ chunk
        squared = curve.square().sum(-1).unsqueeze(1) - 2 * pixels @ curve.mT  # |c|^2 - 2 p.c
        squared = squared.amin(-1) + pixels.square().sum(-1)
        images.append(torch.exp(-squared.clamp_min(0) / _PEN**2))
    return torch.cat(images).numpy()


def _digest(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


def _load(file: Path, n: int) -> np.ndarray | None:
    """The cached images, or None when the file is missing or is not what was written."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            images, digest = archive["images"], str(archive["sha256"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    intact = images.shape == (n, SIDE * SIDE) and images.dtype == np.float32 and _digest(images) == digest
    return images if intact else None


def _save(file: Path, images: np.ndarray) -> None:
    """Write beside the target, then rename: a reader sees the whole file or none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            try:
                np.savez(part, images=images, sha256=_digest(images))
                part.close()
                os.replace(part.name, file)
            except BaseException:
                part.close()
                os.unlink(part.name)
                raise
    except OSError as error:
        warnings.warn(f"curves: not cached ({error}); the images will be generated again next time", stacklevel=3)

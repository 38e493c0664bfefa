"""Data that need no download: scikit-learn's digits and photographs, CURVES and a table generated here, and the text of
Python's own documentation; and larger sets from OpenML for those who have a network."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from sklearn.datasets import (
    fetch_openml,
    get_data_home,
    load_digits,
    load_sample_image,
    load_sample_images,
    make_classification,
)
from tqdm.auto import tqdm

from kfqn_core.lab import cache

__all__ = ["Split", "curves", "digits", "openml", "photograph_patches", "photograph_pixels", "table", "text_windows"]

SIDE = 28  # pixels of a CURVES image
_MARGIN = 3.0  # pixels between the border and the three points
_PEN = 0.8  # pixels at which the ink has fallen to 1/e
_FAINT = 1e-12  # less ink is none: numbers below 1e-38 would make every product on some processors ten times slower
_RECIPE = 2  # part of the cache's file name: raise it when the drawing changes, so that no old file is read

PATCH = 32  # pixels of a side of a photograph patch
STRIP = 64  # columns of a photograph that belong to training together, or to testing
TEST_STRIPS = (2, 7)  # of the ten strips of each photograph
# Samples and the shape of one, by name on OpenML. The last 10,000 samples are for testing.
OPENML = {
    "mnist_784": (70_000, (1, 28, 28)),
    "Fashion-MNIST": (70_000, (1, 28, 28)),
    "CIFAR_10": (60_000, (3, 32, 32)),
}
OPENML_TEST = 10_000


class Split(NamedTuple):
    """Inputs `[n, ...]` and what belongs to them, for training and for testing; integer labels `[n]` where nothing else
    is said."""

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


def photograph_patches(n_train: int, n_test: int, seed: int) -> Split:
    """32x32 patches of scikit-learn's two photographs, turned by a multiple of 90 degrees, which is the label.

    `[n, 3, 32, 32]` float32 in [0, 1], not standardised. Label k says that the patch was turned k times by 90 degrees
    counter-clockwise; photograph, place and label are uniform. Each photograph is cut into ten strips of 64 columns;
    patches for testing lie in the third and the eighth strip, patches for training in the others, and none crosses
    the border of a strip: no pixel serves both.
    """
    for name, value, least in (("n_train", n_train, 1), ("n_test", n_test, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"photograph_patches: {name} must be an integer from {least} on, got {value!r}")
    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    photographs = photographs.permute(0, 3, 1, 2).float() / 255  # [2, 3, 427, 640]
    strips = range(photographs.shape[3] // STRIP)
    training = torch.tensor([strip for strip in strips if strip not in TEST_STRIPS])
    generator = torch.Generator().manual_seed(seed)
    return Split(
        *_turned_patches(photographs, training, n_train, generator),
        *_turned_patches(photographs, torch.tensor(TEST_STRIPS), n_test, generator),
    )


def _turned_patches(
    photographs: torch.Tensor, strips: torch.Tensor, n: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    def draw(below: int) -> torch.Tensor:
        return torch.randint(below, (n,), generator=generator)

    which, top, turns = draw(len(photographs)), draw(photographs.shape[2] - PATCH + 1), draw(4)
    left = STRIP * strips[draw(len(strips))] + draw(STRIP - PATCH + 1)
    places = zip(which.tolist(), top.tolist(), left.tolist(), turns.tolist(), strict=True)
    patches = [photographs[i, :, t : t + PATCH, s : s + PATCH].rot90(k, (1, 2)) for i, t, s, k in places]
    return torch.stack(patches), turns


def photograph_pixels() -> Split:
    """The colours of scikit-learn's photograph of a Chinese temple, and where they are: 60,000 pixels, 10,000 others.

    Inputs are row and column of a pixel's centre in units of height and width, `[n, 2]` float32 in (0, 1), and what
    belongs to them is its colour, `[n, 3]` float32 in [0, 1]. The pixels are drawn at random, always the same ones.
    """
    photograph = torch.tensor(load_sample_image("china.jpg"))
    height, width, _ = photograph.shape
    places = torch.cartesian_prod((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width)
    colours = photograph.reshape(-1, 3).float() / 255
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    train, test = order[:60_000], order[60_000:70_000]
    return Split(places[train], colours[train], places[test], colours[test])


def table() -> Split:
    """A table of scikit-learn's `make_classification`: 12 classes of four clusters each in 40 of 120 columns, the other
    80 noise; 20,000 rows for training and 4,000 for testing.

    `[n, 120]` float32, every column standardised with the mean and deviation of the training rows. One label in a
    hundred is drawn at random.
    """
    columns, labels = make_classification(
        n_samples=24_000, n_features=120, n_informative=40, n_redundant=0, n_classes=12, n_clusters_per_class=4,
        random_state=0,
    )  # fmt: skip
    x, y = torch.tensor(columns), torch.tensor(labels, dtype=torch.long)
    deviation, mean = torch.std_mean(x[:20_000], dim=0)
    x = ((x - mean) / deviation).float()
    return Split(x[:20_000], y[:20_000], x[20_000:], y[20_000:])


def text_windows(length: int) -> Split:
    """The help that Python itself carries (`pydoc_data.topics`, some 470,000 bytes) in windows of `length` bytes.

    Inputs are bytes, and what belongs to each is the byte that follows it: `[n, length]` int64 both. Windows do not
    overlap; the first nine tenths of the text are for training, the rest for testing, and less than a window at the
    end of either is dropped. The text changes a little from one version of Python to the next.
    """
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"text_windows: length must be a positive integer, got {length!r}")
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    numbers = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    cut = len(numbers) * 9 // 10
    parts: list[torch.Tensor] = []
    for part in (numbers[:cut], numbers[cut:]):
        windows = (len(part) - 1) // length
        if not windows:
            raise ValueError(f"text_windows: length must be less than a tenth of the text, {len(text) // 10} bytes, "
                             f"got {length}")  # fmt: skip
        parts += [part[start : start + windows * length].reshape(windows, length) for start in (0, 1)]
    return Split(*parts)


def openml(name: str) -> Split:
    """MNIST (`"mnist_784"`), Fashion-MNIST (`"Fashion-MNIST"`) or CIFAR-10 (`"CIFAR_10"`) from OpenML.

    `[n, channels, height, width]` float32 in [0, 1]; the last 10,000 samples are the test set. scikit-learn downloads
    once, compares checksums, and caches in its data folder, a whole file or none. Reading that file takes half a
    minute, so that its contents are kept beside it as bytes, with a checksum.

    Raises:
        ValueError: if the name is none of the three, or if what came is not the data set.
        ConnectionError: without a network, unless it was downloaded before; catch it to go on with `digits()`.
    """
    if name not in OPENML:
        raise ValueError(f"openml: name must be one of {sorted(OPENML)}, got {name!r}")
    samples, shape = OPENML[name]
    kept = cache.load(f"openml-{name}")
    if kept is None:
        kept = _download(name)
        cache.save(f"openml-{name}", **kept)
    x = torch.from_numpy(kept["pixels"]).reshape(-1, *shape) / 255
    y = torch.from_numpy(kept["labels"]).long()
    train = samples - OPENML_TEST
    return Split(x[:train], y[:train], x[train:], y[train:])


def _download(name: str) -> dict[str, np.ndarray]:
    """Pixels `[n, d]` and labels `[n]`, both uint8, from OpenML or from what scikit-learn has kept of it."""
    samples, shape = OPENML[name]
    try:
        # As numbers, labels too: a quarter of the memory, and scikit-learn 1.9 fails on the categories of pandas 3.
        pixels, labels = fetch_openml(
            name, version=1, return_X_y=True, as_frame=False, parser="pandas", read_csv_kwargs={"dtype": np.float32}
        )
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"openml: {name} is not in {get_data_home()} and cannot be downloaded ({error}); connect to a network "
            "once, or use digits() or photograph_patches(), which need none"
        ) from error
    expected = (samples, int(np.prod(shape)))
    fits = pixels.shape == expected and labels.shape == (samples,)
    if not fits or not (_are_bytes(pixels) and _are_bytes(labels)):
        raise ValueError(
            f"openml: {name} should hold whole numbers from 0 to 255 of shape {expected} and as many labels, got "
            f"{pixels.dtype} of shape {pixels.shape} and {len(labels)} labels; remove "
            f"{Path(get_data_home()) / 'openml'} and try again"
        )
    return {"pixels": pixels.astype(np.uint8, order="C"), "labels": labels.astype(np.uint8)}


def _are_bytes(numbers: np.ndarray) -> bool:
    return bool(numbers.min() >= 0 and numbers.max() <= 255 and (numbers == np.rint(numbers)).all())


def curves(n: int, seed: int) -> torch.Tensor:
    """`n` images of a curve through three random points, `[n, 784]` float32 in [0, 1].

    A stand-in for the CURVES set of Hinton and Salakhutdinov (2006), made anew: three points are uniform in the square
    3 pixels inside the 28x28 image, the curve is the quadratic Bézier curve that passes through them at
    `t = 0, 1/2, 1`, and the ink at distance `d` from it is `exp(-(d / 0.8)^2)`, or none where that is below 1e-12.

    Generated once (a few seconds for 10,000) and cached in scikit-learn's data folder (`get_data_home()`); a cached
    file whose contents do not match its checksum is replaced.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"curves: n must be a positive integer, got {n!r}")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"curves: seed must be a non-negative integer, got {seed!r}")
    name = f"curves-{_RECIPE}-{n}-{seed}"
    kept = cache.load(name)
    if kept is None:
        kept = {"images": _draw(n, seed)}
        cache.save(name, **kept)
    return torch.from_numpy(kept["images"])


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
        ink = torch.exp(-squared.clamp_min(0) / _PEN**2)
        images.append(torch.where(ink < _FAINT, 0.0, ink))
    return torch.cat(images).numpy()

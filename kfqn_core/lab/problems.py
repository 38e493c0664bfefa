"""The training problems that chapters and benchmarks share: model, data, loss and batch size, under speaking names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from kfqn_core.lab import data

__all__ = [
    "Problem",
    "autoencoder",
    "curves_autoencoder",
    "digits_autoencoder",
    "digits_cnn",
    "entropy_floor",
    "mean_image_loss",
    "photographs_cnn",
    "pixel_cross_entropy",
]


@dataclass(frozen=True)
class Problem:
    """What is trained, on what. `loss(output, target)` is a mean over samples.

    Targets of an integer type are class labels, `[n]` or more of them a sample, `[n, ...]`. The output then has one
    dimension more, its last, with a score for every class, and accuracy means something.
    """

    name: str
    make_model: Callable[[], nn.Module]
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    batch_size: int

    def model(self, seed: int) -> nn.Module:
        """A freshly initialised model; the same seed gives the same weights. The global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make_model()


def autoencoder(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A fully connected autoencoder; `widths` run from the input to the code, and the decoder mirrors them.

    The code layer and the output layer are linear, every other layer is followed by `activation`: the layout of
    Goldfarb, Ren and Bahamou's published code. The output are logits.
    """
    if len(widths) < 2 or any(not isinstance(width, int) or width < 1 for width in widths):
        raise ValueError(f"autoencoder: widths must be at least two positive integers, input first, got {widths!r}")
    sizes = [*widths, *reversed(widths[:-1])]
    code, last = len(widths) - 2, len(sizes) - 2
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(d_in, d_out))
        if i not in (code, last):
            layers.append(activation())
    return nn.Sequential(*layers)


def pixel_cross_entropy(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats between pixels in [0, 1] and predicted probabilities, `[n, pixels]` both: summed over the
    pixels of an image, averaged over images."""
    return binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def entropy_floor(images: torch.Tensor) -> float:
    """The least value of `pixel_cross_entropy` for these images, reached by predicting every pixel exactly.

    It is the entropy of the pixels, and above zero because grey pixels are neither 0 nor 1.
    """
    return _entropy(images.double()).sum(-1).mean().item()


def mean_image_loss(images: torch.Tensor) -> float:
    """`pixel_cross_entropy` of the best constant answer, the mean image: where a model stands that has learned the
    biases of its output layer and nothing else."""
    return _entropy(images.double().mean(0)).sum().item()


def _entropy(p: torch.Tensor) -> torch.Tensor:
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


def digits_autoencoder(activation: Callable[[], nn.Module] = nn.ReLU) -> Problem:
    """64-128-64-32-8-32-64-128-64 on scikit-learn's digits, mini-batches of 200."""
    split = data.digits()
    return Problem(
        name="digits autoencoder",
        make_model=lambda: autoencoder((64, 128, 64, 32, 8), activation),
        x_train=split.x_train,
        y_train=split.x_train,
        x_test=split.x_test,
        y_test=split.x_test,
        loss=pixel_cross_entropy,
        batch_size=200,
    )


def curves_autoencoder() -> Problem:
    """784-400-200-100-50-25-6-25-50-100-200-400-784 on 9000 CURVES images (1000 more for testing), mini-batches of
    1000: the network and the batch size of the published K-BFGS code."""
    images = data.curves(10_000, seed=0)
    train, test = images[:9000], images[9000:]
    return Problem(
        name="CURVES autoencoder",
        make_model=lambda: autoencoder((784, 400, 200, 100, 50, 25, 6)),
        x_train=train,
        y_train=train,
        x_test=test,
        y_test=test,
        loss=pixel_cross_entropy,
        batch_size=1000,
    )


def digits_cnn() -> Problem:
    """Three 3x3 convolutions with 16, 32, 64 channels, each with ReLU and pooling, then 64 and 10 units, on
    scikit-learn's digits enlarged to 16x16; mini-batches of 128."""
    split = data.digits()
    x_train, x_test = (
        interpolate(x.reshape(-1, 1, 8, 8), scale_factor=2, mode="bilinear") for x in (split.x_train, split.x_test)
    )
    return Problem(
        name="digits CNN",
        make_model=lambda: nn.Sequential(
            *_convolutions(1, batch_norm=False), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        x_train=x_train,
        y_train=split.y_train,
        x_test=x_test,
        y_test=split.y_test,
        loss=cross_entropy,
        batch_size=128,
    )


def photographs_cnn(batch_norm: bool = True) -> Problem:
    """By how much was a patch of a photograph turned? 8000 patches to learn from, 2000 for testing, standardised by
    channel with the mean and deviation of the training patches; mini-batches of 128.

    Three 3x3 convolutions with 16, 32, 64 channels, each with batch norm, ReLU and pooling, then the mean over all
    places and a linear layer. Without batch norm the means are over the four quarters of the image.
    """
    split = data.photograph_patches(8000, 2000, seed=0)
    deviation, mean = torch.std_mean(split.x_train, dim=(0, 2, 3), keepdim=True)
    side = 1 if batch_norm else 2
    return Problem(
        name="photographs CNN" if batch_norm else "photographs CNN without batch norm",
        make_model=lambda: nn.Sequential(
            *_convolutions(3, batch_norm), nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(64 * side**2, 4)
        ),
        x_train=(split.x_train - mean) / deviation,
        y_train=split.y_train,
        x_test=(split.x_test - mean) / deviation,
        y_test=split.y_test,
        loss=cross_entropy,
        batch_size=128,
    )


def _convolutions(channels: int, batch_norm: bool) -> list[nn.Module]:
    """Convolution, ReLU, pooling, three times. Batch norm shifts by itself, so convolutions before it have no bias."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise((channels, 16, 32, 64)):
        layers.append(nn.Conv2d(d_in, d_out, 3, padding=1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(d_out)] * batch_norm
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return layers

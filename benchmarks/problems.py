"""The problems of the comparison: P1 to P17, each with the number of Adam steps that defines its budget of wall time.

| | problem | training / test samples | batch | N |
|---|---|---|---|---|
| P1 | CURVES autoencoder, 784-400-200-100-50-25-6, ReLU | 9000 / 1000 | 1000 | 200 |
| P2 | digits autoencoder, 64-128-64-32-8, ReLU | 1400 / 397 | 200 | 400 |
| P3 | digits CNN, 16-32-64 channels, 64 units | 1400 / 397 | 128 | 130 |
| P4 | VGG-like CNN on noise: for the cost of a step only | 64 | 64 | - |
| P5 | photographs CNN with batch norm | 8000 / 2000 | 128 | 300 |
| P6 | photographs CNN without batch norm | 8000 / 2000 | 128 | 300 |
| P7 | P2 with tanh | 1400 / 397 | 200 | 400 |
| P8 | MNIST autoencoder, 784-1000-500-250-30, ReLU | 60000 / 10000 | 1000 | 300 |
| P9 | residual network with batch norm, 16-32-64 channels, on CIFAR-10 | 50000 / 10000 | 128 | 600 |
| P10 | GPT on bytes of text, three blocks of width 96, windows of 64 | 6500 / 720 windows | 16 | 300 |
| P11 | MLP on a generated table, 120-384-384-12, ReLU | 20000 / 4000 | 256 | 300 |
| P12 | a photograph by Fourier features of coordinates, 128-192-192-192-3, ReLU | 60000 / 10000 | 1024 | 300 |
| P13 | variational autoencoder on digits, 64-128-64-8, ReLU | 1400 / 397 | 200 | 400 |
| P14 | MLP with twelve hidden layers of 2048 units, ReLU, on MNIST | 10000 / 2000 | 128 | 60 |
| P15 | Friedman's function, 10-128-128-128-1, layer norm, GELU | 8000 / 2000 | 64 | 400 |
| P16 | one-dimensional CNN with batch norm on chirps, 32-64-64 channels | 8000 / 2000 | 64 | 300 |
| P17 | transformer of two layers that sorts 24 tokens, width 64 | 8000 / 2000 | 64 | 300 |

P15 to P17 were written down before any optimizer was run on them, and nothing is chosen on them.
P8, P9 and P14 need data that are downloaded once (`kfqn_core.lab.data.openml`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from kfqn_core.lab import further_problems, problems, unseen_problems
from kfqn_core.lab.problems import Problem

__all__ = ["TASKS", "Task", "available", "vgg_like"]


@dataclass(frozen=True)
class Task:
    """A problem with its budget: `steps` is N, or None where only the cost of a step is of interest.

    `likelihood` names what the loss is the negative logarithm of, and K-FAC draws labels from it: `"bernoulli"`,
    `"categorical"` or `"gaussian"`. `"elbo"` is a bound of one, with a term in which there are no labels.
    """

    key: str
    make: Callable[[], Problem]
    steps: int | None
    likelihood: str

    @property
    def problem(self) -> Problem:
        """The data and the model, made once."""
        return _made(self.make)

    def constant_loss(self) -> float:
        """The training loss of the best answer that does not look at its input: learning begins below it."""
        y = self.problem.y_train
        if self.likelihood == "categorical":
            counts = torch.bincount(y.flatten()).double()  # [n], or [n, T] where a sample has several labels
            return torch.special.entr(counts / counts.sum()).sum().item()
        mean = y.double().mean(0)
        if self.likelihood == "gaussian":
            return self.problem.loss(mean.to(y.dtype).expand_as(y), y).item()
        return (torch.special.entr(mean) + torch.special.entr(1 - mean)).sum().item()  # of all pixels


@cache
def _made(make: Callable[[], Problem]) -> Problem:
    return make()


def vgg_like() -> Problem:
    """Six 3x3 convolutions (32, 32, 64, 64, 128, 128 channels), pooled after every second, then 256 and 10 units.

    The data are 32x32 noise: it stands for the shapes of a larger convolutional network.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 32, 32, generator=generator)
    y = torch.randint(10, (64,), generator=generator)

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        for i, (d_in, d_out) in enumerate(pairwise((3, 32, 32, 64, 64, 128, 128))):
            layers += [nn.Conv2d(d_in, d_out, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * (i % 2)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU(), nn.Linear(256, 10))

    return Problem("VGG-like CNN", model, x, y, x, y, cross_entropy, batch_size=64)


def digits_autoencoder_tanh() -> Problem:
    return problems.digits_autoencoder(nn.Tanh)


def photographs_cnn_without_batch_norm() -> Problem:
    return problems.photographs_cnn(batch_norm=False)


TASKS = {
    task.key: task
    for task in (
        Task("P1", problems.curves_autoencoder, 200, "bernoulli"),
        Task("P2", problems.digits_autoencoder, 400, "bernoulli"),
        Task("P3", problems.digits_cnn, 130, "categorical"),
        Task("P4", vgg_like, None, "categorical"),
        Task("P5", problems.photographs_cnn, 300, "categorical"),
        Task("P6", photographs_cnn_without_batch_norm, 300, "categorical"),
        Task("P7", digits_autoencoder_tanh, 400, "bernoulli"),
        Task("P8", further_problems.mnist_autoencoder, 300, "bernoulli"),
        Task("P9", further_problems.cifar_resnet, 600, "categorical"),
        Task("P10", further_problems.byte_gpt, 300, "categorical"),
        Task("P11", further_problems.table_mlp, 300, "categorical"),
        Task("P12", further_problems.photograph_coordinates, 300, "gaussian"),
        Task("P13", further_problems.digits_vae, 400, "elbo"),
        Task("P14", further_problems.wide_mlp, 60, "categorical"),
        Task("P15", unseen_problems.friedman_regression, 400, "gaussian"),
        Task("P16", unseen_problems.chirps_cnn, 300, "categorical"),
        Task("P17", unseen_problems.sorting_transformer, 300, "categorical"),
    )
}


def available(keys: list[str]) -> list[str]:
    """The problems among `keys` whose data are here or could be fetched; of any other, a sentence says why not."""
    found = []
    for key in keys:
        try:
            _made(TASKS[key].make)
            found.append(key)
        except ConnectionError as error:
            tqdm.write(f"{key} is left out: {error}")
    return found

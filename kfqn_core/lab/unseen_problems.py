"""Training problems for one look: they were written down before any optimizer was run on them, and nothing is chosen
on them. All data are generated."""

from __future__ import annotations

import math

import torch
from sklearn.datasets import make_friedman1
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kfqn_core.lab.further_problems import squared_error, token_cross_entropy
from kfqn_core.lab.problems import Problem

__all__ = ["chirps_cnn", "friedman_regression", "sorting_transformer"]

TRAIN, TEST = 8000, 2000


def friedman_regression() -> Problem:
    """A function of five of ten inputs, with noise (Friedman 1991): 10-128-128-128-1 with layer norm and GELU,
    mini-batches of 64. Targets are standardised, so that their mean has a loss of one."""
    inputs, targets = make_friedman1(n_samples=TRAIN + TEST, n_features=10, noise=1.0, random_state=0)
    x = torch.tensor(2 * inputs - 1, dtype=torch.float32)
    y = torch.tensor(targets, dtype=torch.float32)[:, None]
    deviation, mean = torch.std_mean(y[:TRAIN])
    y = (y - mean) / deviation

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        for d_in in (10, 128, 128):
            layers += [nn.Linear(d_in, 128), nn.LayerNorm(128), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(128, 1))

    return Problem(
        name="Friedman's function",
        make_model=model,
        x_train=x[:TRAIN],
        y_train=y[:TRAIN],
        x_test=x[TRAIN:],
        y_test=y[TRAIN:],
        loss=squared_error,
        batch_size=64,
    )


def chirps(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two noisy views `[samples, 2, 128]` of a tone whose pitch changes at one of five speeds, and which: `[samples]`.

    The tone is `cos(phase + 2 pi (f t + s t^2 / 2))` over `t` from 0 to 1, with a random phase and pitch f; the second
    view is its sine. The deviation of the noise is one, the amplitude of the tone one as well.
    """
    classes = torch.randint(5, (samples,), generator=generator)
    t = torch.linspace(0, 1, 128)
    start = 4 + 12 * torch.rand(samples, 1, generator=generator)  # periods
    phase = 2 * math.pi * torch.rand(samples, 1, generator=generator)
    speed = 6.0 * (classes[:, None] - 2)
    angle = phase + 2 * math.pi * (start * t + speed * t.square() / 2)  # [samples, 128]
    views = torch.stack([angle.cos(), angle.sin()], dim=1)
    return views + torch.randn(views.shape, generator=generator), classes


def chirps_cnn() -> Problem:
    """Three one-dimensional convolutions of 32, 64 and 64 channels, each of stride two and with batch norm, on
    `chirps`; mini-batches of 64."""
    x, y = chirps(TRAIN + TEST, torch.Generator().manual_seed(0))

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        for d_in, d_out, size in ((2, 32, 7), (32, 64, 5), (64, 64, 3)):
            layers += [nn.Conv1d(d_in, d_out, size, stride=2, padding=size // 2), nn.BatchNorm1d(d_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 5))

    return Problem(
        name="chirps CNN",
        make_model=model,
        x_train=x[:TRAIN],
        y_train=y[:TRAIN],
        x_test=x[TRAIN:],
        y_test=y[TRAIN:],
        loss=cross_entropy,
        batch_size=64,
    )


class Sorter(nn.Module):
    """Two of torch's encoder layers of width 64 with four heads, between an embedding with learned places and scores.

    Args:
        vocabulary: how many tokens there are.
        length: of a sequence.
    """

    def __init__(self, vocabulary: int, length: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 64)
        self.places = nn.Parameter(0.1 * torch.randn(length, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(64), enable_nested_tensor=False)
        self.scores = nn.Linear(64, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores `[n, length, vocabulary]` for tokens `[n, length]`."""
        return self.scores(self.encoder(self.tokens(tokens) + self.places))


def sorting_transformer() -> Problem:
    """Which token stands at which place once the sequence is sorted? A small transformer, 24 of twelve tokens,
    mini-batches of 64."""
    tokens = torch.randint(12, (TRAIN + TEST, 24), generator=torch.Generator().manual_seed(0))
    ordered = tokens.sort(dim=1).values
    return Problem(
        name="sorting transformer",
        make_model=lambda: Sorter(12, 24),
        x_train=tokens[:TRAIN],
        y_train=ordered[:TRAIN],
        x_test=tokens[TRAIN:],
        y_test=ordered[TRAIN:],
        loss=token_cross_entropy,
        batch_size=64,
    )

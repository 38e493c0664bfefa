"""What the programs of this folder share: references to be held against, and what was warned of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

newer_torch = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6 does not compile or export a model with hooks as newer ones do"
)
FORMED = {"activation_factor": "action", "refresh": 1}  # H_a is a matrix, and every step teaches it
ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}  # what the fallback is, unless a user says otherwise


def inverse_of(x: Tensor, damping: float = 0.03, *, bias: bool = True) -> Tensor:
    """`H_a` after the first step, in float64: the inverse of the mean of `a a^T` over the rows of x, plus lambda."""
    a = x.detach().double().reshape(-1, x.shape[-1])
    if bias:
        a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    return torch.linalg.inv(a.T @ a / len(a) + damping * torch.eye(a.shape[1], dtype=a.dtype))


def error(value: Tensor, truth: Tensor) -> float:
    """Relative, in the largest entry."""
    return ((value.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-30)).item()


def H_of(optimizer, name: str) -> Tensor:
    """`H_a` of a layer with one group."""
    return optimizer.layers[name].activation.H[0]


@contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings inside, as a list that is filled when the block ends."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


@contextmanager
def silence() -> Iterator[None]:
    """No warning is due inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def train(optimizer, loss: Callable[[], Tensor], steps: int) -> list[float]:
    """As one uses Adam; the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


class Shadow:
    """torch's Adam on copies of parameters, fed with the gradients that the originals get."""

    def __init__(self, *params: nn.Parameter, **settings):
        self.params = params
        self.copies = [nn.Parameter(p.detach().clone()) for p in params]
        self.adam = torch.optim.Adam(self.copies, **{**ADAM, **settings})

    def step(self) -> None:
        """To be called when the originals have their gradients."""
        for p, twin in zip(self.params, self.copies, strict=True):
            twin.grad = None if p.grad is None else p.grad.detach().clone()
        self.adam.step()

    @property
    def error(self) -> float:
        """The largest between the originals and the copies."""
        return max(error(torch.view_as_real(p) if p.is_complex() else p, torch.view_as_real(q) if q.is_complex() else q)
                   for p, q in zip(self.params, self.copies, strict=True))  # fmt: skip


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def difference(one: nn.Module, two: nn.Module) -> float:
    """The largest relative one between the parameters of two models alike."""
    return max(error(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def still(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The names of parameters that are what they were."""
    return {name for name, p in model.named_parameters() if torch.equal(p.detach(), before[name])}


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    """Linear layers with tanh between."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for d, e in pairwise(sizes):
        layers += [nn.Linear(d, e), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def randn(*shape: int, seed: int = 1, **kind) -> Tensor:
    """Normal numbers that are the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kind)


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model and its copy."""
    return model, copy.deepcopy(model)

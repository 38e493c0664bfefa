"""The two factors of layers of one shape, and what their pairs are made of: what a `Group` keeps beside momenta."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfqn_core.estimate.activation import (
    Activation,
    ActivationFactor,
    DiagonalActivationFactor,
    ExactActivationFactor,
)
from kfqn_core.estimate.gradient import GradientFactor
from kfqn_core.estimate.inverses import DenseInverse
from kfqn_core.estimate.low_rank import LowRankActivationFactor
from kfqn_core.maths.secant import LimitedMemoryInverse
from kfqn_core.training.options import Options


@dataclass(frozen=True)
class Sizes:
    """The sizes of a whole group, as the factors ask for them."""

    groups: int
    d_in: int
    d_out: int


class Factors:
    """`H_a` and `H_g` of `B` matrices of one shape.

    Args:
        kind: the form of the activation factor.
        sizes: of the matrices.
        options: of their layers.
        like: `dtype` and `device`; on "meta" they have shapes and take no memory.

    Attributes:
        activation, gradient: the factors; `gradient` is None where `H_g` is the identity.
        h_last, g_last: `[B, d_out]`, the means of the previous mini-batch where pairs come from consecutive ones, else
            None; NaN until a first one was seen.
    """

    def __init__(self, kind: str, sizes: Sizes, options: Options, like: dict[str, Any]):
        lambda_A, lambda_G = options.lambdas(1.0)
        self.activation = _activation(kind, sizes, lambda_A, options, like)
        self.gradient: GradientFactor | None = None
        self.h_last: Tensor | None = None
        self.g_last: Tensor | None = None
        if options.pairs is not None:
            self.gradient = GradientFactor(
                sizes, lambda_G, options.memory, pair_damping=options.pair_damping,
                pair_momentum=options.pair_momentum, mu1=options.mu1, **like,
            )  # fmt: skip
        if options.pairs == "next_batch":
            shape = sizes.groups, sizes.d_out
            self.h_last, self.g_last = (torch.full(shape, torch.nan, **like) for _ in range(2))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name, `[B, ...]` each."""
        last = {"h_last": self.h_last, "g_last": self.g_last}
        return {
            **self.activation.tensors(),
            **({} if self.gradient is None else self.gradient.tensors()),
            **{name: tensor for name, tensor in last.items() if tensor is not None},
        }

    def read(self) -> dict[str, Tensor]:
        """Those of them that a direction reads."""
        names = (*self.activation.read, *(() if self.gradient is None else self.gradient.read))
        tensors = self.tensors()
        return {name: tensors[name] for name in names}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Factors:
        """The same with others in the place of the tensors of these names."""
        places = {id(old): tensors[name] for name, old in self.tensors().items() if name in tensors}
        return _changed(self, lambda value: places.get(id(value), value))


def restricted(factor: Any, rows: slice) -> Any:
    """A factor whose tensors are views of some rows of those of `factor`."""
    # Damping by rows may be a list, in which that of one layer is alike.
    return _changed(factor, lambda value: value[rows][0] if isinstance(value, list) else value[rows])


def _changed(factor: Any, change: Callable[[Any], Any]) -> Any:
    """A copy with other tensors, and lists of numbers by rows, in all its parts."""
    part = copy.copy(factor)
    for name, value in vars(factor).items():
        if isinstance(value, Tensor | list):
            setattr(part, name, change(value))
        elif isinstance(value, DenseInverse | LimitedMemoryInverse | GradientFactor) or name == "activation":
            setattr(part, name, _changed(value, change))
    return part


def _activation(kind: str, sizes: Sizes, damping: float, options: Options, like: dict[str, Any]) -> Activation:
    """An activation factor of this form."""
    if kind == "diagonal":
        return DiagonalActivationFactor(sizes, damping, **like)
    if kind == "low_rank" and 2 * options.rank < sizes.d_in:  # elsewhere a matrix is smaller
        return LowRankActivationFactor(sizes, damping, options.rank, **like)
    form = ExactActivationFactor if kind == "inverse" else ActivationFactor
    return form(sizes, damping, options.activation_decay, shrunk=options.activation_factor == "auto", **like)

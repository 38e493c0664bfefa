"""What a step must cost at least: floating-point operations from the shapes of the layers alone.

A product of matrices `[m, k] [k, n]` counts 2 m k n; what is done once per entry (activations, sums, norms, Adam)
counts nothing, so that every method is held against the same floor: the forward and backward pass. With m samples, T
locations, `d_i` inputs (the bias counts) and `d_o` outputs, a layer's forward pass, its weight gradient and its input
gradient cost 2 m T d_i d_o each; the first layer needs no input gradient. A floor in operations is one in time only
where all products run in one precision: Muon's are in bfloat16, which some processors multiply much faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from kfqn_core.layers import LayerView
from kfqn_core.training.options import Options
from kfqn_core.training.plan import ROWS
from kfqn_core.training.selection import activation_factors, curvature_layers

__all__ = ["Shape", "floor", "floor_ratio", "forward_backward", "shapes"]

SAMPLED = ("auto", "low_rank", "diagonal")  # activation factors that look at part of a large mini-batch


@dataclass(frozen=True)
class Shape:
    """One layer in one mini-batch: samples m, locations T, and the sizes of each of its groups.

    `first` gets no input gradient; `diagonal_only` is `layers.LayerView`'s, of an embedding.
    """

    m: int
    T: int
    groups: int
    d_in: int
    d_out: int
    first: bool
    diagonal_only: bool = False

    @property
    def product(self) -> int:
        """2 m T d_i d_o over all groups: one pass through the layer. Looking rows up multiplies nothing."""
        return 0 if self.diagonal_only else 2 * self.m * self.T * self.groups * self.d_in * self.d_out


def shapes(model: nn.Module, x: torch.Tensor) -> list[Shape]:
    """The layers of a model that runs them one after the other, for a mini-batch `x`."""
    found: list[Shape] = []

    def watch(view: LayerView) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], h: torch.Tensor) -> None:
            T = view.outputs(h).shape[2]
            sizes = view.groups, view.d_in, view.d_out
            found.append(Shape(len(x), T, *sizes, first=not found, diagonal_only=view.diagonal_only))

        return hook

    selected = curvature_layers(model).values()
    handles = [layer.module.register_forward_hook(watch(layer.view)) for layer in selected]
    with torch.no_grad():
        model.eval()(x)
    model.train()
    for handle in handles:
        handle.remove()
    return found


def forward_backward(layers: list[Shape]) -> int:
    """One forward and backward pass: the whole step of SGD and Adam, as counted here."""
    return sum((2 if layer.first else 3) * layer.product for layer in layers)


def floor(name: str, settings: Mapping[str, Any], layers: list[Shape]) -> float | None:
    """Operations per step of a method, averaged over its period; None where no floor is stated (peers from packages).

    `name` is a key of `benchmarks.methods.METHODS`, `settings` that method's.
    """
    if name in ("sgd", "adam"):
        return forward_backward(layers)
    if name == "muon":
        return forward_backward(layers) + sum(_orthogonalise(layer) for layer in layers)
    if name.startswith(("kfqn", "kbfgs")) and settings.get("activation_factor") != "inverse":
        options = {**asdict(Options()), **settings}
        if options["activation_factor"] == "auto":
            kinds = activation_factors(layers, options["rank"])
        else:
            kinds = ["diagonal" if layer.diagonal_only else options["activation_factor"] for layer in layers]
        ours = (_quasi_newton(layer, kind, options) for layer, kind in zip(layers, kinds, strict=True))
        return forward_backward(layers) + sum(ours)
    return None


def floor_ratio(name: str, settings: Mapping[str, Any], layers: list[Shape]) -> float | None:
    """`floor` in units of one forward and backward pass."""
    flops = floor(name, settings, layers)
    return None if flops is None else flops / forward_backward(layers)


def _orthogonalise(layer: Shape) -> int:
    """Five Newton-Schulz steps on the weight without its bias: a Gram matrix, its square, and a product each."""
    weight_in = layer.d_in - 1
    k, n = sorted((weight_in, layer.groups * layer.d_out))
    return 5 * (2 * k * k * n + 2 * k**3 + 2 * k * k * n)


def _quasi_newton(layer: Shape, activation_factor: str, options: Mapping[str, Any]) -> float:
    """What KFQN adds on a layer, in a step, on average."""
    refresh, rank = options["refresh"] or 1, options["rank"]
    d_i, d_o, groups = layer.d_in, layer.d_out, layer.groups
    seen = layer.m * layer.T
    if options["activation_factor"] in SAMPLED:
        seen = math.ceil(layer.m / max(1, math.ceil(seen / ROWS))) * layer.T  # every k-th sample
    always = direction = update = 0
    if activation_factor == "low_rank" and 2 * rank < d_i:
        direction = 4 * d_o * d_i * rank  # (M B) B^T
        update = 4 * seen * d_i * rank + 8 * d_i * rank**2  # the action on `rank` vectors, and four small products
    elif activation_factor != "diagonal":  # which does everything entry by entry
        direction = 2 * d_o * d_i**2  # M H_a
        action = 4 * seen * d_i  # A s = mean of a (a . s): two products with the input
        if options["activation_decay"] is not None:
            always, action = 2 * seen * d_i**2, 2 * d_i**2  # A itself enters its running average at every step
        update = action + 2 * d_i**2 + 2 * d_i**2 + 4 * d_i**2  # H abar, H y, and a rank-2 correction
    if options["pairs"] is not None:
        memory = options["memory"]
        # A limited memory of p pairs is two products with [S; Y] on either side, and never more pairs than useful.
        apply = 2 * d_o**2 if memory is None else 8 * memory * d_o
        direction += apply * d_i
        update += apply + (4 * d_o**2 + 2 * d_o**2 if memory is None else 4 * memory**2 + 8 * memory * d_o)
    again = 0.0
    if options["pairs"] == "second_pass":
        # Forward, and backward to the pre-activations: no weight gradients.
        again = (1 if layer.first else 2) * layer.product
    return groups * (direction + always + update / refresh) + again / refresh

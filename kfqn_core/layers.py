"""A layer as `h = W a`: what every method here knows about the architecture, and all it knows.

A layer with weights acts at every *location* in the same way: it multiplies the input vector `a` it sees there by one
matrix. For a fully connected layer a location is a position in a sequence (one location if there is no sequence). The
bias is the last column of `W`, and every `a` therefore ends in a constant 1. A `LayerView` holds sizes only, never the
layer, so that keeping one keeps nothing else alive.

Conventions (notation appendix): N samples, T locations; A is a mean over samples of a *sum* over locations; means of
inputs and outputs run over both. Derived in chapter 3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

__all__ = ["LayerView", "LinearView", "UnsupportedLayer", "view"]


class UnsupportedLayer(TypeError):  # noqa: N818 - named for what it says, not for its kind
    """The layer cannot be written as `h = W a` by this package."""


class LayerView(ABC):
    """A layer seen as `groups` independent maps `h = W a`, each `[d_out, d_in]`, applied at T locations.

    Attributes: `groups`; `d_in`, per group, counting the bias coordinate; `d_out`, per group; `has_bias`;
    `weight_shape`, as the layer stores it.

    Statistics are computed and returned in float32 at least: half-precision inputs are raised before anything is
    summed over samples, because curvature estimates need the digits.
    """

    groups: int
    d_in: int
    d_out: int
    has_bias: bool
    weight_shape: tuple[int, ...]

    @abstractmethod
    def patches(self, x: Tensor) -> Tensor:
        """All input vectors `a`: `[N, groups, T, d_in]` in x's dtype. Reference; large for convolutions."""

    @abstractmethod
    def outputs(self, h: Tensor) -> Tensor:
        """The layer's output, or its gradient, as `[N, groups, T, d_out]`; `outputs(layer(x)) = patches(x) W^T`."""

    @abstractmethod
    def mean_input(self, x: Tensor) -> Tensor:
        """abar: mean of `a` over samples and locations, `[groups, d_in]`."""

    @abstractmethod
    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        """`A v` for `v` of shape `[groups, d_in]`: mean over samples of the sum over locations of `a (a . v)`.

        Costs two products with the input and forms neither A nor the patches.
        """

    def second_moment(self, x: Tensor) -> Tensor:
        """A: mean over samples of the sum over locations of `a a^T`, `[groups, d_in, d_in]`."""
        a = _at_least_float32(self.patches(x))
        rows = a.transpose(0, 1).reshape(self.groups, -1, self.d_in)
        return rows.mT @ rows / a.shape[0]

    def mean_output(self, h: Tensor) -> Tensor:
        """hbar: mean of the layer's output (or of its gradient) over samples and locations, `[groups, d_out]`."""
        return _at_least_float32(self.outputs(h)).mean(dim=(0, 2))

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[W | b]` per group, `[groups, d_out, d_in]`, from tensors shaped like the layer's parameters.

        Raises ValueError if the shapes are not the layer's, or if a bias is missing or superfluous.
        """
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, but the layer's is {self.weight_shape}; "
                "pass layer.weight or a tensor shaped like it"
            )
        if (bias is not None) != self.has_bias:
            raise ValueError(
                "the layer has a bias but None was passed; pass layer.bias or a tensor shaped like it"
                if self.has_bias
                else "the layer has no bias but one was passed; pass None"
            )
        W = weight.reshape(self.groups, self.d_out, -1)
        if bias is None:
            return W
        if bias.numel() != self.groups * self.d_out:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, but the layer's is ({self.groups * self.d_out},)")
        return torch.cat([W, bias.reshape(self.groups, self.d_out, 1)], dim=2)

    def from_matrix(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        """`(weight, bias or None)` in the layer's own shapes, from `[groups, d_out, d_in]`.

        Raises ValueError if W has another shape.
        """
        expected = (self.groups, self.d_out, self.d_in)
        if tuple(W.shape) != expected:
            raise ValueError(f"W has shape {tuple(W.shape)}, but this layer needs [groups, d_out, d_in] = {expected}")
        if not self.has_bias:
            return W.reshape(self.weight_shape), None
        return W[..., :-1].reshape(self.weight_shape), W[..., -1].reshape(-1)

    def _check_vectors(self, v: Tensor) -> None:
        if tuple(v.shape) != (self.groups, self.d_in):
            raise ValueError(
                f"v has shape {tuple(v.shape)}, but this layer needs [groups, d_in] = {(self.groups, self.d_in)}; "
                + ("the last entry belongs to the bias" if self.has_bias else "the layer has no bias coordinate")
            )


class LinearView(LayerView):
    """`nn.Linear`: one group; inputs `[N, d]`, or `[N, ..., d]` where the dimensions between are the locations."""

    def __init__(self, layer: nn.Linear) -> None:
        self.groups = 1
        self.has_bias = layer.bias is not None
        self.d_in = layer.in_features + self.has_bias
        self.d_out = layer.out_features
        self.weight_shape = (layer.out_features, layer.in_features)

    def patches(self, x: Tensor) -> Tensor:
        a = _locations(x, self.weight_shape[1], "input")
        return pad(a, (0, 1), value=1.0) if self.has_bias else a

    def outputs(self, h: Tensor) -> Tensor:
        return _locations(h, self.d_out, "output")

    def mean_input(self, x: Tensor) -> Tensor:
        mean = _at_least_float32(_locations(x, self.weight_shape[1], "input")).mean(dim=(0, 2))
        return pad(mean, (0, 1), value=1.0) if self.has_bias else mean

    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        self._check_vectors(v)
        a = _locations(x, self.weight_shape[1], "input")
        samples = a.shape[0]
        dtype = torch.promote_types(_at_least_float32(a).dtype, v.dtype)
        rows, v = a.reshape(-1, a.shape[-1]).to(dtype), v[0].to(dtype)
        if not self.has_bias:
            return ((rows @ v) @ rows)[None] / samples
        # The trailing 1 of every a, without a copy of the batch that carries it: it adds v's last entry to each a . v
        # and collects their sum.
        scores = rows @ v[:-1] + v[-1]
        return torch.cat([scores @ rows, scores.sum()[None]])[None] / samples


def view(layer: nn.Module) -> LayerView:
    """The `LayerView` of a layer.

    Accepted: `nn.Linear`, and subclasses that keep its forward and own its weight.
    Raises UnsupportedLayer (a TypeError) for anything else.
    """
    name = type(layer).__name__
    if not isinstance(layer, nn.Linear):
        raise UnsupportedLayer(
            f"{name} is not a layer that this package writes as h = W a; supported: nn.Linear. "
            "Leave its parameters to the fallback"
        )
    if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        raise UnsupportedLayer(
            f"{name} replaces the forward of nn.Linear, so h = W a may not be what it computes; "
            "use nn.Linear, or leave its parameters to the fallback"
        )
    if not isinstance(layer.weight, nn.Parameter):
        raise UnsupportedLayer(
            f"{name} computes its weight from other parameters, so h is not linear in those; "
            "remove the parametrization, or leave its parameters to the fallback"
        )
    if nn.parameter.is_lazy(layer.weight):
        raise UnsupportedLayer(f"{name} does not know its input size yet; run one forward pass first")
    return LinearView(layer)


def _locations(x: Tensor, features: int, what: str) -> Tensor:
    """`[N, ..., features]` as `[N, 1, T, features]`."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"the layer's {what} must be a real floating-point tensor, not {found}")
    if x.ndim < 2 or x.shape[-1] != features or x.numel() == 0:
        raise ValueError(
            f"the layer's {what} has shape {tuple(x.shape)}, but [N, ..., {features}] with at least one sample and "
            "one location is needed; add a batch dimension if there is none"
        )
    return x.reshape(x.shape[0], 1, math.prod(x.shape[1:-1]), features)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x

"""A layer as `h = W a`: what every method here knows about the architecture, and all it knows.

A layer with weights acts at every *location* in the same way: it multiplies the input vector `a` it sees there by one
matrix. For a fully connected layer a location is a position in a sequence (one location if there is no sequence); for a
convolution it is a position of the output, and `a` is the patch under the kernel. The bias is the last column of `W`,
and every `a` therefore ends in a constant 1. A `LayerView` holds sizes only, never the layer, so that keeping one keeps
nothing else alive.

Conventions (notation appendix): N samples, T locations; A is a mean over samples of a *sum* over locations; means of
inputs and outputs run over both. Derived in chapters 3 and 4.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

PATCH_ENTRIES = 2**24  # patches that `second_moment` holds at once: 64 MiB in float32


class UnsupportedLayer(TypeError):  # noqa: N818 - named for what it says, not for its kind
    """The layer cannot be written as `h = W a` by this package."""


@dataclass(frozen=True)
class Call:
    """What one call of a layer showed of one of its matrices.

    Attributes:
        x: the input as the `LayerView` takes it; a function that returns it where it is known only when backward has
            come to `h`.
        h: the pre-activation; or, if the layer does not show it, a tensor through which every gradient passes on its
            way to the weight.
        shows_h: whether `h` is the pre-activation itself.
    """

    x: Tensor | Callable[[], Tensor]
    h: Tensor
    shows_h: bool = True


def input_and_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call | None:
    """The call of a layer whose first argument is its input and whose output is `h`; None for anything else."""
    x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
    return Call(x, output) if isinstance(x, Tensor) and isinstance(output, Tensor) else None


class LayerView(ABC):
    """A layer seen as `groups` independent maps `h = W a`, each `[d_out, d_in]`, applied at T locations.

    Attributes: `groups`; `d_in`, per group, counting the bias coordinate; `d_out`, per group; `has_bias`;
    `weight_shape`, as the layer stores it.

    `rows_are_samples`: whether every input vector is a sample by itself to the optimizer, wherever it stands and
    however often the layer is used; else the vectors of one pass that belong to one sample are its locations (see
    `batched`).

    Statistics are computed and returned in float32 at least: half-precision inputs are raised before anything is
    summed over samples, because curvature estimates need the digits.
    """

    groups: int
    d_in: int
    d_out: int
    has_bias: bool
    weight_shape: tuple[int, ...]
    rows_are_samples = False
    diagonal_only = False
    """A has nothing off its diagonal: one entry of every `a` at most is not zero."""

    def batched(self, x: Tensor) -> Tensor:
        """`x` with its samples along axis 0: an unbatched sample becomes a batch of one.

        The rows that a fully connected layer sees are samples, each by itself, whatever the axes they are arranged in:
        `[N, T, d]`, `[T, N, d]` and `[N T, d]` are the same batch to the optimizer, and its damping the same. (The
        views themselves, and chapter 3, call the positions of a sequence locations.) Takes outputs as well, where the
        layer shows them.
        """
        return x

    def without_bias(self) -> LayerView:
        """The view of the layer whose bias is a constant that nobody trains: `a` without the trailing 1."""
        if not self.has_bias:
            return self
        other = copy.copy(self)
        other.has_bias, other.d_in = False, self.d_in - 1
        return other

    @abstractmethod
    def locations(self, x: Tensor) -> int:
        """T: at how many places the layer acts in one sample of x."""

    def patches(self, x: Tensor) -> Tensor:
        """All input vectors `a`: `[N, groups, T, d_in]` in x's dtype. Reference; large for convolutions."""
        a = self.inputs(x)
        return pad(a, (0, 1), value=1.0) if self.has_bias else a

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """`patches` without the trailing 1 of the bias, if there is one: `[N, groups, T, d_in - has_bias]`."""

    @abstractmethod
    def outputs(self, h: Tensor) -> Tensor:
        """The layer's output, or its gradient, as `[N, groups, T, d_out]`; `outputs(layer(x)) = patches(x) W^T`."""

    @abstractmethod
    def sum_output(self, h: Tensor) -> Tensor:
        """The layer's output (or its gradient) summed over samples and locations, `[groups, d_out]`."""

    @abstractmethod
    def mean_input(self, x: Tensor) -> Tensor:
        """abar: mean of `a` over samples and locations, `[groups, d_in]`."""

    @abstractmethod
    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        """`A v`: mean over samples of the sum over locations of `a (a . v)`, shaped as `v` is.

        `v` is `[groups, d_in]`, or `[groups, d_in, k]` for k vectors at once. Costs two products with the input per
        vector and forms neither A nor the patches.
        """

    def diagonal(self, x: Tensor) -> Tensor:
        """The diagonal of A, `[groups, d_in]`, without forming A: T times the mean of `a^2` (chapter 6).

        Patches only copy entries of x (and zeros, and the 1 of the bias), so that squares may be taken first.
        """
        return self.locations(x) * self.mean_input(x.to(dtype_of_sums(x)).square())

    def second_moment(self, x: Tensor) -> Tensor:
        """A: mean over samples of the sum over locations of `a a^T`, `[groups, d_in, d_in]`.

        Forms patches, but only of as many samples at a time as fit into a fixed amount of memory.
        """
        at_once = max(1, PATCH_ENTRIES // (self.locations(x) * self.groups * self.d_in))
        # The 1 of the bias stays outside of the product, whose size then is even more often than not.
        d = self.d_in - self.has_bias
        total = torch.zeros(self.groups, d, d, dtype=dtype_of_sums(x), device=x.device)
        for part in x.split(at_once):
            rows = self.inputs(part).to(total.dtype).transpose(0, 1).reshape(self.groups, -1, d)
            total += rows.mT @ rows
        if not self.has_bias:
            return total / x.shape[0]
        A = total.new_empty(self.groups, self.d_in, self.d_in)
        torch.div(total, x.shape[0], out=A[:, :-1, :-1])
        A[:, -1] = A[:, :, -1] = self.locations(x) * self.mean_input(x)
        return A

    def rows_of(self, weight: Tensor) -> Tensor:
        """`W` without its bias column, `[groups, d_out, d_in - has_bias]`, from a tensor shaped like the weight.

        A view of it where strides can say so, else a copy (transposed convolutions): read it, and write through
        neither. Kinds that store their weight in another order replace this and `weight_of`.
        """
        return weight.reshape(self.groups, self.d_out, -1)

    def weight_of(self, rows: Tensor) -> Tensor:
        """The opposite of `rows_of`: shaped like the weight, from `[groups, d_out, d_in - has_bias]`.

        A view; but a copy for transposed convolutions with groups, whose order no strides can say.
        """
        return rows.reshape(self.weight_shape)

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[W | b]` per group, `[groups, d_out, d_in]`, from tensors shaped like the layer's parameters.

        Raises TypeError for something else than real numbers in a tensor, and ValueError if the shapes are not the
        layer's, or if a bias is missing or superfluous.
        """
        check_floating(weight, "weight")
        if bias is not None:
            check_floating(bias, "bias")
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
        W = self.rows_of(weight)
        if bias is None:
            return W
        if bias.numel() != self.groups * self.d_out:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, but the layer's is ({self.groups * self.d_out},)")
        return torch.cat([W, bias.reshape(self.groups, self.d_out, 1)], dim=2)

    def from_matrix(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        """`(weight, bias or None)` in the layer's own shapes, from `[groups, d_out, d_in]`.

        Raises TypeError if W is no tensor of real numbers, and ValueError if it has another shape.
        """
        check_floating(W, "matrix W")
        expected = (self.groups, self.d_out, self.d_in)
        if tuple(W.shape) != expected:
            raise ValueError(f"W has shape {tuple(W.shape)}, but this layer needs [groups, d_out, d_in] = {expected}")
        if not self.has_bias:
            return self.weight_of(W), None
        return self.weight_of(W[..., :-1]), W[..., -1].reshape(-1)

    def check_vectors(self, v: Tensor) -> None:
        """Raise TypeError unless `v` holds real numbers, ValueError unless it is `[groups, d_in(, k)]`."""
        check_floating(v, "vector v")
        if v.dim() not in (2, 3) or tuple(v.shape[:2]) != (self.groups, self.d_in):
            raise ValueError(
                f"v has shape {tuple(v.shape)}, but this layer needs [groups, d_in] = {(self.groups, self.d_in)}, with "
                "one more dimension for several vectors; "
                + ("the last entry belongs to the bias" if self.has_bias else "the layer has no bias coordinate")
            )


@dataclass(frozen=True)
class Part:
    """One matrix `[W | b]` of a module; most modules are one.

    Attributes:
        name: `""` where the module is one matrix, else what distinguishes this one (`"in_proj"`).
        view: the matrix as `h = W a`.
        weight, bias: its parameters, as dotted names below the module; `bias` is None if there is none.
        call: from `(module, args, kwargs, output)` of a forward to what it showed, or None if it showed nothing.
        shows_h: whether calls show the pre-activation, as pairs for `H_g` need it; without it there is only `H_a`.
    """

    name: str
    view: LayerView
    weight: str = "weight"
    bias: str | None = "bias"
    call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Call | None] = input_and_output
    shows_h: bool = True


def check_floating(x: Tensor, what: str) -> None:
    """Raise TypeError unless the layer's `what` is a tensor of a real floating-point dtype."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"the layer's {what} must be a real floating-point tensor, not {found}; convert it first")


def dtype_of_sums(x: Tensor) -> torch.dtype:
    """That of x, but float32 for half precision."""
    return x.dtype if x.dtype.itemsize >= 4 else torch.float32


def unnested(x: Tensor) -> Tensor:
    """Of a batch of sequences of several lengths (a nested tensor) all positions one after the other; else x itself."""
    return x.values() if x.layout == torch.jagged else x

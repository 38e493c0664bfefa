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

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

__all__ = ["ConvView", "LayerView", "LinearView", "UnsupportedLayer", "view"]

PATCH_ENTRIES = 2**24  # patches that `second_moment` holds at once: 64 MiB in float32


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
        return self.locations(x) * self.mean_input(x.to(_dtype_of_sums(x)).square())

    def second_moment(self, x: Tensor) -> Tensor:
        """A: mean over samples of the sum over locations of `a a^T`, `[groups, d_in, d_in]`.

        Forms patches, but only of as many samples at a time as fit into a fixed amount of memory.
        """
        at_once = max(1, PATCH_ENTRIES // (self.locations(x) * self.groups * self.d_in))
        # The 1 of the bias stays outside of the product, whose size then is even more often than not.
        d = self.d_in - self.has_bias
        total = torch.zeros(self.groups, d, d, dtype=_dtype_of_sums(x), device=x.device)
        for part in x.split(at_once):
            rows = self.inputs(part).to(total.dtype).transpose(0, 1).reshape(self.groups, -1, d)
            total += rows.mT @ rows
        if not self.has_bias:
            return total / x.shape[0]
        A = total.new_empty(self.groups, self.d_in, self.d_in)
        torch.div(total, x.shape[0], out=A[:, :-1, :-1])
        A[:, -1] = A[:, :, -1] = self.locations(x) * self.mean_input(x)
        return A

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
        if v.dim() not in (2, 3) or tuple(v.shape[:2]) != (self.groups, self.d_in):
            raise ValueError(
                f"v has shape {tuple(v.shape)}, but this layer needs [groups, d_in] = {(self.groups, self.d_in)}, with "
                "one more dimension for several vectors; "
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

    def locations(self, x: Tensor) -> int:
        _check_rows(x, self.weight_shape[1], "input")
        return math.prod(x.shape[1:-1])

    def inputs(self, x: Tensor) -> Tensor:
        return _rows(x, self.weight_shape[1], "input")

    def outputs(self, h: Tensor) -> Tensor:
        return _rows(h, self.d_out, "output")

    def sum_output(self, h: Tensor) -> Tensor:
        _check_rows(h, self.d_out, "output")
        return h.reshape(-1, self.d_out).sum(0, keepdim=True, dtype=_dtype_of_sums(h))

    def mean_input(self, x: Tensor) -> Tensor:
        _check_rows(x, self.weight_shape[1], "input")
        mean = x.reshape(-1, x.shape[-1]).mean(0, keepdim=True, dtype=_dtype_of_sums(x))
        return pad(mean, (0, 1), value=1.0) if self.has_bias else mean

    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        self._check_vectors(v)
        _check_rows(x, self.weight_shape[1], "input")
        samples = x.shape[0]
        dtype = torch.promote_types(_dtype_of_sums(x), v.dtype)
        rows, V = x.reshape(-1, x.shape[-1]).to(dtype), v.reshape(self.d_in, -1).to(dtype)
        # The trailing 1 of every a, without a copy of the batch that carries it: it adds V's last row to each a . v and
        # collects their sum.
        if self.has_bias:
            scores = torch.addmm(V[-1:], rows, V[:-1], beta=1 / samples, alpha=1 / samples)
            return torch.cat([rows.mT @ scores, scores.sum(0, keepdim=True)]).view(v.shape)
        return (rows.mT @ (rows @ V / samples)).view(v.shape)


class ConvView(LayerView):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with any stride, padding, dilation and groups; inputs `[N, C, *spatial]`.

    `a` is a patch, ordered (channel, kernel position) as the weight is stored, then the 1 of the bias. Patches overlap
    and are many times larger than the input; only `inputs`, `patches` and `second_moment` form them. The rest is
    convolutions (derived in chapter 4): `a . v` at all locations is the convolution with the single filter v, and a sum
    over locations of `a` times a score is the weight gradient of that convolution.
    """

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.groups = layer.groups
        self.has_bias = layer.bias is not None
        self.d_in = layer.weight[0].numel() + self.has_bias
        self.d_out = layer.out_channels // layer.groups
        self.weight_shape = tuple(layer.weight.shape)
        self.kernel, self.stride, self.dilation = (
            tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation)
        )  # fmt: skip
        self._channels = layer.in_channels
        self._padding = _padding(layer)
        self._padding_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        axes = zip(self.kernel, self.dilation, self._padding, strict=True)
        self._smallest = [_smallest_size(*axis, layer.padding_mode) for axis in axes]

    def locations(self, x: Tensor) -> int:
        self._check_images(x, self._channels, self._smallest, "input")
        return math.prod(self._grid(x))

    def inputs(self, x: Tensor) -> Tensor:
        a, rank = self._padded(x), len(self.kernel)
        axes = zip(self._grid(x), self.kernel, self.stride, self.dilation, strict=True)
        for axis, (T, kernel, stride, dilation) in enumerate(axes):
            # The index pattern of one axis: location t and kernel position k meet at
            # t stride + k dilation of the padded input. The axes before this one
            # already take two dimensions each.
            t, k = torch.arange(T, device=x.device), torch.arange(kernel, device=x.device)
            pattern = t[:, None] * stride + k * dilation
            dim = 2 + 2 * axis
            a = a.index_select(dim, pattern.flatten()).unflatten(dim, pattern.shape)
        a = a.unflatten(1, (self.groups, -1))  # [N, groups, C, T1, K1, T2, K2, ...]
        locations, kernels = range(3, 3 + 2 * rank, 2), range(4, 4 + 2 * rank, 2)
        return a.permute(0, 1, *locations, 2, *kernels).flatten(2, 1 + rank).flatten(3)

    def outputs(self, h: Tensor) -> Tensor:
        self._check_images(h, self.groups * self.d_out, [1] * len(self.kernel), "output")
        return h.flatten(2).unflatten(1, (self.groups, self.d_out)).transpose(2, 3)

    def sum_output(self, h: Tensor) -> Tensor:
        self._check_images(h, self.groups * self.d_out, [1] * len(self.kernel), "output")
        # Locations first: they usually lie side by side, and one sum over both axes reads memory at half the speed.
        return h.flatten(2).sum(-1, dtype=_dtype_of_sums(h)).sum(0).reshape(self.groups, self.d_out)

    def mean_input(self, x: Tensor) -> Tensor:
        T = self.locations(x)
        # Padding and patches are linear in x: the mean over samples comes first, and one sample is convolved.
        mean = x.mean(0, keepdim=True, dtype=_dtype_of_sums(x))
        ones = mean.new_ones(1, self.groups, *self._grid(x))
        total = self._weight_gradient(self._padded(mean), ones)[..., 0] / T
        return pad(total, (0, 1), value=1.0) if self.has_bias else total

    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        self._check_vectors(v)
        self._check_images(x, self._channels, self._smallest, "input")
        dtype = torch.promote_types(_dtype_of_sums(x), v.dtype)
        V = v.reshape(self.groups, self.d_in, -1).to(dtype)
        filters, bias = (V[:, :-1], V[:, -1].flatten()) if self.has_bias else (V, None)
        few_positions = math.prod(self.kernel) <= self._channels // self.groups
        if V.shape[-1] == 1 and few_positions and max(self.stride) == 1:
            scores, total = self._scores_by_shifts(x.to(dtype), filters, bias)
        else:
            x = self._padded(x).to(dtype)
            filters = filters.mT.reshape(-1, *self.weight_shape[1:])
            zeros = [0] * len(self.kernel)
            scores = torch.convolution(
                x, filters, bias, self.stride, zeros, self.dilation, False, zeros, self.groups
            )  # [N, groups * k, *T], every a . v
            total = self._weight_gradient(x, scores)
        if self.has_bias:
            sums = scores.flatten(2).sum(dim=(0, 2)).reshape(self.groups, 1, -1)
            total = torch.cat([total, sums], dim=1)
        return (total / x.shape[0]).reshape(v.shape)

    def _scores_by_shifts(self, x: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """`a . v` at all locations `[N, groups, *T]`, and the sum over them of patch times score, `[groups, d, 1]`.

        For one vector per group and stride 1. Channels are summed first, in matrix products with x that have one row
        for each kernel position; the sum over positions then is one of shifted maps. A
        convolution with a single filter does the same at a lower rate (an exercise of chapter 4).
        """
        zeros = self._padding_mode == "constant"  # the maps of zeros are zeros, and fewer than channels
        x = x if zeros else self._padded(x)
        outside = [side if zeros else 0 for axis in reversed(self._padding) for side in axis]
        N, K, rank = x.shape[0], math.prod(self.kernel), len(self.kernel)
        pixels = x.reshape(N, self.groups, -1, math.prod(x.shape[2:]))
        maps = v.reshape(self.groups, -1, K).mT @ pixels
        maps = pad(maps.reshape(N, self.groups, *self.kernel, *x.shape[2:]), outside)
        grid = [
            size - d * (k - 1) for size, d, k in zip(maps.shape[2 + rank :], self.dilation, self.kernel, strict=True)
        ]
        steps = maps.stride()
        reach = [k + d * t for k, d, t in zip(steps[2 : 2 + rank], self.dilation, steps[2 + rank :], strict=True)]
        shifted = (N, self.groups, *self.kernel, *grid), (*steps[:2], *reach, *steps[2 + rank :])
        # Copied side by side first: a sum over strided axes is several times slower than both.
        scores = maps.as_strided(*shifted).flatten(2, 1 + rank).sum(2)
        if bias is not None:
            scores = scores + bias.reshape(-1, *[1] * rank)
        back = torch.zeros_like(maps)
        back.as_strided(*shifted).copy_(scores.reshape(N, self.groups, *[1] * rank, *grid))
        back = pad(back, [-side for side in outside]).reshape(N, self.groups, K, -1)
        return scores, (back @ pixels.mT).sum(0).mT.reshape(self.groups, -1, 1)

    def _weight_gradient(self, x: Tensor, scores: Tensor) -> Tensor:
        """Sum over samples and locations of patch times score, `[groups, d_in without bias, k]`."""
        zeros = [0] * len(self.kernel)
        geometry = (self.stride, zeros, self.dilation, False, zeros, self.groups)
        filters = x.new_empty(scores.shape[1], *self.weight_shape[1:])
        needed = [False, True, False]  # not the gradients of the input and of the bias
        _, gradient, _ = torch.ops.aten.convolution_backward(
            scores, x, filters, None, *geometry, needed
        )  # fmt: skip
        return gradient.reshape(self.groups, scores.shape[1] // self.groups, -1).mT

    def _grid(self, x: Tensor) -> list[int]:
        """Locations along each axis; their product is T."""
        axes = zip(x.shape[2:], self._padding, self.kernel, self.stride, self.dilation, strict=True)
        return [
            (size + sum(sides) - dilation * (kernel - 1) - 1) // stride + 1
            for size, sides, kernel, stride, dilation in axes
        ]

    def _padded(self, x: Tensor) -> Tensor:
        self._check_images(x, self._channels, self._smallest, "input")
        sides = [side for axis in reversed(self._padding) for side in axis]  # `pad` wants the last axis first
        return pad(x, sides, mode=self._padding_mode) if any(sides) else x

    def _check_images(self, x: Tensor, channels: int, smallest: list[int], what: str) -> None:
        _check_floating(x, what)
        fits = x.ndim == 2 + len(smallest) and x.shape[0] > 0 and x.shape[1] == channels
        if not fits or any(size < least for size, least in zip(x.shape[2:], smallest, strict=True)):
            sizes = ", ".join(f"at least {least}" for least in smallest)
            raise ValueError(
                f"the layer's {what} has shape {tuple(x.shape)}, but [N, {channels}, {sizes}] with at least one sample "
                "is needed; add a batch dimension if there is none"
            )


SUPPORTED: dict[type[nn.Module], type[LayerView]] = {
    nn.Linear: LinearView,
    nn.Conv1d: ConvView,
    nn.Conv2d: ConvView,
    nn.Conv3d: ConvView,
}


def view(layer: nn.Module) -> LayerView:
    """The `LayerView` of a layer.

    Accepted: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, and subclasses that keep their forward and own their
    weight. Raises UnsupportedLayer (a TypeError) for anything else.
    """
    name = type(layer).__name__
    base = next((kind for kind in SUPPORTED if isinstance(layer, kind)), None)
    if base is None:
        raise UnsupportedLayer(
            f"{name} is not a layer that this package writes as h = W a; supported: "
            f"{', '.join(f'nn.{kind.__name__}' for kind in SUPPORTED)}. Leave its parameters to the fallback"
        )
    for method in ("forward", "_conv_forward"):
        if getattr(type(layer), method, None) is not getattr(base, method, None) or method in vars(layer):
            raise UnsupportedLayer(
                f"{name} replaces the forward of nn.{base.__name__}, so h = W a may not be what it computes; "
                f"use nn.{base.__name__}, or leave its parameters to the fallback"
            )
    if not isinstance(layer.weight, nn.Parameter):
        raise UnsupportedLayer(
            f"{name} computes its weight from other parameters, so h is not linear in those; "
            "remove the parametrization, or leave its parameters to the fallback"
        )
    if nn.parameter.is_lazy(layer.weight):
        raise UnsupportedLayer(f"{name} does not know its input size yet; run one forward pass first")
    return SUPPORTED[base](layer)  # type: ignore[call-arg]


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """What is added before and after each axis."""
    if layer.padding == "valid":
        return [(0, 0) for _ in layer.kernel_size]
    if layer.padding == "same":
        reach = [dilation * (k - 1) for dilation, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in reach]
    return [(p, p) for p in layer.padding if isinstance(p, int)]


def _smallest_size(kernel: int, dilation: int, sides: tuple[int, int], mode: str) -> int:
    """The smallest input along one axis: the kernel must fit, and some paddings are made from the input itself."""
    source = {"reflect": max(sides) + 1, "circular": max(sides)}.get(mode, 1)
    return max(1, source, dilation * (kernel - 1) + 1 - sum(sides))


def _rows(x: Tensor, features: int, what: str) -> Tensor:
    """`[N, ..., features]` as `[N, 1, T, features]`."""
    _check_rows(x, features, what)
    return x.reshape(x.shape[0], 1, math.prod(x.shape[1:-1]), features)


def _check_rows(x: Tensor, features: int, what: str) -> None:
    _check_floating(x, what)
    if x.ndim < 2 or x.shape[-1] != features or x.numel() == 0:
        raise ValueError(
            f"the layer's {what} has shape {tuple(x.shape)}, but [N, ..., {features}] with at least one sample and "
            "one location is needed; add a batch dimension if there is none"
        )


def _check_floating(x: Tensor, what: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"the layer's {what} must be a real floating-point tensor, not {found}")


def _dtype_of_sums(x: Tensor) -> torch.dtype:
    """That of x, but float32 for half precision."""
    return x.dtype if x.dtype.itemsize >= 4 else torch.float32

"""Transposed convolutions as `h = W a`, where `a` is what of the input meets the kernel at an output location."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kfqn_core.layers.convolution import ConvView
from kfqn_core.layers.view import Call, input_and_output


class TransposedConvView(ConvView):
    """`nn.ConvTranspose1d`, `2d`, `3d` with any stride, padding, output padding, dilation and groups.

    Inputs are `[N, C, *spatial]`. The layer writes every input entry, times the kernel, into its output: along one axis

        h[p] = sum_c sum_k W[c, k] x[c, i]    over the i with   i * stride - padding + k * dilation = p.

    Read at an output location p this is `W a` with

        a[c, k] = x[c, (p + padding - k * dilation) / stride]    where that is an index of x, and 0 where it is none:

    the patch that an ordinary convolution with a flipped kernel would see in the input with `stride - 1` zeros between
    its entries. So there are as many locations as outputs; `a` is ordered (channel, kernel position), then the 1 of the
    bias; and `W`, per group, is the weight `[C_in / groups, d_out, *kernel]` with its first two axes exchanged.

    Everything else follows as for convolutions (chapter 4): `h` is linear in the weight, so `a . v` at all locations is
    the same layer with v for its only output channel, and a sum over locations of `a` times a score is the weight
    gradient of that layer. Neither forms the input with zeros between, nor patches of it.
    """

    _is_pointwise = False

    def __init__(self, layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> None:
        self.groups = layer.groups
        self.has_bias = layer.bias is not None
        self.weight_shape = tuple(layer.weight.shape)  # [C_in, d_out, *kernel]
        self.kernel, self.stride, self.dilation = (
            tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation)
        )  # fmt: skip
        self._channels = layer.in_channels
        self.d_in = self._channels // self.groups * math.prod(self.kernel) + self.has_bias
        self.d_out = layer.out_channels // layer.groups
        self._crop: tuple[int, ...] = tuple(layer.padding)  # type: ignore[arg-type]
        self._more: tuple[int, ...] = tuple(layer.output_padding)
        # The smallest input with an output: (size - 1) stride + 1 + extra >= 1, extra being what size does not change.
        extra = self._grid_of([1] * len(self.kernel))
        self._smallest = [max(1, 1 - (e - 1) // s) for e, s in zip(extra, self.stride, strict=True)]

    def has_default_size(self, x: Tensor, h: Tensor) -> bool:
        """Whether `h` `[N, C_out, *spatial]` is as large as the layer's own output padding makes it of `x`."""
        return self._grid(x) == list(h.shape[2:])

    def inputs(self, x: Tensor) -> Tensor:
        self._check_images(x, self._channels, self._smallest, "input")
        rank = len(self.kernel)
        a = pad(x, [0, 1] * rank)  # a zero behind each axis: what is met where there is no entry
        axes = zip(self._grid(x), x.shape[2:], self.kernel, self.stride, self.dilation, self._crop, strict=True)
        for axis, (T, size, kernel, stride, dilation, crop) in enumerate(axes):
            p, k = torch.arange(T, device=x.device), torch.arange(kernel, device=x.device)
            position = p[:, None] + crop - k * dilation
            met = (position % stride == 0) & (position >= 0) & (position < size * stride)
            pattern = torch.where(met, position // stride, size)
            dim = 2 + 2 * axis  # the axes before this one already take two dimensions each
            a = a.index_select(dim, pattern.flatten()).unflatten(dim, pattern.shape)
        a = a.unflatten(1, (self.groups, -1))  # [N, groups, C, T1, K1, T2, K2, ...]
        locations, kernels = range(3, 3 + 2 * rank, 2), range(4, 4 + 2 * rank, 2)
        return a.permute(0, 1, *locations, 2, *kernels).flatten(2, 1 + rank).flatten(3)

    def rows_of(self, weight: Tensor) -> Tensor:
        # [groups * c, d_out, *kernel] -> [groups, c, d_out, K] -> [groups, d_out, c, K] -> [groups, d_out, c K]
        return weight.reshape(self.groups, -1, self.d_out, math.prod(self.kernel)).transpose(1, 2).flatten(2)

    def weight_of(self, rows: Tensor) -> Tensor:
        # [groups, d_out, c K] -> [groups, d_out, c, *kernel] -> [groups, c, d_out, *kernel] -> [groups * c, ...]
        return rows.unflatten(2, (-1, *self.kernel)).transpose(1, 2).flatten(0, 1)

    def _scores_and_total(self, x: Tensor, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        # [groups, c K, k] -> [groups, c, K, k] -> [groups, c, k, K] -> [C_in, k, *kernel]
        filters = V.unflatten(1, (-1, math.prod(self.kernel))).mT.reshape(self._channels, -1, *self.kernel)
        scores = torch.convolution(
            x, filters, bias, self.stride, self._crop, self.dilation, True, self._more, self.groups
        )  # [N, groups * k, *T]
        return scores, self.weight_gradient(x, scores)

    def weight_gradient(self, x: Tensor, scores: Tensor) -> Tensor:
        """As for convolutions; `x` comes as it is, since nothing is padded."""
        k = scores.shape[1] // self.groups
        filters = x.new_empty(self._channels, k, *self.kernel)
        geometry = (self.stride, self._crop, self.dilation, True, self._more, self.groups)
        needed = [False, True, False]  # not the gradients of the input and of the bias
        _, gradient, _ = torch.ops.aten.convolution_backward(scores, x, filters, None, *geometry, needed)
        # [C_in, k, *kernel] -> [groups, c, k, K] -> [groups, c, K, k] -> [groups, c K, k]
        return gradient.reshape(self.groups, -1, k, math.prod(self.kernel)).mT.flatten(1, 2)

    def _grid(self, x: Tensor) -> list[int]:
        return self._grid_of(x.shape[2:])

    def _grid_of(self, sizes: Sequence[int]) -> list[int]:
        axes = zip(sizes, self.stride, self._crop, self.dilation, self.kernel, self._more, strict=True)
        return [
            (size - 1) * stride - 2 * crop + dilation * (kernel - 1) + more + 1
            for size, stride, crop, dilation, kernel, more in axes
        ]

    def _padded(self, x: Tensor) -> Tensor:
        self._check_images(x, self._channels, self._smallest, "input")
        return x


def call_of_default_size(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call | None:
    """The call of a transposed convolution; None where `output_size` asked for another size than the default one.

    Such a call has other locations than the layer's own output padding says, and what they see is not in x alone.
    """
    call = input_and_output(module, args, kwargs, output)
    if call is None or (len(args) < 2 and kwargs.get("output_size") is None):
        return call
    assert isinstance(call.x, Tensor)
    view = TransposedConvView(module)  # type: ignore[arg-type]
    return call if view.has_default_size(view.batched(call.x), view.batched(call.h)) else None

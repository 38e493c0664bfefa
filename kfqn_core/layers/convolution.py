"""Convolutions as `h = W a`, where `a` is a patch that is never formed (chapter 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kfqn_core.layers.view import LayerView, check_floating, dtype_of_sums


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
        # Patches are pixels then, and `a . v` a product of matrices.
        self._is_pointwise = math.prod(self.kernel) == 1 and not any(map(any, self._padding))

    def batched(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == 1 + len(self.kernel) else x  # [C, *spatial] -> [1, C, *spatial]

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
        # [N, groups d_out, *T] -> [N, groups, d_out, T] -> [N, groups, T, d_out]
        return h.flatten(2).unflatten(1, (self.groups, self.d_out)).transpose(2, 3)

    def sum_output(self, h: Tensor) -> Tensor:
        self._check_images(h, self.groups * self.d_out, [1] * len(self.kernel), "output")
        # Locations first: they usually lie side by side, and one sum over both axes reads memory at half the speed.
        # [N, groups d_out, *T] -> [N, groups d_out] -> [groups, d_out]
        return h.flatten(2).sum(-1, dtype=dtype_of_sums(h)).sum(0).reshape(self.groups, self.d_out)

    def mean_input(self, x: Tensor) -> Tensor:
        T = self.locations(x)
        if self._is_pointwise:
            mean = self._pixels(x).mean(dim=(0, 3), dtype=dtype_of_sums(x))  # [N, groups, C, T] -> [groups, C]
            return pad(mean, (0, 1), value=1.0) if self.has_bias else mean
        # Padding and patches are linear in x: the mean over samples comes first, and one sample is convolved.
        mean = x.mean(0, keepdim=True, dtype=dtype_of_sums(x))
        ones = mean.new_ones(1, self.groups, *self._grid(x))
        total = self.weight_gradient(self._padded(mean), ones)[..., 0] / T
        return pad(total, (0, 1), value=1.0) if self.has_bias else total

    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        self.check_vectors(v)
        self._check_images(x, self._channels, self._smallest, "input")
        dtype = torch.promote_types(dtype_of_sums(x), v.dtype)
        V = v.reshape(self.groups, self.d_in, -1).to(dtype)  # [groups, d_in, k]
        V, bias = (V[:, :-1], V[:, -1].flatten()) if self.has_bias else (V, None)
        scores, total = self._scores_and_total(x.to(dtype), V, bias)
        if self.has_bias:
            sums = scores.flatten(2).sum(dim=(0, 2)).reshape(self.groups, 1, -1)  # [N, groups k, T] -> [groups, 1, k]
            total = torch.cat([total, sums], dim=1)
        return (total / x.shape[0]).reshape(v.shape)

    def _scores_and_total(self, x: Tensor, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """`a . v` at all locations `[N, groups * k, *T]`, and the sum over them of patch times score `[groups, d, k]`.

        For k vectors per group, `V` `[groups, d, k]` with their biases `[groups * k]`.
        """
        if self._is_pointwise:
            pixels = self._pixels(x)
            scores = V.mT @ pixels  # [groups, k, C] @ [N, groups, C, T] -> [N, groups, k, T]
            if bias is not None:
                scores = scores + bias.view(self.groups, -1, 1)
            return scores.flatten(1, 2), (pixels @ scores.mT).sum(0)
        few_positions = math.prod(self.kernel) <= self._channels // self.groups
        if V.shape[-1] == 1 and few_positions and max(self.stride) == 1:
            return self._scores_by_shifts(x, V, bias)
        x = self._padded(x)
        filters = V.mT.reshape(-1, *self.weight_shape[1:])
        zeros = [0] * len(self.kernel)
        scores = torch.convolution(x, filters, bias, self.stride, zeros, self.dilation, False, zeros, self.groups)
        return scores, self.weight_gradient(x, scores)

    def _pixels(self, x: Tensor) -> Tensor:
        """The pixels that a kernel of one position meets, `[N, groups, C, T]`."""
        for axis, step in enumerate(self.stride):
            x = x[(slice(None),) * (2 + axis) + (slice(None, None, step),)]
        return x.flatten(2).unflatten(1, (self.groups, -1))

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

    def weight_gradient(self, x: Tensor, scores: Tensor) -> Tensor:
        """Sum over samples and locations of patch times score, `[groups, d_in without bias, k]` (chapter 4).

        Args:
            x: the padded input, `[N, C, *spatial]`.
            scores: of k filters for each group, `[N, groups * k, *T]`.
        """
        zeros = [0] * len(self.kernel)
        geometry = (self.stride, zeros, self.dilation, False, zeros, self.groups)
        filters = x.new_empty(scores.shape[1], *self.weight_shape[1:])
        needed = [False, True, False]  # not the gradients of the input and of the bias
        _, gradient, _ = torch.ops.aten.convolution_backward(scores, x, filters, None, *geometry, needed)
        return gradient.reshape(self.groups, scores.shape[1] // self.groups, -1).mT  # [groups, k, d] -> [groups, d, k]

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
        check_floating(x, what)
        fits = x.ndim == 2 + len(smallest) and x.shape[0] > 0 and x.shape[1] == channels
        if not fits or any(size < least for size, least in zip(x.shape[2:], smallest, strict=True)):
            sizes = ", ".join(f"at least {least}" for least in smallest)
            raise ValueError(
                f"the layer's {what} has shape {tuple(x.shape)}, but [N, {channels}, {sizes}] with at least one sample "
                "is needed; add a batch dimension if there is none"
            )


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

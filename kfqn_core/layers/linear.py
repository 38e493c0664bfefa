"""Fully connected layers as `h = W a` (chapter 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kfqn_core.layers.view import LayerView, check_floating, dtype_of_sums


class LinearView(LayerView):
    """`nn.Linear`: one group; inputs `[N, d]`, or `[N, ..., d]` where the dimensions between are the locations."""

    def __init__(self, layer: nn.Linear) -> None:
        self.groups = 1
        self.has_bias = layer.bias is not None
        self.d_in = layer.in_features + self.has_bias
        self.d_out = layer.out_features
        self.weight_shape = (layer.out_features, layer.in_features)

    def batched(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])  # [N, ..., d] -> [N T, d]; [d] -> [1, d]

    def locations(self, x: Tensor) -> int:
        _check_rows(x, self.weight_shape[1], "input")
        return math.prod(x.shape[1:-1])

    def inputs(self, x: Tensor) -> Tensor:
        return _rows(x, self.weight_shape[1], "input")

    def outputs(self, h: Tensor) -> Tensor:
        return _rows(h, self.d_out, "output")

    def sum_output(self, h: Tensor) -> Tensor:
        _check_rows(h, self.d_out, "output")
        return h.reshape(-1, self.d_out).sum(0, keepdim=True, dtype=dtype_of_sums(h))

    def mean_input(self, x: Tensor) -> Tensor:
        _check_rows(x, self.weight_shape[1], "input")
        mean = x.reshape(-1, x.shape[-1]).mean(0, keepdim=True, dtype=dtype_of_sums(x))
        return pad(mean, (0, 1), value=1.0) if self.has_bias else mean

    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        self.check_vectors(v)
        _check_rows(x, self.weight_shape[1], "input")
        samples = x.shape[0]
        dtype = torch.promote_types(dtype_of_sums(x), v.dtype)
        rows, V = x.reshape(-1, x.shape[-1]).to(dtype), v.reshape(self.d_in, -1).to(dtype)
        # The trailing 1 of every a, without a copy of the batch that carries it: it adds V's last row to each a . v and
        # collects their sum.
        if self.has_bias:
            scores = torch.addmm(V[-1:], rows, V[:-1], beta=1 / samples, alpha=1 / samples)
            return torch.cat([rows.mT @ scores, scores.sum(0, keepdim=True)]).view(v.shape)
        return (rows.mT @ (rows @ V / samples)).view(v.shape)


def _rows(x: Tensor, features: int, what: str) -> Tensor:
    """`[N, ..., features]` as `[N, 1, T, features]`."""
    _check_rows(x, features, what)
    return x.reshape(x.shape[0], 1, math.prod(x.shape[1:-1]), features)


def _check_rows(x: Tensor, features: int, what: str) -> None:
    check_floating(x, what)
    if x.ndim < 2 or x.shape[-1] != features or x.numel() == 0:
        raise ValueError(
            f"the layer's {what} has shape {tuple(x.shape)}, but [N, ..., {features}] with at least one sample and "
            "one location is needed; add a batch dimension if there is none"
        )

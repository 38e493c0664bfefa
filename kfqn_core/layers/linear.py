"""Fully connected layers as `h = W a` (chapter 3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kfqn_core.layers.view import LayerView, check_floating, dtype_of_sums, unnested


class LinearView(LayerView):
    """`nn.Linear`, or any `h = W x + b` with a weight `[d_out, d]`: one group.

    Inputs are `[N, d]`, or `[N, ..., d]` where the dimensions between are the locations.
    """

    rows_are_samples = True

    features: int

    def __init__(self, layer: Any) -> None:
        self._set_sizes(layer.weight, getattr(layer, "bias", None) is not None)

    @classmethod
    def of(cls, weight: Tensor, *, has_bias: bool) -> LinearView:
        """The view of a matrix that is not a layer by itself."""
        new = cls.__new__(cls)
        cls._set_sizes(new, weight, has_bias)
        return new

    def _set_sizes(self, weight: Tensor, has_bias: bool) -> None:
        self.groups, self.has_bias = 1, has_bias
        self.weight_shape = tuple(weight.shape)
        self.d_out, self.features = self.weight_shape
        self.d_in = self.features + has_bias

    def batched(self, x: Tensor) -> Tensor:
        x = unnested(x)
        return x.reshape(-1, x.shape[-1])  # [N, ..., d] -> [N T, d]; [d] -> [1, d]

    def locations(self, x: Tensor) -> int:
        check_rows(x, self.features, "input")
        return math.prod(x.shape[1:-1])

    def inputs(self, x: Tensor) -> Tensor:
        return as_rows(x, self.features, "input")

    def outputs(self, h: Tensor) -> Tensor:
        return as_rows(h, self.d_out, "output")

    def sum_output(self, h: Tensor) -> Tensor:
        check_rows(h, self.d_out, "output")
        return h.reshape(-1, self.d_out).sum(0, keepdim=True, dtype=dtype_of_sums(h))  # [N T, d_out] -> [1, d_out]

    def mean_input(self, x: Tensor) -> Tensor:
        check_rows(x, self.features, "input")
        mean = x.reshape(-1, x.shape[-1]).mean(0, keepdim=True, dtype=dtype_of_sums(x))  # [N T, d] -> [1, d]
        return pad(mean, (0, 1), value=1.0) if self.has_bias else mean

    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        self.check_vectors(v)
        check_rows(x, self.features, "input")
        samples = x.shape[0]
        dtype = torch.promote_types(dtype_of_sums(x), v.dtype)
        rows, V = x.reshape(-1, x.shape[-1]).to(dtype), v.reshape(self.d_in, -1).to(dtype)  # [N T, d], [d_in, k]
        # The trailing 1 of every a, without a copy of the batch that carries it: it adds V's last row to each a . v and
        # collects their sum.
        if self.has_bias:
            scores = torch.addmm(V[-1:], rows, V[:-1], beta=1 / samples, alpha=1 / samples)
            return torch.cat([rows.mT @ scores, scores.sum(0, keepdim=True)]).view(v.shape)
        return (rows.mT @ (rows @ V / samples)).view(v.shape)


class TransposedLinearView(LinearView):
    """`h = x W + b` with a weight `[d, d_out]`, the transpose of what `nn.Linear` stores.

    Hugging Face's `Conv1D` (GPT-2) is one. The matrix of the book is the weight's transpose, and nothing else changes.
    """

    def _set_sizes(self, weight: Tensor, has_bias: bool) -> None:
        super()._set_sizes(weight, has_bias)
        self.features, self.d_out = self.weight_shape
        self.d_in = self.features + has_bias

    def rows_of(self, weight: Tensor) -> Tensor:
        return weight.mT.unsqueeze(0)  # [d, d_out] -> [1, d_out, d]

    def weight_of(self, rows: Tensor) -> Tensor:
        return rows.squeeze(0).mT  # [1, d_out, d] -> [d, d_out]


def as_rows(x: Tensor, features: int, what: str) -> Tensor:
    """`[N, ..., features]` as `[N, 1, T, features]`."""
    check_rows(x, features, what)
    return x.reshape(x.shape[0], 1, math.prod(x.shape[1:-1]), features)


def check_rows(x: Tensor, features: int, what: str) -> None:
    """Raise unless `x` is `[N, ..., features]`, real and not empty."""
    check_floating(x, what)
    if x.ndim < 2 or x.shape[-1] != features or x.numel() == 0:
        raise ValueError(
            f"the layer's {what} has shape {tuple(x.shape)}, but [N, ..., {features}] with at least one sample and "
            "one location is needed; add a batch dimension if there is none"
        )

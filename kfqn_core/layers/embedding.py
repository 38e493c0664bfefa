"""Embeddings as `h = W a`, where `a` is one-hot."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kfqn_core.layers.linear import as_rows, check_rows
from kfqn_core.layers.view import LayerView, UnsupportedLayer, dtype_of_sums, unnested


class EmbeddingView(LayerView):
    """`nn.Embedding`: inputs are indices, `[N]` or `[N, ...]` where the dimensions behind are the locations.

    The row that index j picks is `h = W a` with `a = e_j` and W the transposed weight, `[d_out, V]`. Two different
    entries of a one-hot vector are never both 1, so that `A = E[sum_t a a^T]` is diagonal, and what stands there is how
    often each index occurs in a sample: T times its frequency, which also is the mean of `a`. Everything there is to
    know of A are V numbers, counted once per mini-batch.

    `padding_idx`: the gradient of that row is zero whatever was looked up, as if `a` were zero there. So padding counts
    as a location that sees nothing: it adds nothing to any statistic, and N and T are what they are. (`W a` then is
    not the padding row but zero, which is what that row holds unless somebody wrote into it.)
    """

    rows_are_samples = True

    diagonal_only = True

    def __init__(self, layer: nn.Embedding) -> None:
        reasons = {
            "sparse=True": (layer.sparse, "its gradient is no dense matrix; use sparse=False"),
            "max_norm": (layer.max_norm is not None, "it changes its weight in every forward pass; use max_norm=None"),
            "scale_grad_by_freq=True": (layer.scale_grad_by_freq, "its gradient is not that of the loss"),
        }
        for option, (in_use, reason) in reasons.items():
            if in_use:
                raise UnsupportedLayer(
                    f"{type(layer).__name__} with {option} is not h = W a: {reason}, or leave its parameters to the "
                    "fallback"
                )
        self.groups = 1
        self.has_bias = False
        self.d_in, self.d_out = layer.num_embeddings, layer.embedding_dim
        self.weight_shape = tuple(layer.weight.shape)
        self._padding_idx = layer.padding_idx
        self._dtype = dtype_of_sums(layer.weight)  # indices have none that could be that of their statistics

    def batched(self, x: Tensor) -> Tensor:
        x = unnested(x)
        if x.is_floating_point():
            return x.reshape(-1, self.d_out)  # outputs: [N, ..., d_out] -> [N T, d_out]
        return x.reshape(-1)  # [N, ...] -> [N T]

    def locations(self, x: Tensor) -> int:
        self._check_indices(x)
        return math.prod(x.shape[1:])

    def inputs(self, x: Tensor) -> Tensor:
        self._check_indices(x)
        one_hot = (x.reshape(len(x), 1, -1, 1) == torch.arange(self.d_in, device=x.device)).to(self._dtype)
        if self._padding_idx is not None:
            one_hot[..., self._padding_idx] = 0
        return one_hot  # [N, 1, T, V]

    def outputs(self, h: Tensor) -> Tensor:
        return as_rows(h, self.d_out, "output")

    def sum_output(self, h: Tensor) -> Tensor:
        check_rows(h, self.d_out, "output")
        return h.reshape(-1, self.d_out).sum(0, keepdim=True, dtype=dtype_of_sums(h))  # [N T, d_out] -> [1, d_out]

    def mean_input(self, x: Tensor) -> Tensor:
        """The frequencies of the indices, `[1, V]`; zero for padding."""
        self._check_indices(x)
        x = x.reshape(-1)
        # Whole numbers: the sum is exact however many there are and in whatever order they come.
        counts = torch.zeros(self.d_in, dtype=torch.int64, device=x.device).index_add_(
            0, x, torch.ones_like(x, dtype=torch.int64)
        )
        frequencies = counts.to(self._dtype) / len(x)
        if self._padding_idx is not None:
            frequencies[self._padding_idx] = 0
        return frequencies.unsqueeze(0)

    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        self.check_vectors(v)
        diagonal = self.diagonal(x)
        return diagonal.reshape(*diagonal.shape, *[1] * (v.dim() - 2)) * v  # [1, V] or [1, V, 1], for k vectors

    def diagonal(self, x: Tensor) -> Tensor:
        return self.locations(x) * self.mean_input(x)  # the square of 1 is 1

    def second_moment(self, x: Tensor) -> Tensor:
        """A, `[1, V, V]`, with all its zeros. Reference; large for a vocabulary."""
        return torch.diag_embed(self.diagonal(x))

    def rows_of(self, weight: Tensor) -> Tensor:
        return weight.mT.unsqueeze(0)  # [V, d_out] -> [1, d_out, V]

    def weight_of(self, rows: Tensor) -> Tensor:
        return rows.squeeze(0).mT  # [1, d_out, V] -> [V, d_out]

    def _check_indices(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"the layer's input must be a tensor of indices, int64 or int32, not {found}")
        if x.ndim < 1 or x.numel() == 0:
            raise ValueError(
                f"the layer's input has shape {tuple(x.shape)}, but [N, ...] with at least one sample and one location "
                "is needed; add a batch dimension if there is none"
            )

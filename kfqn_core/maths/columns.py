"""The matrix `[W | b]` with its bias column apart.

A layer's gradient comes as two tensors, and its parameters are two. A row of `[W | b]` has one entry more than the
weight's, an odd number more often than not, and tensors cut out of such rows are not dense. Kept apart, both parts are
dense, and of many layers they lie side by side. Only the product with another matrix joins them, in rows that begin at
multiples of 64 bytes: written to rows of odd length it takes up to a third longer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGE = 2**16  # entries of a product that a processor's nearest cache does not hold


class Columns(NamedTuple):
    """`[W | b]`: `W` `[..., d_out, d]`, and `b` `[..., d_out, 1]` or None where there is no bias."""

    W: Tensor
    b: Tensor | None

    @classmethod
    def split(cls, matrix: Tensor, has_bias: bool) -> Columns:
        """Views of `matrix` `[..., d_out, d_in]`, whose last column belongs to the bias if there is one."""
        return cls(matrix[..., :-1], matrix[..., -1:]) if has_bias else cls(matrix, None)

    def joined(self) -> Tensor:
        """`[W | b]` as one new tensor `[..., d_out, d_in]`, or `W` itself where there is no bias."""
        return self.W if self.b is None else torch.cat([self.W, self.b], dim=-1)

    def times(self, H: Tensor) -> Tensor:
        """`[W | b] H`, `[B, d_out, k]`, for matrices `H` `[B, d_in, k]`; `W` is `[B, d_out, d]`."""
        if self.b is None:
            return torch.bmm(self.W, H)
        if self.W.shape[-2] * H.shape[-1] < LARGE:
            return torch.baddbmm(self.b * H[:, -1:], self.W, H[:, :-1])  # [B, d_out, 1] * [B, 1, k] + [B, d_out, k]
        D = torch.mul(self.b, H[:, -1:], out=self._aligned(H.shape[-1]))
        return D.baddbmm_(self.W, H[:, :-1])

    def scaled(self, e: Tensor) -> Tensor:
        """`[W | b] diag(e)`, `[B, d_out, d_in]`, for `e` `[B, d_in]`."""
        if self.b is None:
            return self.W * e.unsqueeze(-2)
        D = self._aligned(e.shape[-1])
        torch.mul(self.W, e[..., None, :-1], out=D[..., :-1])
        torch.mul(self.b, e[..., None, -1:], out=D[..., -1:])
        return D

    def _aligned(self, columns: int) -> Tensor:
        """An empty matrix of so many columns whose rows begin at multiples of 64 bytes."""
        line = 64 // self.W.element_size()
        return self.W.new_empty(*self.W.shape[:-1], -(-columns // line) * line)[..., :columns]

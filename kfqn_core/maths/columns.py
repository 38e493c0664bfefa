"""The matrix `[W | b]` with its bias column apart.

A layer's gradient comes as two tensors, and its parameters are two. A row of `[W | b]` has one entry more than the
weight's, an odd number more often than not, and tensors cut out of such rows are not dense. Kept apart, both parts are
dense, and nothing is ever glued together or cut up again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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

    def times(self, H: Tensor) -> Columns:
        """`[W | b] H` for matrices `H` `[B, d_in, d_in]`; `W` is `[B, d_out, d]`."""
        if self.b is None:
            return Columns(torch.bmm(self.W, H), None)
        H_w, H_b = H[:, :-1], H[:, -1:]  # [B, d, d_in], [B, 1, d_in]
        W = torch.baddbmm(self.b * H_b[..., :-1], self.W, H_w[..., :-1])  # [B, d_out, d]
        b = torch.baddbmm(self.b * H_b[..., -1:], self.W, H_w[..., -1:])  # [B, d_out, 1]
        return Columns(W, b)

    def scaled(self, e: Tensor) -> Columns:
        """`[W | b] diag(e)` for `e` `[B, d_in]`."""
        if self.b is None:
            return Columns(self.W * e.unsqueeze(-2), None)
        return Columns(self.W * e[..., None, :-1], self.b * e[..., None, -1:])

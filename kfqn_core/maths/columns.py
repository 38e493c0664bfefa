"""The matrix `[W | b]` with its bias column apart.

A layer's gradient comes as two tensors, and its parameters are two. Kept apart, both parts are dense, and of many
layers they lie side by side. A product with another matrix joins them: one product is faster than two, at every size.
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

    def times(self, H: Tensor, *, out: Tensor | None = None) -> Tensor:
        """`[W | b] H`, `[B, d_out, k]`, for matrices `H` `[B, d_in, k]`; `W` is `[B, d_out, d]`."""
        return torch.bmm(self.joined(), H, out=out)

    def scaled(self, e: Tensor, *, out: Tensor | None = None) -> Tensor:
        """`[W | b] diag(e)`, `[B, d_out, d_in]`, for `e` `[B, d_in]`."""
        return torch.mul(self.joined(), e.unsqueeze(-2), out=out)

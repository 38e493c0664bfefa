"""`H_g ~ G^-1`, by damped BFGS on averaged pairs of mean pre-activations and their mean gradients (chapter 7)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kfqn_core.estimate.activation import EVERYWHERE
from kfqn_core.estimate.inverses import DenseInverse, Inverse, acceptable
from kfqn_core.maths.damping import double_damping, levenberg_marquardt, powell_on_inverse
from kfqn_core.maths.secant import LimitedMemoryInverse


class Sizes(Protocol):
    """What a factor asks of a layer: a `LayerView` is one."""

    @property
    def groups(self) -> int: ...

    @property
    def d_out(self) -> int: ...


class GradientFactor:
    """`H_g` of layers of one shape at once; `B` counts the groups of all of them.

    Args:
        sizes: `groups`, of all layers together (B), and `d_out`.
        damping: `lambda_G`, the `mu2` of the second damping: a number, or one for each of the `B` rows; it may be
            changed between updates.
        memory: number of pairs of the limited-memory form, or `None` for a dense matrix.
        pair_damping: `"double"`, D_P then D_I (2020), or `"levenberg-marquardt"`, D_P then D_LM (2021).
        pair_momentum: weight of the past in the running averages of `s` and `y`.
        mu1: the first damping keeps `s'y >= mu1 y'H_g y`.

    Attributes:
        s_mean, y_mean: `[B, d_out]`, the running averages, *before* damping: damping acts on copies.
        inverse: `H_g`, dense or limited-memory.
    """

    def __init__(
        self,
        sizes: Sizes,
        damping: float | list[float],
        memory: int | None,
        *,
        pair_damping: str,
        pair_momentum: float,
        mu1: float,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.mu1, self.damping = mu1, damping
        self.pair_damping = pair_damping
        self.pair_momentum = pair_momentum
        self.s_mean = torch.zeros(sizes.groups, sizes.d_out, dtype=dtype, device=device)
        self.y_mean = torch.zeros_like(self.s_mean)
        self.inverse: Inverse
        if memory is None:
            self.inverse = DenseInverse(sizes.d_out, groups=sizes.groups, dtype=dtype, device=device)
        else:
            self.inverse = LimitedMemoryInverse(sizes.d_out, memory, batch=(sizes.groups,), dtype=dtype, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name."""
        pairs = {"s_mean": self.s_mean, "y_mean": self.y_mean}
        if isinstance(self.inverse, DenseInverse):
            return {**pairs, "H_g": self.inverse.H}
        return {**pairs, "S": self.inverse.S, "Y": self.inverse.Y, "R_inv": self.inverse.R_inv}

    @property
    def read(self) -> tuple[str, ...]:
        """The names of those that `inverse.apply` reads."""
        return ("H_g",) if isinstance(self.inverse, DenseInverse) else ("S", "Y", "R_inv")

    def update(self, s: Tensor, y: Tensor, g_mean: Tensor, where: Tensor = EVERYWHERE) -> None:
        """What the second evaluation of a mini-batch, or the next mini-batch, tells: average, damp, append.

        Args:
            s: `[B, d_out]`, the change of the mean pre-activation (means over samples and locations).
            y: `[B, d_out]`, the change of the mean per-sample gradient.
            g_mean: `[B, d_out]`, that gradient before; it sets the scale of the curvature test.
            where: bool `[B]`; elsewhere, and where a vector is not finite, nothing changes.
        """
        s, y, where = self.average(s, y, where)
        s, y = self.damped(s, y)
        self.inverse.append(s, y, acceptable(s, y, g_mean) & where)

    def average(self, s: Tensor, y: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Average a change into `s_mean` and `y_mean`; returns copies of both, and where the change was finite."""
        new, means = torch.stack([s, y]).to(self.s_mean.dtype), torch.stack([self.s_mean, self.y_mean])  # [2, B, d_out]
        where = where & (torch.linalg.vector_norm(new, torch.inf, dim=(0, -1)) < torch.inf)
        means.lerp_(torch.where(where.reshape(-1, 1), new, means), 1.0 - self.pair_momentum)
        self.s_mean.copy_(means[0])
        self.y_mean.copy_(means[1])
        return means[0], means[1], where

    def damped(self, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Damped copies of pairs `[B, d_out]`: D_P, then D_I or D_LM."""
        H_y = self.inverse.apply(y.unsqueeze(-1)).squeeze(-1)
        if isinstance(self.damping, list):
            # Layers of one shape act at different numbers of locations, and some splits of the damping depend on them.
            by_row = zip(H_y, s, y, self.damping, strict=True)
            rows = [self._damped(H_y_row, s_row, y_row, mu2) for H_y_row, s_row, y_row, mu2 in by_row]
            return torch.stack([s for s, _ in rows]), torch.stack([y for _, y in rows])
        return self._damped(H_y, s, y, self.damping)

    def _damped(self, H_y: Tensor, s: Tensor, y: Tensor, mu2: float) -> tuple[Tensor, Tensor]:
        # A curvature that the damping lambda_G would bury anyway is rounding error where batch norm makes all mean
        # gradients zero. Powell's damping would turn s into the direction of that error: zero stands for it.
        size_s, size_y = (torch.linalg.vector_norm(vector, dim=-1, keepdim=True) for vector in (s, y))
        noise = size_y <= torch.finfo(s.dtype).eps ** 0.5 * mu2 * size_s
        y, H_y = torch.where(noise, 0.0, y), torch.where(noise, 0.0, H_y)
        if self.pair_damping == "double":
            return double_damping(H_y, s, y, self.mu1, mu2)
        return levenberg_marquardt(*powell_on_inverse(H_y, s, y, self.mu1), mu2)

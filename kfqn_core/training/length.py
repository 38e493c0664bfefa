"""How long a step is: what a direction is divided by.

The plain forms take the direction of one layer as the matrix `D` `[groups, d_out, d_in]`; `Lengths` takes those of all
layers. A unit rate is meant; the optimizer multiplies by its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STEP = 0.2  # root mean square of the change of a weight, in units of the rate: one length per layer
# Length of the change of a row, in units of the rate. The same for every width, as is the length of the rows that
# networks begin with: one rate fits narrow and wide layers (benchmarks/NOTES.md).
ROW = 3.0
# Inputs for each output from which on rows are shorter: few units with many inputs change by more than their rows do,
# since all inputs that changed act on them together (benchmarks/NOTES.md).
THIN = 8
DEEP = 12  # layers from which on a step is shorter: the changes of all of them add up, as a random walk does
# Of the mean length of the rows of D: a unit whose gradient is smaller than that is hardly used, and moves less.
ROW_FLOOR = 1e-3
SHORTEST = 1e-19  # a shorter direction counts as none: divided by its length it would be infinite in float32


def raw(D: Tensor) -> Tensor:
    """`D` itself: the step of the papers."""
    return D


def normalised(D: Tensor) -> Tensor:
    """`0.2 sqrt(numel D) D / ||D||_F`: every weight moves by 0.2 in the root mean square over the layer."""
    return D * (STEP * math.sqrt(D.numel()) / D.norm().clamp_min(SHORTEST))


def row_length(d_out: int, d_in: int) -> float:
    """Of a row at the rate one: `ROW`, or less in a layer of few outputs with many inputs."""
    return ROW * min(1.0, math.sqrt(THIN * d_out / d_in))


def normalised_rows(D: Tensor) -> Tensor:
    """Every row of D, the weights of one output unit, to the length `row_length`, but for units hardly used.

    The rate that the optimizer multiplies by may be shorter than the user's: see `steadiness` and `DEEP`.
    """
    norms = D.norm(dim=-1, keepdim=True)
    return D * (row_length(*D.shape[-2:]) / (norms + ROW_FLOOR * norms.mean()).clamp_min(SHORTEST))


class Lengths:
    """What directions are divided by, for all layers of several groups at once: the batched forms.

    Args:
        sizes: of the groups: layers L, groups, d_out, d_in.
        like: a tensor of the dtype and on the device of the directions.
        depth: layers of the whole model: of more than `DEEP` normalised rows are shortened.
    """

    def __init__(self, sizes: Sequence[tuple[int, int, int, int]], like: Tensor, depth: int = 1):
        self._shapes = [(L * groups, d_out, 1) for L, groups, d_out, _ in sizes]
        self._rows = [L * groups * d_out for L, groups, d_out, _ in sizes]  # of each group
        layers = [(groups * d_out, d_in) for L, groups, d_out, d_in in sizes for _ in range(L)]
        # Made from lists: what is asked of a tensor waits for the device.
        rows_of_layers = [rows for rows, _ in layers]
        index = np.repeat(np.arange(len(layers)), rows_of_layers)
        self._rows_of_layers = torch.tensor(rows_of_layers, device=like.device)  # [layers]
        self._layer = torch.tensor(index, device=like.device)  # [rows]
        self._of_layers = like.new_tensor([1 / (STEP * math.sqrt(rows * d_in)) for rows, d_in in layers])  # [layers]
        of_rows = np.repeat([1 / row_length(d_out, d_in) for L, _, d_out, d_in in sizes], self._rows)
        self._of_rows = like.new_tensor((of_rows * math.sqrt(max(1.0, depth / DEEP))).tolist())  # [rows]
        self.rows = sum(self._rows)  # of all directions together

    def divisors(self, norms: Tensor, step_length: str) -> Tensor:
        """What every row is divided by at a unit rate, so that the quotient is the plain form of that name.

        Args:
            norms: `[rows]`, the lengths of the rows of the directions of all groups, one group after the other. They
                are written over.
            step_length: `"raw"`, `"normalised"` or `"normalised_rows"`.

        Returns:
            `[rows]`.
        """
        if step_length == "raw":
            return norms.fill_(1.0)
        if step_length == "normalised":
            sizes = self._over_rows(norms.square_(), "sum").sqrt_().clamp_min_(SHORTEST).mul_(self._of_layers)
            return sizes.index_select(0, self._layer)
        means = self._over_rows(norms, "mean").index_select(0, self._layer)  # [rows], alike in a layer
        return norms.add_(means, alpha=ROW_FLOOR).clamp_min_(SHORTEST).mul_(self._of_rows)

    def rows_of(self, layers: Tensor) -> Tensor:
        """`[layers]` for every row, `[rows]`."""
        return layers.index_select(0, self._layer)

    def _over_rows(self, rows: Tensor, reduction: str) -> Tensor:
        """`[rows]` as their sum or mean over the rows of every layer, `[layers]`."""
        return torch.segment_reduce(
            rows, reduction, lengths=self._rows_of_layers, unsafe=True
        )  # or the host would look

    def by_group(self, rows: Tensor) -> list[Tensor]:
        """`[rows]` cut up into `[L groups, d_out, 1]` for every group."""
        return [part.view(shape) for part, shape in zip(rows.split(self._rows), self._shapes, strict=True)]

"""How long a step is: what a direction is divided by.

The plain forms take the direction of one layer as the matrix `D` `[groups, d_out, d_in]`; the batched ones take those of
several layers of one shape, with the bias column apart. A unit rate is meant; the optimizer multiplies by its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfqn_core.maths.columns import Columns

STEP = 0.2  # root mean square of the change of a weight, in units of the rate
# Of the mean length of the rows of D: a unit whose gradient is smaller than that is hardly used, and moves less.
ROW_FLOOR = 1e-3
SHORTEST = 1e-19  # a shorter direction counts as none: divided by its length it would be infinite in float32


def raw(D: Tensor) -> Tensor:
    """`D` itself: the step of the papers."""
    return D


def normalised(D: Tensor) -> Tensor:
    """`0.2 sqrt(numel D) D / ||D||_F`: every weight moves by 0.2 in the root mean square over the layer."""
    return D * (STEP * math.sqrt(D.numel()) / D.norm().clamp_min(SHORTEST))


def normalised_rows(D: Tensor) -> Tensor:
    """Every row of D, the weights of one output unit, to the length `0.2 sqrt(d_in)`, but for units that are hardly used."""
    norms = D.norm(dim=-1, keepdim=True)
    return D * (STEP * math.sqrt(D.shape[-1]) / (norms + ROW_FLOOR * norms.mean()).clamp_min(SHORTEST))


def divisors(D: Columns, step_length: str, groups: int) -> Tensor:
    """What each `D` is divided by, so that the quotient is the plain form of the same name.

    Args:
        D: directions of L layers, `[L groups, d_out, d]` with the bias column apart.
        step_length: `"raw"`, `"normalised"` or `"normalised_rows"`.
        groups: of each layer.

    Returns:
        `[L groups, d_out, 1]`, or a shape that broadcasts to it.
    """
    if step_length == "raw":
        return D.W.new_ones(1, 1, 1)
    norms = torch.linalg.vector_norm(D.W, dim=-1, keepdim=True)  # [L groups, d_out, 1]
    if D.b is not None:
        norms = torch.hypot(norms, D.b)
    d_out, d_in = norms.shape[1], D.W.shape[2] + (D.b is not None)
    layers = norms.view(-1, groups * d_out)  # [L, groups d_out]
    if step_length == "normalised":
        size = torch.linalg.vector_norm(layers, dim=-1).repeat_interleave(groups).view(-1, 1, 1)  # [L groups, 1, 1]
        return size.clamp_min_(SHORTEST).mul_(1 / (STEP * math.sqrt(groups * d_out * d_in)))
    floor = layers.mean(-1, keepdim=True)  # [L, 1]
    return torch.add(layers, floor, alpha=ROW_FLOOR).clamp_min_(SHORTEST).mul_(1 / (STEP * math.sqrt(d_in))).view_as(norms)

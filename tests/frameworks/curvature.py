"""How far two estimates of curvature are from each other."""

from __future__ import annotations

from torch import Tensor

from kfqn_core import KFQN


def relative_difference(H: Tensor, reference: Tensor) -> float:
    """`||H - reference||_F / ||reference||_F`."""
    return ((H - reference).norm() / reference.norm()).item()


def estimates(optimizer: KFQN) -> dict[str, Tensor]:
    """A copy of `H_a` of every layer."""
    return {name: layer.activation.H.clone() for name, layer in optimizer.layers.items()}

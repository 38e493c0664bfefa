"""What the optimizer thinks `A` is."""

from __future__ import annotations

import torch

from kfqn_core import KFQN

DAMPING = 0.03  # the default, which every layer has where there are no pairs


def traces(optimizer: KFQN) -> dict[str, float]:
    """The trace of `A` of every layer, from `H_a = (A + lambda I)^-1`: use with activation_factor="inverse"."""
    found = {}
    for name, layer in optimizer.layers.items():
        H = layer.activation.H.double()
        A = torch.linalg.inv(H) - DAMPING * torch.eye(H.shape[-1], dtype=H.dtype)
        found[name] = A.diagonal(dim1=-2, dim2=-1).sum().item()
    return found

"""What a step does, counted by torch itself: operations dispatched, bytes they touch, floating-point operations.

Counts are the same on every machine and at every load, and independent of `flops.py`, which knows shapes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Counts", "count"]


@dataclass(frozen=True)
class Counts:
    """Per step: floating-point operations (matrix products and convolutions), dispatched operations, bytes touched."""

    flops: float
    operations: float
    bytes: float


class _Traffic(TorchDispatchMode):
    """Counts operations that compute something, and the bytes of every tensor that goes in or comes out of one."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.operations += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def _vector_products(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a_shape[0] * a_shape[1]


def _outer_products(shape: Any, column: Any, row: Any, **kwargs: Any) -> int:
    return 2 * math.prod(shape) if column != shape else 0  # entry by entry it is no product of matrices


def _added_products(shape: Any, left: Any, right: Any, **kwargs: Any) -> int:
    return 2 * math.prod(left) * right[-1]


# Products that torch's counter leaves out: with a vector, in place, and of a column with a row.
MORE = {
    torch.ops.aten.mv: _vector_products,
    torch.ops.aten.baddbmm_: _added_products,
    torch.ops.aten.addcmul_: _outer_products,
}


def count(step: Callable[[], None], period: int = 1) -> Counts:
    """Averages over `period` calls of `step`, each one training step."""
    flops = FlopCounterMode(display=False, custom_mapping=MORE)
    with flops:
        for _ in range(period):
            step()
    with _Traffic() as traffic:
        for _ in range(period):
            step()
    return Counts(flops.get_total_flops() / period, traffic.operations / period, traffic.bytes / period)

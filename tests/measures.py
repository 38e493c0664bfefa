"""What tests of several kinds measure with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def relative(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||`; the shapes have to be equal."""
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def same_bits(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Bit by bit, a NaN being equal to itself: factors that wait for a first mini-batch hold them."""
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


def assert_close(values: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    """Relative to the norm of each; a NaN stands where one is expected, and nothing else but zero where all is zero."""
    for value, right in zip(values, expected, strict=True):
        assert torch.equal(value.isnan(), right.isnan())
        assert relative(value.nan_to_num(7.0).double(), right.nan_to_num(7.0).double()) < tolerance


class LargestTensor(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result

"""What tests of several kinds of layers measure with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def relative(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||`; the shapes have to be equal."""
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


class LargestTensor(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result

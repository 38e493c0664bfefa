"""How far a computed array is from its reference: the number that every check of the book prints."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

__all__ = ["relative_error"]


def _float64(value: torch.Tensor | ArrayLike) -> torch.Tensor:
    # torch would round a Python number to float32; numpy does not.
    tensor = value.detach().cpu() if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def relative_error(actual: torch.Tensor | ArrayLike, expected: torch.Tensor | ArrayLike) -> float:
    """`||actual - expected||_F / ||expected||_F`, in float64 (complex128 for complex input).

    `actual` and `expected` are tensors, arrays or numbers of one shape. The answer is 0 when both are zero,
    `inf` when only `expected` is, and `inf` or `nan` as soon as an entry is not finite, so that
    `assert relative_error(...) < tolerance` fails on it.

    Raises `ValueError` when the shapes differ: broadcasting would hide a lost dimension behind a small number.
    """
    actual, expected = _float64(actual), _float64(expected)
    if actual.shape != expected.shape:
        raise ValueError(
            f"relative_error: actual has shape {tuple(actual.shape)} and expected {tuple(expected.shape)}; "
            "compare arrays of one shape (reshape one of them on purpose if that is what you mean)"
        )
    error = torch.linalg.vector_norm(actual - expected)
    scale = torch.linalg.vector_norm(expected)
    if scale == 0 and error == 0:
        return 0.0
    return (error / scale).item()

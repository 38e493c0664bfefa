"""Arrays that are slow to make, kept in scikit-learn's data folder: what comes back is what was put in, or nothing."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import get_data_home

__all__ = ["load", "save"]

_CHECKSUM = "sha256"


def load(name: str) -> dict[str, np.ndarray] | None:
    """The arrays kept under `name`, or None when there are none or when the file is not what was written."""
    try:
        with _file(name).open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            arrays = dict(archive)
            checksum = str(arrays.pop(_CHECKSUM))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return arrays if _digest(arrays) == checksum else None


def save(name: str, **arrays: np.ndarray) -> None:
    """Keep `arrays` under `name`, for `load`; a folder that cannot be written to is a warning.

    They are written beside the target, which is then renamed: a reader sees the whole file or none.
    """
    file = _file(name)
    entries: dict[str, Any] = {**arrays, _CHECKSUM: np.array(_digest(arrays))}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            try:
                np.savez(part, **entries)
                part.close()
                os.replace(part.name, file)
            except BaseException:
                part.close()
                os.unlink(part.name)
                raise
    except OSError as error:
        warnings.warn(f"{name}: not cached ({error}); it will be made again next time", stacklevel=3)


def _file(name: str) -> Path:
    return Path(get_data_home()) / "kfqn" / f"{name}.npz"


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()

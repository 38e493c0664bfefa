"""Run something, and leave buffers and random generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """The state of every generator that a training step may draw from: torch's, Python's and NumPy's global ones."""

    cpu: Tensor
    cuda: tuple[tuple[torch.device, Tensor], ...]
    python: Any
    numpy: Any

    @classmethod
    def now(cls, devices: Sequence[torch.device] = ()) -> RandomState:
        """That of this moment, on the CPU and on these CUDA devices."""
        cuda = tuple((device, torch.cuda.get_rng_state(device)) for device in devices)
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())

    def set(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


@contextmanager
def restored(modules: nn.Module | Iterable[nn.Module], devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Buffers of `modules` and the random generators are afterwards what they were before."""
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    buffers = {id(buffer): buffer for module in modules for buffer in module.buffers()}.values()
    saved = [(buffer, buffer.clone()) for buffer in buffers]
    randomness = RandomState.now(devices)
    try:
        yield
    finally:
        randomness.set()
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def cuda_devices(params: Iterable[Tensor]) -> list[torch.device]:
    """The CUDA devices that hold `params`, each once."""
    return sorted({p.device for p in params if p.is_cuda}, key=str)


def run_on(model: nn.Module, batch: Any) -> Any:
    """`model` on a batch: a tensor, a tuple or list of positional arguments, or a mapping of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)

"""Run something, and leave buffers and random generators as they were.

Nothing else: no attributes that are no buffers, no generator of somebody's own, no parameters that a forward moves.
"""

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


class Buffers:
    """Buffers of modules as they were when they were saved: which tensors there were, and what was in them.

    A forward may write into a buffer, put another tensor in its place (`self.mean = 0.9 * self.mean + ...`), or
    register one.
    """

    def __init__(self) -> None:
        self._modules: dict[int, tuple[nn.Module, dict[str, Tensor | None]]] = {}
        self._values: dict[int, tuple[Tensor, Tensor]] = {}  # a tensor may be a buffer of several modules

    def save(self, module: nn.Module) -> None:
        """Those of the module itself, without its children, unless they were saved before."""
        if id(module) in self._modules:
            return
        buffers = dict(module._buffers.items())
        self._modules[id(module)] = module, buffers
        for buffer in buffers.values():
            if buffer is not None and id(buffer) not in self._values:
                self._values[id(buffer)] = buffer, buffer.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Everything that was saved; buffers that were not there are gone."""
        for module, buffers in self._modules.values():
            now = dict(module._buffers.items())
            for name in now.keys() - buffers.keys():
                del module._buffers[name]
            for name, buffer in buffers.items():
                if name not in now or now[name] is not buffer:
                    module._buffers[name] = buffer
        for buffer, value in self._values.values():
            buffer.copy_(value)


@contextmanager
def restored(modules: nn.Module | Iterable[nn.Module], devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Buffers of `modules` and the random generators are afterwards what they were before, as objects and as values."""
    buffers = Buffers()
    for root in [modules] if isinstance(modules, nn.Module) else modules:
        for module in root.modules():
            buffers.save(module)
    randomness = RandomState.now(devices)
    try:
        yield
    finally:
        randomness.set()
        buffers.restore()


def cuda_devices(params: Iterable[Tensor]) -> list[torch.device]:
    """The CUDA devices that hold `params`, each once."""
    return sorted({p.device for p in params if p.is_cuda}, key=str)


def run_on(model: nn.Module, batch: Any) -> Any:
    """`model` on a batch: a tensor, a tuple or list of positional arguments, or a mapping of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)

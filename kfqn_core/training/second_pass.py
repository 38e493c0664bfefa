"""Evaluate a mini-batch a second time and leave no trace (chapter 8).

The secant pair of `H_g` needs the same mini-batch at two points: the same dropout masks, or the difference is noise.
And nothing else may notice: batch-norm statistics are not moved twice, parameter gradients are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def restored(model: nn.Module, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Buffers of `model` and the random generators (CPU and `devices`) are afterwards what they were before."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


class SecondPass:
    """The random state before a first evaluation, ready to evaluate again.

    Args:
        model: its buffers are restored after the second evaluation.
        params: all trainable parameters; no gradient is computed for them the second time.
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]):
        self._model = model
        self._params = [p for p in params if p.requires_grad]
        self._devices = cuda_devices(params)
        self._cpu_state = torch.get_rng_state()
        self._cuda_states = [torch.cuda.get_rng_state(device) for device in self._devices]

    def evaluate(self, closure: Callable[[], Tensor]) -> None:
        """Run `closure` with the random numbers of the first evaluation and all parameters frozen."""
        grads = [p.grad for p in self._params]
        for p in self._params:
            p.requires_grad_(False)
            p.grad = None  # the closure may fill gradients with zeros
        try:
            with restored(self._model, self._devices):
                torch.set_rng_state(self._cpu_state)
                for device, state in zip(self._devices, self._cuda_states, strict=True):
                    torch.cuda.set_rng_state(state, device)
                with torch.enable_grad():
                    closure()
        finally:
            for p, grad in zip(self._params, grads, strict=True):
                p.requires_grad_(True)
                p.grad = grad


def cuda_devices(params: Sequence[Tensor]) -> list[torch.device]:
    """The CUDA devices that hold `params`, each once."""
    return sorted({p.device for p in params if p.is_cuda}, key=str)

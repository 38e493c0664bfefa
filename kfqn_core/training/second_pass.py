"""Evaluate a mini-batch a second time and leave no trace (chapter 8).

The secant pair of `H_g` needs the same mini-batch at two points: the same dropout masks, or the difference is noise.
And nothing else may notice: batch-norm statistics are not moved twice, gradients are not touched, whoever's they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from kfqn_core.training.preserve import RandomState, cuda_devices, restored


class SecondPass:
    """The random state before a first evaluation, ready to evaluate again.

    Args:
        model: its buffers are restored after the second evaluation.
        params: trainable parameters; no gradient is computed for them the second time.
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]):
        self._model = model
        self._leaves: dict[int, Tensor] = {id(p): p for p in (*params, *model.parameters())}
        self._inputs: dict[int, Tensor] = {}  # that the user wants gradients of: they stay as they are
        self._devices = cuda_devices(params)
        self._randomness = RandomState.now(self._devices)

    def protect(self, loss: Any) -> None:
        """Leave alone, too, what else the first evaluation gave gradients to: it may train more than `model`."""
        for leaf in leaves_of(loss) if isinstance(loss, Tensor) else ():
            (self._leaves if isinstance(leaf, nn.Parameter) else self._inputs)[id(leaf)] = leaf

    def evaluate(self, closure: Callable[[], Any]) -> None:
        """Run `closure` with the random numbers of the first evaluation and all parameters frozen."""
        frozen = [leaf for leaf in self._leaves.values() if leaf.requires_grad]
        leaves = [*frozen, *self._inputs.values()]
        grads = [leaf.grad for leaf in leaves]
        for leaf in frozen:
            leaf.requires_grad_(False)
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = None if grad is None else grad.clone()  # the closure may look at it, clip it, or zero it
        try:
            with restored(self._model, self._devices), _other_buffers_restored():
                self._randomness.set()
                with torch.enable_grad():
                    closure()
        finally:
            for leaf in frozen:
                leaf.requires_grad_(True)
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.grad = grad


@contextmanager
def _other_buffers_restored() -> Iterator[None]:
    """Buffers of every module that runs inside, whoever's it is, are afterwards what they were before."""
    saved: dict[int, tuple[Tensor, Tensor]] = {}

    def save(module: nn.Module, args: object) -> None:
        for buffer in module.buffers(recurse=False):
            saved.setdefault(id(buffer), (buffer, buffer.clone()))

    handle = register_module_forward_pre_hook(save)
    try:
        with warnings.catch_warnings():
            # That hooks fire for a compiled module and for the module inside is no harm.
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            yield
    finally:
        handle.remove()
        with torch.no_grad():
            for buffer, value in saved.values():
                buffer.copy_(value)


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The tensors whose gradients a backward from `loss` accumulates into."""
    leaves, waiting, met = [], [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return leaves

"""Evaluate a mini-batch a second time and leave no trace (chapter 8).

The secant pair of `H_g` needs the same mini-batch at two points: the same dropout masks, or the difference is noise.
And nothing else may notice: batch-norm statistics are not moved twice, gradients are not touched, whoever's they are.

Gradients, buffers, and the global random generators of torch, Python and NumPy are afterwards what they were before.
What else a closure changes it changes twice: the parameters of a teacher that it moves, attributes that are no buffers,
a generator of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from kfqn_core.training.preserve import Buffers, RandomState, cuda_devices, restored


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

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Run `closure` with the random numbers of the first evaluation and all parameters frozen; what it returns."""
        frozen = [leaf for leaf in self._leaves.values() if leaf.requires_grad]
        for leaf in frozen:
            leaf.requires_grad_(False)
        try:
            with restored(self._model, self._devices), _other_buffers_restored():
                self._randomness.set()
                with torch.enable_grad(), _GradientsRestored(*frozen, *self._inputs.values()):
                    return closure()
        finally:
            for leaf in frozen:
                leaf.requires_grad_(True)


class _GradientsRestored(TorchFunctionMode):
    """The gradients of these leaves, and of others that are met inside, are afterwards what they were before.

    Which others there are the loss does not always tell: a closure may return a number, or the last of several losses.
    So a gradient is saved before it is read, replaced, or added to by `backward`: the code inside gets a copy, at which
    it may look, which it may clip, or zero. What holds gradients by other names is not seen, nor are parameters of
    others in a segment that reentrant checkpointing recomputes during backward, nor, before it could be overridden (in
    PyTorch 2.6), a call of `torch.autograd.backward` itself.
    """

    def __init__(self, *leaves: Tensor):
        super().__init__()
        self._saved: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._save(leaves)

    def _save(self, leaves: Iterable[Tensor]) -> None:
        for leaf in leaves:
            if leaf.is_leaf and id(leaf) not in self._saved:
                grad = leaf.grad
                self._saved[id(leaf)] = leaf, grad
                leaf.grad = None if grad is None else grad.detach().clone()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _USE_OF_A_GRADIENT:
            self._save(args[:1])
        elif func in _BACKWARD:
            roots = args[0] if isinstance(args[0], tuple) else args[:1]
            self._save(leaf for root in roots if isinstance(root, Tensor) for leaf in leaves_of(root))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for leaf, grad in self._saved.values():
            leaf.grad = grad


_GRAD: Any = Tensor.grad  # what stands in the class: how the attribute of a tensor is read and set
_USE_OF_A_GRADIENT = {_GRAD.__get__, _GRAD.__set__, _GRAD.__delete__}
_BACKWARD = {Tensor.backward, torch.autograd.backward}


@contextmanager
def _other_buffers_restored() -> Iterator[None]:
    """Buffers of every module that runs inside, whoever's it is, are afterwards what they were before."""
    buffers = Buffers()
    handle = register_module_forward_pre_hook(lambda module, args: buffers.save(module))
    try:
        with warnings.catch_warnings():
            # That hooks fire for a compiled module and for the module inside is no harm.
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            yield
    finally:
        handle.remove()
        buffers.restore()


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

"""What the graph of a pass tells and keeps: gradients of outputs, saved inputs, and which backward comes by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kfqn_core.estimate.statistics import Use


def hear(h: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Call `hook` with the gradient of `h` as it is now, whatever is done to `h` in place afterwards.

    A hook on a tensor holds for its value of the moment; but where `h` is a view (of a fully connected layer with more
    axes than two), an operation in place gives its base a new history, which leaves out the node of the view.
    """
    base = h._base
    if base is None or base.grad_fn is None or base.numel() != h.numel() or not base.is_contiguous():
        h.register_hook(hook)
        return
    shape, stride, offset = base.shape, h.stride(), h.storage_offset() - base.storage_offset()
    sizes = h.shape

    def heard(gradients: Sequence[Tensor | None]) -> None:
        if gradients[0] is not None:
            hook(gradients[0].reshape(shape).contiguous().as_strided(sizes, stride, offset))

    base.grad_fn.register_prehook(heard)


def hear_accumulation(leaf: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `hook` after every accumulation into a leaf, before anybody else's hook, which may clear the gradient."""
    trained = leaf.requires_grad
    leaf.requires_grad_(True)  # for the moment, if it is frozen: autograd takes no hook of it otherwise
    handle = leaf.register_post_accumulate_grad_hook(hook)
    leaf.requires_grad_(trained)
    hooks: Any = leaf._post_accumulate_grad_hooks
    others = [(key, value) for key, value in hooks.items() if key != handle.id]
    hooks.clear()  # the same dictionary, which the handles of the others know
    hooks.update([(handle.id, hook), *others])
    hear_again(leaf)
    return handle


def hear_again(leaf: Any) -> None:
    """Give autograd the hooks of `hear_accumulation` anew.

    `torch.utils.swap_tensors` (models that are cast or loaded with swapped parameters) leaves them with the old memory.
    """
    leaf._post_accumulate_grad_hooks = leaf._post_accumulate_grad_hooks


class Saved:
    """A tensor that the graph has saved, as it saves its own: dropped and recomputed by activation checkpointing."""

    def __init__(self, x: Tensor):
        # In older versions of torch a node alone does not keep what it has saved: its output does.
        self._output = _Save.apply(x, torch.empty(0, requires_grad=True, device="cpu"))

    def __call__(self) -> Tensor:
        return self._output.grad_fn.saved_tensors[0]


class _Save(torch.autograd.Function):
    """Saves its first argument; the second is a leaf, so that there is a node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.6 does not tell


def is_checkpointed() -> bool:
    """Whether what is saved now will be dropped and computed again, or is being so: checkpointing, not reentrant.

    Which tensor is which it tells by their order, so that a forward and its repetition must save as many.
    """
    hooks = None if _top_hooks is None else _top_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which `torch.compile` leaves alone; where it may not (`fullgraph`), torch's error says why."""
    reason = {"reason": "KFQN looks at what every layer gets and gives: compile without fullgraph=True"}
    told = "reason" in inspect.signature(torch.compiler.disable).parameters  # torch 2.6 takes none
    return torch.compiler.disable(function, **(reason if told else {}))


class Passing:
    """What a backward that has yet to come to a weight has reached, and how it found the gradient last.

    Attributes:
        uses: that it has reached.
        stale: whether the gradient was no longer that of the uses before.
        accumulations: how often the gradient had been added to by then.
    """

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.stale, self.accumulations = False, 0


def together(passings: Iterable[Passing]) -> Passing:
    """Several as one, which found the gradient as the first of them did."""
    whole, first = Passing(), True
    for passing in passings:
        whole.uses += passing.uses
        if first:
            whole.stale, whole.accumulations, first = passing.stale, passing.accumulations, False
    return whole


def reach(leaf: Tensor) -> str:
    """Whether this backward accumulates into a leaf: "yes", "no", or "captured" by `autograd.grad`."""
    try:
        node = torch.autograd.graph.get_gradient_edge(leaf).node
        return "yes" if torch._C._will_engine_execute_node(node) else "no"
    except RuntimeError:
        return "captured"

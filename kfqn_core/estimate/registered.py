"""What is registered with modules and weights: objects that know their owner weakly, and do nothing when it is gone."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch.utils.hooks import RemovableHandle

from kfqn_core.estimate import graph

if TYPE_CHECKING:
    from kfqn_core.estimate.hooks import Watch


class Hook:
    """What is registered. Pickles and copies of it do nothing, and need nothing of this package."""

    def __init__(self, owner: weakref.ref[Any]):
        self._owner = owner

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes any arguments and returns None


class ForwardHook(Hook):
    """After a forward of the layer: the watch observes it, if it is to."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """`rest` is `(kwargs, output)`, or `(output,)` if this hook was removed while torch went through its list."""
        watch: Watch | None = self._owner()
        if watch is None or len(rest) < 2:
            return None
        # A repetition saves what its forward has saved: nothing of a watch that was not there, or has seen none since.
        repeats = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if repeats and not watch.noticed and graph.is_checkpointed():
            return None
        # Between a forward and its repetition a step may be taken, which says whether the next forward is looked at.
        if watch.mode != "inputs" and not (
            torch.is_grad_enabled()
            and (watch.watching or (not torch.compiler.is_compiling() and graph.is_checkpointed()))
        ):
            return None
        kwargs, output = rest
        # Inside a compiled model, or behind a break of its graph, where every function is taken up once for each layer.
        compiling = torch.compiler.is_compiling() or eval_frame.get_eval_frame_callback() is not None
        observe: Any = type(watch).observe_eagerly if compiling else type(watch).observe
        try:
            return observe(watch, module, args, kwargs, output)
        except Exception as error:  # whatever is wrong with the statistics, the user's forward goes on
            watch.error = f"{type(error).__name__}: {error}"
            return None


class Follows(Protocol):
    """Who follows a model that changes."""

    def follow(self, *, running: bool) -> Any: ...


def before_forward(model: nn.Module, owner: Follows) -> Any:
    """Let `owner` look before every forward of the model that may be differentiated. Returns what takes that back."""
    handle = model.register_forward_pre_hook(BeforeHook(weakref.ref(owner)), prepend=True)
    return weakref.finalize(owner, handle.remove)


class BeforeHook(Hook):
    """Before a forward of the whole model, unless it is being compiled."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Let the owner look."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        owner: Follows | None = self._owner()
        if owner is not None and eval_frame.get_eval_frame_callback() is None:
            owner.follow(running=True)


class AccumulatedHook(Hook):
    """After a gradient was added to the weight's."""

    def __call__(self, weight: Tensor) -> None:
        watch: Watch | None = self._owner()
        if watch is not None:
            watch.accumulated()


def remove(handles: Iterable[RemovableHandle]) -> None:
    """Take hooks off again."""
    for handle in handles:
        handle.remove()

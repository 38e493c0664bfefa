"""What forward and backward passes tell about each layer (chapters 8 and 9).

One forward hook per layer reads the layer's input `x` and its pre-activation `h`; a tensor hook on `h` reads the
gradient. Of both only the sum over samples and locations is kept: the secant pair of `H_g` is a difference of means,
`O(d)` numbers per layer. Inputs are kept by reference.

A hook runs between two large products, after which the first call of an operation takes several times as long as in a
loop. So a hook sums, and whatever else there is to do waits for the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.layers import LayerView
from kfqn_core.parallel.ranks import Ranks


@dataclass
class Use:
    """One call of a layer: its input, and what is known of its output.

    `h_sum` and `g_sum` are `[groups, d_out]`, sums over samples and locations: of the pre-activation, and of the
    gradient of the loss.
    """

    x: Tensor
    T: int
    h_sum: Tensor | None = None
    g_sum: Tensor | None = None

    @property
    def samples(self) -> int:
        return self.x.shape[0]


@dataclass
class Record:
    """All uses of one layer since the last step, by forward pass.

    Several uses in one pass (shared weights) are further locations of the same samples; several passes (accumulated
    micro-batches) are further samples, each pass's loss being scaled so that the gradients add up to that of the mean.
    All means are means over `ranks` too.
    """

    view: LayerView
    passes: list[list[Use]] = field(default_factory=list)
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def samples(self) -> int:
        return sum(uses[0].samples for uses in self.passes)

    @property
    def T(self) -> float:
        """Locations per sample on this rank (a mean, where passes differ)."""
        return sum(use.samples * use.T for use in self._uses()) / self.samples

    def thinned(self, rows: int) -> Record:
        """The record of every k-th sample, with the smallest k that leaves about `rows` input vectors."""
        every = max(1, round(self.samples * self.T / rows))
        if every == 1:
            return self
        return replace(self, passes=[[Use(use.x[::every], use.T) for use in uses] for uses in self.passes])

    def mean_input(self) -> Tensor:
        """abar: mean of `a` over samples and locations, `[groups, d_in]`."""
        uses = self._uses()
        if len(uses) == 1:
            return self.ranks.mean(self.view.mean_input(uses[0].x))
        weights = [use.samples * use.T / (self.samples * self.T) for use in uses]
        return self.ranks.mean(_total([w * self.view.mean_input(use.x) for w, use in zip(weights, uses, strict=True)]))

    def mean_output(self) -> Tensor:
        """hbar: mean of `h` over samples and locations, `[groups, d_out]`. ValueError if outputs were not captured."""
        return self.ranks.mean(_total([_known(use.h_sum) for use in self._uses()]) / (self.samples * self.T))

    def mean_gradient(self) -> Tensor:
        """gbar: mean over samples and locations of the per-sample gradients `dl_i/dh`, `[groups, d_out]`.

        The loss is a mean over samples, so that summing its gradient over them gives the mean per-sample gradient.
        """
        return self.ranks.mean(_total([_known(use.g_sum) for use in self._uses()]) / self.T)

    def second_moment(self) -> Tensor:
        """A: mean over samples of the sum over locations of `a a^T`, `[groups, d_in, d_in]`."""
        return self._sum_over_uses(self.view.second_moment)

    def activation_action(self, v: Tensor) -> Tensor:
        """`A v` for `v` `[groups, d_in]` or `[groups, d_in, k]`, without forming `A`."""
        return self._sum_over_uses(lambda x: self.view.activation_action(x, v))

    def diagonal(self) -> Tensor:
        """The diagonal of A, `[groups, d_in]`, without forming `A`."""
        return self._sum_over_uses(self.view.diagonal)

    def _uses(self) -> list[Use]:
        return [use for uses in self.passes for use in uses]

    def _sum_over_uses(self, statistic: Callable[[Tensor], Tensor]) -> Tensor:
        """A mean over samples of a sum over locations, from its value on the input of each use."""
        uses = self._uses()
        if len(uses) == 1:
            return self.ranks.mean(statistic(uses[0].x))
        return self.ranks.mean(_total([use.samples / self.samples * statistic(use.x) for use in uses]))


class Capture:
    """Records of every layer in `layers` during training forwards of `model`.

    While `watching`, a hook fires where gradients are enabled and the layer is in training mode, so evaluation leaves
    no trace; nor does a pass that backward never reaches, or one that activation checkpointing repeats. Until
    backward reaches it, a pass belongs to its graph and goes with it: several forwards may share one backward. The
    hooks know this object weakly, and fire only for the module they were made for: neither a deleted optimizer nor a
    copy of the model writes anywhere. Only where this object is copied or pickled together with the model do the copied
    hooks work, for the copies; passes are left behind, as gradients are.

    Under `torch.compile` a training forward that is watched leaves the graph at every layer, so that `fullgraph=True`
    is for evaluation only. Inside a transform of `torch.func` nothing is recorded.

    Args:
        model: its forward marks the beginning of a pass.
        layers: the layers to watch, by name, each with its view.
        outputs: whether sums of `h` and of its gradient are wanted; without them only inputs are kept.

    Attributes:
        watching: while false, nothing is recorded but what `inputs_only` asks for.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, tuple[nn.Module, LayerView]], *, outputs: bool):
        self.ranks = Ranks()
        self._views = {name: view for name, (_, view) in layers.items()}
        self.watching = True
        self._outputs = outputs
        self._always = False
        self._start_graph = False
        self._pass = _Pass()
        self._finished: list[_Pass] = []
        self._observe_eagerly = _eager(Capture._observe)
        this = weakref.ref(self)
        pass_hook = _PassHook(this, weakref.ref(model))
        self._hooks: list[_Hook] = [pass_hook]
        self._handles = [model.register_forward_pre_hook(pass_hook)]
        for name, (module, _) in layers.items():
            hook = _LayerHook(this, weakref.ref(module), name)
            self._hooks.append(hook)
            self._handles.append(module.register_forward_hook(hook))

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self) | {"_pass": _Pass(), "_finished": [], "_modules": [hook.module() for hook in self._hooks]}
        del state["_observe_eagerly"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = state.pop("_modules")
        vars(self).update(state)
        self.watching = True  # the first pass also tells which ranks there are
        self._observe_eagerly = _eager(Capture._observe)
        for hook, module in zip(self._hooks, modules, strict=True):
            hook.capture, hook.module = weakref.ref(self), weakref.ref(module)

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooks.clear()
        self.watching = True  # what is not seen is missed
        self.clear()

    def clear(self) -> None:
        """Forget the passes that backward has reached; one that is still on its way there lives in its graph."""
        self._pass, self._finished = _Pass(), []

    def take(self) -> dict[str, Record]:
        """The records since the last step; the inputs they refer to are released once the caller drops them."""
        records: dict[str, Record] = {}
        ranks = Ranks() if self._always else self.ranks
        for finished in [self._pass] if self._always else self._finished:
            for name, uses in finished.uses.items():
                record = records.setdefault(name, Record(self._views[name], ranks=ranks))
                record.passes.append(uses)
        self.clear()
        return records

    @contextmanager
    def inputs_only(self) -> Iterator[None]:
        """Record inputs whatever the mode of the model, with gradients off, for means on this rank: the warm start."""
        outputs, self._outputs, self._always = self._outputs, False, True
        try:
            yield
        finally:
            self._outputs, self._always = outputs, False

    @contextmanager
    def frozen_parameters(self) -> Iterator[None]:
        """For a pass in which no parameter requires a gradient: the graph starts at the first layer's output."""
        self._start_graph = True
        try:
            yield
        finally:
            self._start_graph = False

    def _fires(self, module: nn.Module) -> bool:
        return self._always or (self.watching and module.training and torch.is_grad_enabled())

    def _observe(self, name: str, x: Tensor, h: Tensor) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            return h  # per-sample gradients, Hessians: tensors that end with the transform
        self.ranks.notice()
        uses = self._pass.uses.setdefault(name, [])
        if uses and torch._C._current_graph_task_id() != -1:
            return h  # activation checkpointing runs the layer again during backward
        use = Use(x.detach(), self._views[name].locations(x))
        uses.append(use)
        if self._always:
            return h
        if self._start_graph and not h.requires_grad:
            h = h.requires_grad_().clone()  # a clone, because an in-place activation may not overwrite a leaf
        view, current = self._views[name], self._pass
        if self._outputs:
            use.h_sum = view.sum_output(h.detach())

        def on_gradient(grad: Tensor) -> None:
            if not current.reached:
                current.reached = True
                self._finished.append(current)
            if self._outputs:
                g_sum = view.sum_output(grad)
                use.g_sum = g_sum if use.g_sum is None else use.g_sum + g_sum  # several losses, several backwards

        if h.requires_grad:
            h.register_hook(on_gradient)
        return h


@dataclass
class _Pass:
    """The uses of every layer in one forward pass, and whether backward reached one of them."""

    uses: dict[str, list[Use]] = field(default_factory=dict)
    reached: bool = False


@dataclass
class _Hook:
    """What is registered on a module. A copy of it does nothing, until a capture that was copied along claims it."""

    capture: Callable[[], Capture | None]
    module: Callable[[], nn.Module | None]

    def listener(self, module: nn.Module) -> Capture | None:
        """The capture that wants to hear of this forward of `module`, if there is one."""
        capture = self.capture()
        if capture is None or module is not self.module() or not capture._fires(module):
            return None
        return capture

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"capture": _gone, "module": _gone}


class _PassHook(_Hook):
    """Model pre-hook: a new training pass begins."""

    def __call__(self, model: nn.Module, args: object) -> None:
        capture = self.listener(model)
        if capture is not None:
            capture._pass = _Pass()


@dataclass
class _LayerHook(_Hook):
    """Layer hook: hand input and output of the module it was made for to the capture."""

    name: str

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], h: Tensor) -> Tensor:
        capture = self.listener(module)
        if capture is None:
            return h
        # What keeps the tracer out costs more than the observation itself: only where there is a tracer.
        observe = capture._observe_eagerly if torch.compiler.is_compiling() else Capture._observe
        return observe(capture, self.name, args[0], h)


def _gone() -> None:
    """A weak reference that pickles: what it referred to is no more."""


def _eager(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, which `torch.compile` calls and does not trace. As a decorator it would cost a second at import."""
    return torch.compiler.disable(function)


def _total(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _known(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(
            "this pass holds no output or no gradient of the layer: backward must reach every layer that forward used"
        )
    return value

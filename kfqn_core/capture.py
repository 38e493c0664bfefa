"""What one forward and backward pass tells about each layer (chapters 8 and 9).

One forward hook per layer reads the layer's input `x` and its pre-activation `h`; a tensor hook on `h` reads the
gradient. Only means over samples and locations of `h` and `g = dl/dh` are kept: the secant pair of `H_g` is
a difference of such means, `O(d)` numbers per layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfqn_core.layers import LayerView


@dataclass
class Record:
    """One layer in one pass."""

    x: Tensor
    """The layer's input, as the layer saw it (a reference, not a copy)."""
    h_mean: Tensor | None = None
    """Mean pre-activation over samples and locations, `[groups, d_out]`."""
    g_mean: Tensor | None = None
    """Mean of the per-sample gradients `g = dl_i/dh` over samples and locations, `[groups, d_out]`."""


class Capture:
    """Records of every layer in `layers` during training forwards of `model`.

    A hook fires only where gradients are enabled and the layer is in training mode, so evaluation leaves no trace.
    The hooks know this object weakly, and fire only for the module they were made for: neither a deleted optimizer nor
    a deep copy of the model writes anywhere.

    Args:
        model: its forward marks the beginning of a pass: the records of the previous one are dropped.
        layers: the layers to watch, by name, each with its view.
        outputs: whether the means of `h` and `g` are wanted; without them only inputs are kept.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, tuple[nn.Module, LayerView]], *, outputs: bool):
        self.records: dict[str, Record] = {}
        self._views = {name: view for name, (_, view) in layers.items()}
        self._outputs = outputs
        self._always = False
        self._start_graph = False
        this = weakref.ref(self)
        self._handles = [model.register_forward_pre_hook(_PassHook(this))]
        for name, (module, _) in layers.items():
            self._handles.append(module.register_forward_hook(_LayerHook(this, name, weakref.ref(module))))

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.records = {}

    def take(self) -> dict[str, Record]:
        """The records of the last pass; the inputs they refer to are released once the caller drops them."""
        records, self.records = self.records, {}
        return records

    @contextmanager
    def inputs_only(self) -> Iterator[None]:
        """Record inputs whatever the mode of the model, with gradients off: the warm start."""
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

    def _observe(self, name: str, x: Tensor, h: Tensor) -> Tensor:
        if name in self.records:
            raise RuntimeError(
                f"layer {name!r} was used twice in one forward pass; KFQN keeps one input and one output per layer: "
                "use two layers, or leave this one to another optimizer"
            )
        record = self.records[name] = Record(x.detach())
        if not self._outputs:
            return h
        if self._start_graph and not h.requires_grad:
            h = h.requires_grad_().clone()  # a clone, because an in-place activation may not overwrite a leaf
        view = self._views[name]
        record.h_mean = view.mean_output(h.detach())
        samples = h.shape[0]

        def keep_gradient(grad: Tensor) -> None:
            # The loss is a mean over samples, so autograd's gradient is 1/m of the per-sample one.
            record.g_mean = samples * view.mean_output(grad)

        h.register_hook(keep_gradient)
        return h


@dataclass
class _PassHook:
    """Model pre-hook: a new training pass begins."""

    capture: weakref.ref[Capture]

    def __call__(self, model: nn.Module, args: object) -> None:
        capture = self.capture()
        if capture is not None and (capture._always or (model.training and torch.is_grad_enabled())):
            capture.records = {}


@dataclass
class _LayerHook:
    """Layer hook: hand input and output of the module it was made for to the capture."""

    capture: weakref.ref[Capture]
    name: str
    module: weakref.ref[nn.Module]

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], h: Tensor) -> Tensor:
        capture = self.capture()
        if capture is None or module is not self.module():
            return h
        if capture._always or (module.training and torch.is_grad_enabled()):
            return capture._observe(self.name, args[0], h)
        return h

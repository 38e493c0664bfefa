"""The table of kinds of layers, and the door to it."""

from __future__ import annotations

from torch import nn

from kfqn_core.layers.convolution import ConvView
from kfqn_core.layers.linear import LinearView
from kfqn_core.layers.view import LayerView, UnsupportedLayer

SUPPORTED: dict[type[nn.Module], type[LayerView]] = {
    nn.Linear: LinearView,
    nn.Conv1d: ConvView,
    nn.Conv2d: ConvView,
    nn.Conv3d: ConvView,
}


def view(layer: nn.Module) -> LayerView:
    """The `LayerView` of a layer.

    Accepted: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, and subclasses that keep their forward and own their
    weight. Raises UnsupportedLayer (a TypeError) for anything else.
    """
    name = type(layer).__name__
    base = next((kind for kind in SUPPORTED if isinstance(layer, kind)), None)
    if base is None:
        raise UnsupportedLayer(
            f"{name} is not a layer that this package writes as h = W a; supported: "
            f"{', '.join(f'nn.{kind.__name__}' for kind in SUPPORTED)}. Leave its parameters to the fallback"
        )
    for method in ("forward", "_conv_forward"):
        if getattr(type(layer), method, None) is not getattr(base, method, None) or method in vars(layer):
            raise UnsupportedLayer(
                f"{name} replaces the forward of nn.{base.__name__}, so h = W a may not be what it computes; "
                f"use nn.{base.__name__}, or leave its parameters to the fallback"
            )
    if not isinstance(layer.weight, nn.Parameter):
        raise UnsupportedLayer(
            f"{name} computes its weight from other parameters, so h is not linear in those; "
            "remove the parametrization, or leave its parameters to the fallback"
        )
    if nn.parameter.is_lazy(layer.weight):
        raise UnsupportedLayer(f"{name} does not know its input size yet; run one forward pass first")
    return SUPPORTED[base](layer)  # type: ignore[call-arg]

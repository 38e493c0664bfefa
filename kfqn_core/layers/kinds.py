"""The table of kinds of layers, and the doors to it: `parts`, `view`, `register`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kfqn_core.layers.convolution import ConvView
from kfqn_core.layers.linear import LinearView
from kfqn_core.layers.view import Call, LayerView, UnsupportedLayer


def input_and_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call | None:
    """The call of a layer whose first argument is its input and whose output is `h`; None for anything else."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    return Call(x, output) if isinstance(x, Tensor) and isinstance(output, Tensor) else None


@dataclass(frozen=True)
class Part:
    """One matrix `[W | b]` of a module; most modules are one.

    Attributes:
        name: `""` where the module is one matrix, else what distinguishes this one (`"in_proj"`).
        view: the matrix as `h = W a`.
        weight, bias: its parameters, as dotted names below the module; `bias` is None if there is none.
        call: from `(module, args, kwargs, output)` of a forward to what it showed, or None if it showed nothing.
    """

    name: str
    view: LayerView
    weight: str = "weight"
    bias: str | None = "bias"
    call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Call | None] = input_and_output


SUPPORTED: dict[type[nn.Module], Callable[[Any], LayerView]] = {
    nn.Linear: LinearView,
    nn.Conv1d: ConvView,
    nn.Conv2d: ConvView,
    nn.Conv3d: ConvView,
}


def parts(module: nn.Module) -> tuple[Part, ...]:
    """Every matrix of a module by itself, those of its children not included.

    Raises:
        UnsupportedLayer: if there is none.
    """
    layer_view = view(module)
    return (Part("", layer_view, bias="bias" if layer_view.has_bias else None),)


def view(layer: nn.Module) -> LayerView:
    """The `LayerView` of a layer.

    Accepted: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, and subclasses that keep their forward and own their
    weight.

    Raises:
        UnsupportedLayer: a TypeError, for anything else.
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
    return SUPPORTED[base](layer)

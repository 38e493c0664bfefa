"""The table of kinds of layers, and the doors to it: `parts`, `view`, `register`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kfqn_core.layers import attention, experts
from kfqn_core.layers.convolution import ConvView
from kfqn_core.layers.embedding import EmbeddingView
from kfqn_core.layers.linear import LinearView, TransposedLinearView
from kfqn_core.layers.transposed import TransposedConvView, call_of_default_size
from kfqn_core.layers.view import Call, LayerView, Part, UnsupportedLayer, input_and_output

ShowsCall = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Call | None]


def _one(
    view: Callable[[Any], LayerView], call: ShowsCall = input_and_output, weight: str = "weight", bias: str = "bias"
) -> Callable[[Any], tuple[Part, ...]]:
    """The parts of a module that is one matrix."""

    def parts_of(module: nn.Module) -> tuple[Part, ...]:
        _check_weight(module, weight)
        layer_view = view(module)
        if not isinstance(layer_view, LayerView):
            raise TypeError(f"the view of {type(module).__name__} is {layer_view!r}, but a LayerView is needed")
        return (Part("", layer_view, weight, bias if layer_view.has_bias else None, call),)

    return parts_of


# Which classes hold which matrices. A name stands for a class of a package that is not imported here.
SUPPORTED: dict[type[nn.Module] | str, Callable[[Any], tuple[Part, ...]]] = {
    nn.Linear: _one(LinearView),
    nn.Conv1d: _one(ConvView),
    nn.Conv2d: _one(ConvView),
    nn.Conv3d: _one(ConvView),
    nn.ConvTranspose1d: _one(TransposedConvView, call_of_default_size),
    nn.ConvTranspose2d: _one(TransposedConvView, call_of_default_size),
    nn.ConvTranspose3d: _one(TransposedConvView, call_of_default_size),
    nn.Embedding: _one(EmbeddingView),
    nn.MultiheadAttention: attention.parts,
    "transformers.pytorch_utils.Conv1D": _one(TransposedLinearView),
    NonDynamicallyQuantizableLinear: attention.refuse_out_projection,
}


def register(
    kind: type[nn.Module],
    view: Callable[[Any], LayerView],
    *,
    call: ShowsCall = input_and_output,
    weight: str = "weight",
    bias: str = "bias",
) -> None:
    """Teach this package a kind of layer: modules of the class `kind` are `h = W a` as `view` says.

    It holds for subclasses too, unless they replace the forward or are registered themselves, and for what is made
    afterwards: register before the optimizer is built. Registering a class again replaces its entry. Nothing here can
    check that the layer computes what its view says; `truth.ladder.structured_hessian` against
    `truth.exact.layer_hessian` can.

    Args:
        kind: the class.
        view: from a module to its `LayerView`; a subclass of `LayerView` is such a function.
        call: from `(module, args, kwargs, output)` of a forward to the `Call` that the view understands, or None where
            it showed nothing. The default is for a layer that takes its input first and returns `h`.
        weight: the name of its weight, dotted where it belongs to a child.
        bias: that of its bias, used where the view has one.

    Raises:
        TypeError: if `kind` is no subclass of `nn.Module`, or `view` cannot be called.
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise TypeError(f"a kind of layer is a subclass of nn.Module, not {kind!r}")
    if not callable(view):
        raise TypeError(f"the view of {kind.__name__} must be a function from a module to a LayerView, not {view!r}")
    SUPPORTED[kind] = _one(view, call, weight, bias)


def parts(module: nn.Module) -> tuple[Part, ...]:
    """Every matrix of a module by itself, those of its children not included.

    The most derived class in the table decides. `nn.MultiheadAttention` and mixtures of experts also offer what they
    use without calling it.

    Raises:
        UnsupportedLayer: if there is none.
    """
    for kind in type(module).__mro__:
        found = SUPPORTED.get(kind) or SUPPORTED.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is None and experts.recognised(kind):
            found = experts.parts
        if found is not None:
            _check_forward(module, kind)
            return found(module)
    public = [kind for kind in SUPPORTED if kind is not NonDynamicallyQuantizableLinear]
    raise UnsupportedLayer(
        f"{type(module).__name__} is not a layer that this package writes as h = W a; supported: "
        f"{', '.join(_name(kind) for kind in public)}. Leave its parameters to the fallback, or register its kind"
    )


def view(layer: nn.Module) -> LayerView:
    """The `LayerView` of a layer that is one matrix.

    Accepted: `nn.Linear`, `nn.Conv1d`, `2d`, `3d`, `nn.ConvTranspose1d`, `2d`, `3d`, `nn.Embedding`, Hugging Face's
    `Conv1D`, kinds that were registered, and subclasses that keep their forward and own their weight.

    Raises:
        UnsupportedLayer: a TypeError, for anything else; modules with several matrices have `parts`.
    """
    found = parts(layer)
    if len(found) != 1 or found[0].name:
        names = ", ".join(part.name for part in found)
        raise UnsupportedLayer(
            f"{type(layer).__name__} holds {names}, which are not the weight of a layer; use layers.parts"
        )
    return found[0].view


def _check_forward(module: nn.Module, kind: type) -> None:
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(kind, method, None) or method in vars(module):
            base = _name(kind)
            raise UnsupportedLayer(
                f"{type(module).__name__} replaces the forward of {base}, so h = W a may not be what it computes; "
                f"use {base}, or leave its parameters to the fallback"
            )


def _check_weight(module: nn.Module, name: str) -> None:
    weight: Any = module
    for attribute in name.split("."):
        weight = getattr(weight, attribute, None)
    if weight is None:
        raise UnsupportedLayer(
            f"{type(module).__name__} has no parameter {name!r}; say which it is when its kind is registered"
        )
    if not isinstance(weight, nn.Parameter):
        raise UnsupportedLayer(
            f"{type(module).__name__} computes its weight from other parameters, so h is not linear in those; "
            "remove the parametrization, or leave its parameters to the fallback"
        )
    if nn.parameter.is_lazy(weight):
        raise UnsupportedLayer(f"{type(module).__name__} does not know its input size yet; run one forward pass first")


def _name(kind: type | str) -> str:
    if isinstance(kind, str):
        return kind
    return f"nn.{kind.__name__}" if getattr(nn, kind.__name__, None) is kind else kind.__name__

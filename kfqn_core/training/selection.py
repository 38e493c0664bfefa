"""Which matrices of a model get factors, of which form, and which layers are one group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfqn_core.layers import LayerView, Part, UnsupportedLayer, parts
from kfqn_core.parallel.shards import is_shard

# Inputs of the widest layer that "auto" gives a matrix: M H_a costs d_in / (3 N T) of a forward and backward pass, more
# than the pass itself in wide layers with small mini-batches.
WIDEST = 512


@dataclass(frozen=True, eq=False)
class Selected:
    """A matrix of a model that gets factors.

    Attributes:
        name: of the layer in the model.
        module, part: whose matrix it is; `part.view` is without bias where the bias is nobody's to train.
        weight, bias: its parameters; the bias is None if there is none that moves along.
    """

    name: str
    module: nn.Module
    part: Part
    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def view(self) -> LayerView:
        """The matrix as `h = W a`."""
        return self.part.view

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def curvature_layers(
    model: nn.Module, may_move: Callable[[nn.Parameter], bool] = lambda p: p.requires_grad
) -> dict[str, Selected]:  # fmt: skip
    """The matrices of a model that can get Kronecker factors, by name.

    One qualifies if `layers.parts` knows its module, its weight may move, is real, not empty, and belongs to no other
    module. A bias that may not move, or is shared, stays out of `[W | b]`.

    Args:
        model: any module.
        may_move: whether a parameter is trainable and wants curvature.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            uses[id(p)] = uses.get(id(p), 0) + 1
    selected: dict[str, Selected] = {}
    for name, module in model.named_modules():
        try:
            own = parts(module)
        except UnsupportedLayer:
            continue
        for part in own:
            weight = _parameter(module, part.weight)
            if weight is None or uses[id(weight)] > 1 or not may_move(weight):
                continue
            if not weight.is_floating_point() or not weight.numel():
                continue
            bias = _parameter(module, part.bias) if part.bias else None
            if bias is not None and (uses[id(bias)] > 1 or not may_move(bias)):
                bias = None
            if part.view.has_bias and bias is None:
                part = replace(part, view=part.view.without_bias())
            full_name = ".".join(filter(None, (name, part.name)))
            selected[full_name] = Selected(full_name, module, part, weight, bias)
    return selected


def _parameter(module: nn.Module, dotted: str) -> nn.Parameter | None:
    owner, _, name = dotted.rpartition(".")
    p = module.get_submodule(owner)._parameters.get(name)
    return p if isinstance(p, nn.Parameter) else None


class Sizes(Protocol):
    """What is asked of a layer to decide how its `H_a` is kept."""

    groups: int
    d_in: int
    d_out: int
    diagonal_only: bool


def activation_factors(
    layers: Sequence[Sizes], rank: int, given: Mapping[int, str] | None = None
) -> list[str]:  # fmt: skip
    """What `activation_factor="auto"` stands for in each layer: `"action"`, `"low_rank"` or `"diagonal"`.

    All factors together hold at most as many numbers as the weights, which is what Adam keeps as second moments. So:
    matrices, but for layers with more than `WIDEST` inputs; as long as that is too much the largest gives way to the
    next smaller form, and of equal ones the last (the first was worse, benchmarks/NOTES.md). The smallest form, a
    diagonal, is never larger than the weight.

    Args:
        layers: in the order of the model.
        rank: of the low-rank form.
        given: forms that are fixed already, by position: those of layers that have been trained.
    """
    given = given or {}
    sizes = [_numbers(layer, rank) for layer in layers]
    weights = sum(layer.groups * layer.d_out * layer.d_in for layer in layers)
    kinds = []
    for i, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        if layer.diagonal_only:
            kinds.append("diagonal")
        elif i in given:
            kinds.append(given[i])
        else:
            kinds.append("low_rank" if layer.d_in > WIDEST and size["low_rank"] < size["action"] else "action")
    for _ in range(2 * len(layers)):
        held = [size[kind] for size, kind in zip(sizes, kinds, strict=True)]
        free = [i for i, kind in enumerate(kinds) if kind != "diagonal" and i not in given]
        if sum(held) <= weights or not free:
            break
        # Matrices give way first, the largest of them, then the low-rank forms.
        largest = max(free, key=lambda i: (kinds[i] == "action", held[i], i))
        smaller = kinds[largest] == "action" and sizes[largest]["low_rank"] < held[largest]
        kinds[largest] = "low_rank" if smaller else "diagonal"
    return kinds


def _numbers(layer: Sizes, rank: int) -> dict[str, int]:
    """How many numbers each form keeps."""
    rows = layer.groups * layer.d_in
    return {"action": rows * layer.d_in, "low_rank": (2 * rank + 2) * rows, "diagonal": rows}


def shape_key(layer: Selected) -> tuple[Any, ...]:
    """What layers of one group have in common: their tensors lie side by side."""
    view, weight = layer.view, layer.weight
    return view.groups, view.d_out, view.d_in, view.has_bias, weight.dtype, weight.device, is_shard(weight)


def dtype_of_factors(weight: Tensor) -> torch.dtype:
    """That of the weight, in float32 at least."""
    return torch.promote_types(weight.dtype, torch.float32)

"""The update of one layer, and which layers of a model get one (chapter 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.capture import Record
from kfqn_core.factors import ActivationFactor, GradientFactor
from kfqn_core.layers import LayerView, UnsupportedLayer, view


@dataclass
class Layer:
    """A curvature layer: its parameters, the momentum of their gradient, and the two factors.

    `M` is `[groups, d_out, d_in]`, the running average of the gradient matrix; `gradient` is None where `H_g` is the
    identity.
    """

    name: str
    view: LayerView
    weight: nn.Parameter
    bias: nn.Parameter | None
    M: Tensor
    activation: ActivationFactor
    gradient: GradientFactor | None

    @classmethod
    def build(
        cls,
        name: str,
        module: nn.Module,
        layer_view: LayerView,
        *,
        damping: tuple[float, float],
        pairs: str | None,
        activation_decay: float | None,
        memory: int | None,
        pair_momentum: float,
        mu1: float,
    ) -> Layer:
        """Allocate the state of one layer beside its weight, in float32 at least.

        `damping` is `(lambda_A, lambda_G)`; the other options are those of `KFQN`.
        """
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        like: dict[str, Any] = {
            "dtype": torch.promote_types(weight.dtype, torch.float32),
            "device": weight.device,
        }
        M = torch.zeros(layer_view.groups, layer_view.d_out, layer_view.d_in, **like)
        activation = ActivationFactor(layer_view, damping[0], activation_decay, **like)
        gradient = None
        if pairs is not None:
            gradient = GradientFactor(layer_view, damping[1], memory, pair_momentum=pair_momentum, mu1=mu1, **like)
        return cls(name, layer_view, weight, bias, M, activation, gradient)

    def gradient_matrix(self, weight_decay: float) -> Tensor:
        """`[dW | db] + weight_decay [W | b]`, `[groups, d_out, d_in]`, in the dtype of the factors."""
        assert self.weight.grad is not None
        bias_grad = None if self.bias is None else self.bias.grad
        G = self.view.to_matrix(self.weight.grad, bias_grad).to(self.M.dtype)
        return G.add(self.view.to_matrix(self.weight, self.bias), alpha=weight_decay) if weight_decay else G

    def direction(self) -> Tensor:
        """`D = H_g M H_a`, `[groups, d_out, d_in]`: the inverse of the Kronecker-factored Hessian applied to `M`."""
        D = self.M @ self.activation.H
        return D if self.gradient is None else self.gradient.inverse.apply(D)

    def move(self, step: Tensor) -> None:
        """`[W | b] <- [W | b] - step`, `step` `[groups, d_out, d_in]`."""
        weight_step, bias_step = self.view.from_matrix(step)
        self.weight.sub_(weight_step)
        if self.bias is not None and bias_step is not None:
            self.bias.sub_(bias_step)

    def update_gradient_factor(self, before: Record, after: Record, finite: Tensor) -> None:
        """`H_g` from the same mini-batch before and after the step, where `finite` holds.

        Raises:
            RuntimeError: if no gradient reached the layer's output in one of the passes.
        """
        if self.gradient is None:
            raise ValueError(f"layer {self.name!r} keeps no H_g: KFQN was made with pairs=None")
        if before.h_mean is None or before.g_mean is None or after.h_mean is None or after.g_mean is None:
            raise RuntimeError(f"no gradient reached the output of layer {self.name!r}: the closure must call backward")
        self.gradient.update(after.h_mean - before.h_mean, after.g_mean - before.g_mean, before.g_mean, finite)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name."""
        curvature = {} if self.gradient is None else self.gradient.tensors()
        return {"M": self.M, **self.activation.tensors(), **curvature}


def curvature_layers(model: nn.Module) -> tuple[dict[str, tuple[nn.Module, LayerView]], dict[str, nn.Parameter]]:
    """The layers that get Kronecker factors, and the trainable parameters that do not, both by name.

    A layer qualifies if `layers.view` supports it, all its parameters are trainable, and no other module shares them.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            uses[id(p)] = uses.get(id(p), 0) + 1
    layers: dict[str, tuple[nn.Module, LayerView]] = {}
    taken: set[int] = set()
    for name, module in model.named_modules():
        try:
            layer_view = view(module)
        except UnsupportedLayer:
            continue
        own = list(module.parameters(recurse=False))
        if all(p.requires_grad and uses[id(p)] == 1 for p in own):
            layers[name] = (module, layer_view)
            taken.update(id(p) for p in own)
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken}
    return layers, rest

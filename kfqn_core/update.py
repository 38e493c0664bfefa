"""The update of one layer, and which layers of a model get one (chapter 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.capture import Record
from kfqn_core.factors import ActivationFactor, ExactActivationFactor, GradientFactor
from kfqn_core.layers import LayerView, UnsupportedLayer, view
from kfqn_core.low_rank import LowRankActivationFactor


@dataclass
class Layer:
    """A curvature layer: its parameters, the momentum of their gradient, and the two factors.

    `M` is `[groups, d_out, d_in]`, the momentum of the gradient matrix; `gradient` is None where `H_g` is the identity.
    `h_last` and `g_last` are `[groups, d_out]`, the means of the previous mini-batch where pairs come from consecutive
    ones, else None; NaN until a first one was seen.
    """

    name: str
    view: LayerView
    weight: nn.Parameter
    bias: nn.Parameter | None
    M: Tensor
    activation: ActivationFactor | LowRankActivationFactor
    gradient: GradientFactor | None
    h_last: Tensor | None
    g_last: Tensor | None
    damping: float
    damping_split: str

    @classmethod
    def build(
        cls,
        name: str,
        module: nn.Module,
        layer_view: LayerView,
        *,
        damping: float,
        damping_split: str,
        pairs: str | None,
        activation_factor: str,
        rank: int,
        activation_decay: float | None,
        memory: int | None,
        pair_damping: str,
        pair_momentum: float,
        mu1: float,
    ) -> Layer:
        """Allocate the state of one layer beside its weight, in float32 at least. The options are those of `KFQN`."""
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        like: dict[str, Any] = {
            "dtype": torch.promote_types(weight.dtype, torch.float32),
            "device": weight.device,
        }
        M = torch.zeros(layer_view.groups, layer_view.d_out, layer_view.d_in, **like)
        activation: ActivationFactor | LowRankActivationFactor
        if _is_low_rank(activation_factor, layer_view, rank):
            activation = LowRankActivationFactor(layer_view, damping, rank, **like)
        else:
            kind = ExactActivationFactor if activation_factor == "inverse" else ActivationFactor
            activation = kind(layer_view, damping, activation_decay, **like)
        gradient = h_last = g_last = None
        if pairs is not None:
            gradient = GradientFactor(
                layer_view, damping, memory,
                pair_damping=pair_damping, pair_momentum=pair_momentum, mu1=mu1, **like,
            )  # fmt: skip
        if pairs == "next_batch":
            h_last, g_last = (torch.full((layer_view.groups, layer_view.d_out), torch.nan, **like) for _ in range(2))
        return cls(
            name, layer_view, weight, bias, M, activation, gradient, h_last, g_last, damping, damping_split
        )  # fmt: skip

    def split_damping(self, T: float) -> None:
        """lambda -> lambda_A, lambda_G for a layer with T locations.

        Without `H_g`, `A` carries it all. `"even"` gives each sqrt(lambda); `"locations"` gives sqrt(lambda T) to `A`,
        which sums over locations, and sqrt(lambda / T) to `G`, which averages (2022; what this does when T changes is
        in chapter 9). The product is lambda in both.
        """
        if self.gradient is None:
            self.activation.damping = self.damping
            return
        T = T if self.damping_split == "locations" else 1.0
        self.activation.damping = math.sqrt(self.damping * T)
        self.gradient.damping = math.sqrt(self.damping / T)

    def average_gradient(self, weight_decay: float, momentum: float, finite: Tensor) -> None:
        """`M <- momentum M + (1 - momentum) ([dW | db] + weight_decay [W | b])`, where `finite` holds."""
        for M, p in zip(self.view.from_matrix(self.M), (self.weight, self.bias), strict=True):
            if M is None or p is None:
                continue
            assert p.grad is not None
            G = p.grad.to(M.dtype)
            G = G.add(p, alpha=weight_decay) if weight_decay else G
            M.lerp_(torch.where(finite, G, M), 1.0 - momentum)  # a view: self.M moves

    def direction(self) -> Tensor:
        """`D = H_g M H_a`, `[groups, d_out, d_in]`: the inverse of the Kronecker-factored Hessian applied to `M`."""
        D = self.activation.precondition(self.M)
        return D if self.gradient is None else self.gradient.inverse.apply(D)

    def move(self, D: Tensor, length: Tensor) -> None:
        """`[W | b] <- [W | b] - length D`; `D` `[groups, d_out, d_in]`, `length` one entry or `[groups, d_out, 1]`."""
        weight, bias = self.view.from_matrix(D)
        self.weight.addcmul_(weight, length.reshape(-1, *[1] * (weight.dim() - 1)), value=-1)
        if self.bias is not None and bias is not None:
            self.bias.addcmul_(bias, length.reshape(-1), value=-1)

    def pair_with(self, before: Record, after: Record, finite: Tensor) -> None:
        """`H_g` from the same mini-batch before and after the step, where `finite` holds.

        Raises:
            ValueError: if `H_g` is the identity, or no gradient reached the layer's output in one of the passes.
        """
        if self.gradient is None:
            raise ValueError(f"layer {self.name!r} keeps no H_g: KFQN was made with pairs=None")
        g_mean = before.mean_gradient()
        s, y = after.mean_output() - before.mean_output(), after.mean_gradient() - g_mean
        self.gradient.update(s, y, g_mean, finite)

    def pair_with_last(self, record: Record, refresh: bool, finite: Tensor) -> None:
        """`H_g` from this mini-batch and the one before, if `refresh` and where `finite` holds; then remember this one.

        Raises:
            ValueError: if the layer was not built for `pairs="next_batch"`, or no gradient reached its output.
        """
        if self.gradient is None or self.h_last is None or self.g_last is None:
            raise ValueError(f'layer {self.name!r} remembers no mini-batch: KFQN was not made with pairs="next_batch"')
        h_mean, g_mean = record.mean_output().to(self.h_last.dtype), record.mean_gradient().to(self.h_last.dtype)
        if refresh:
            self.gradient.update(h_mean - self.h_last, g_mean - self.g_last, self.g_last, finite)
        self.h_last.copy_(torch.where(finite, h_mean, self.h_last))
        self.g_last.copy_(torch.where(finite, g_mean, self.g_last))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name."""
        curvature = {} if self.gradient is None else self.gradient.tensors()
        last = {"h_last": self.h_last, "g_last": self.g_last}
        return {
            "M": self.M,
            **self.activation.tensors(),
            **curvature,
            **{name: tensor for name, tensor in last.items() if tensor is not None},
        }


def _is_low_rank(activation_factor: str, layer_view: LayerView, rank: int) -> bool:
    """Whether a layer keeps a low-rank `H_a`: if that is asked for and smaller, `"auto"` where it also pays.

    A dense `H_a` is larger than the weight exactly where the layer has more inputs than outputs; elsewhere it costs
    less than Adam's second moment.
    """
    smaller = 2 * rank < layer_view.d_in
    if activation_factor == "auto":
        return smaller and layer_view.d_in > layer_view.d_out
    return smaller and activation_factor == "low_rank"


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

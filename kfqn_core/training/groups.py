"""The update of one layer, and which layers of a model get one (chapter 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfqn_core.estimate.hooks import Record
from kfqn_core.estimate.inverses import ActivationFactor, Change, ExactActivationFactor, GradientFactor, Pair
from kfqn_core.estimate.low_rank import LowRankActivationFactor
from kfqn_core.layers import LayerView, UnsupportedLayer, view

# Inputs of the widest layer that "auto" gives a matrix: M H_a costs d_in / (3 N T) of a forward and backward pass, more
# than the pass itself in wide layers with small mini-batches.
WIDEST = 512


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
    _momenta: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._momenta = self.parts(self.M)

    def __getstate__(self) -> dict[str, Any]:
        # The views of M are made anew: unpickled ones would have memory of their own.
        return {key: value for key, value in vars(self).items() if key != "_momenta"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._momenta = self.parts(self.M)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def parts(self, W: Tensor) -> list[Tensor]:
        """Views of `W` `[groups, d_out, d_in]`, one for each of `parameters` and shaped like it."""
        return [part for part in self.view.from_matrix(W) if part is not None]

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
        """Allocate the state of one layer beside its weight, in float32 at least.

        The options are those of `KFQN`, but for `"auto"`, which is decided over all layers (`activation_factors`).
        """
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        like: dict[str, Any] = {
            "dtype": torch.promote_types(weight.dtype, torch.float32),
            "device": weight.device,
        }
        M = torch.zeros(layer_view.groups, layer_view.d_out, layer_view.d_in, **like)
        activation: ActivationFactor | LowRankActivationFactor
        if activation_factor == "low_rank" and 2 * rank < layer_view.d_in:  # elsewhere a matrix is smaller
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

    def direction(self) -> Tensor:
        """`D = H_g M H_a`, `[groups, d_out, d_in]`: the inverse of the Kronecker-factored Hessian applied to `M`."""
        D = self.activation.precondition(self.M)
        return D if self.gradient is None else self.gradient.inverse.apply(D)

    def activation_pairs(self, record: Record, finite: Tensor) -> list[Pair]:
        """The pair of `H_a` from this mini-batch; one that is not kept by pairs is updated, where `finite` holds."""
        if type(self.activation) is ActivationFactor:
            return [self.activation.pair(record)]
        self.activation.update(record, finite)
        return []

    def change(self, before: Record, after: Record) -> Change:
        """What `H_g` learns from the same mini-batch before and after the step.

        Raises:
            ValueError: if `H_g` is the identity, or no gradient reached the layer's output in one of the passes.
        """
        if self.gradient is None:
            raise ValueError(f"layer {self.name!r} keeps no H_g: KFQN was made with pairs=None")
        g_mean = before.mean_gradient()
        return Change(self.gradient, after.mean_output() - before.mean_output(), after.mean_gradient() - g_mean, g_mean)

    def change_since_last(self, record: Record, refresh: bool, finite: Tensor) -> list[Change]:
        """What `H_g` learns from this mini-batch and the one before, if `refresh`; then remember this one.

        It is remembered where `finite` holds.

        Raises:
            ValueError: if the layer was not built for `pairs="next_batch"`, or no gradient reached its output.
        """
        if self.gradient is None or self.h_last is None or self.g_last is None:
            raise ValueError(f'layer {self.name!r} remembers no mini-batch: KFQN was not made with pairs="next_batch"')
        h_mean, g_mean = record.mean_output().to(self.h_last.dtype), record.mean_gradient().to(self.h_last.dtype)
        changes = []
        if refresh:
            # A copy of the last gradient: it is looked at once more, when the pair is appended.
            changes = [Change(self.gradient, h_mean - self.h_last, g_mean - self.g_last, self.g_last.clone())]
        self.h_last.copy_(torch.where(finite, h_mean, self.h_last))
        self.g_last.copy_(torch.where(finite, g_mean, self.g_last))
        return changes

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


# A step does the same few things to every layer. Taken over all layers at once they are few kernels on a GPU, and few
# calls elsewhere.


def average_gradients(layers: Sequence[Layer], weight_decay: float, momentum: float, finite: Tensor) -> None:
    """`M <- momentum M + (1 - momentum) ([dW | db] + weight_decay [W | b])`, where `finite` holds."""
    momenta = [M for layer in layers for M in layer._momenta]
    params: list[Tensor] = [p for layer in layers for p in layer.parameters]
    gradients = [p.grad.to(M.dtype) for M, p in zip(momenta, params, strict=True) if p.grad is not None]
    if weight_decay:
        gradients = list(torch._foreach_add(gradients, params, alpha=weight_decay))
    # Where the step is skipped the weight is zero; but 0 times NaN is NaN, so that entries which are not finite become
    # zero first. Together this takes half the time of a choice between G and M.
    gradients = [torch.nan_to_num(G, nan=0.0, posinf=0.0, neginf=0.0) for G in gradients]
    weights = {dtype: (1.0 - momentum) * finite.to(dtype) for dtype in {M.dtype for M in momenta}}
    torch._foreach_lerp_(momenta, gradients, [weights[M.dtype] for M in momenta])  # views: every layer's M moves


def move(layers: Sequence[Layer], directions: Sequence[Tensor], divisors: Sequence[Tensor]) -> None:
    """`[W | b] <- [W | b] - D / divisor`; `D` `[groups, d_out, d_in]`, `divisor` one entry or `[groups, d_out, 1]`."""
    params: list[Tensor] = [p for layer in layers for p in layer.parameters]
    parts = [part for layer, D in zip(layers, directions, strict=True) for part in layer.parts(D)]
    shaped = [
        divisor.reshape(-1, *[1] * (p.dim() - 1))
        for layer, divisor in zip(layers, divisors, strict=True) for p in layer.parameters
    ]  # fmt: skip
    torch._foreach_addcdiv_(params, parts, shaped, -1.0)


class Sizes(Protocol):
    """What is asked of a layer to decide how its `H_a` is kept."""

    groups: int
    d_in: int
    d_out: int


def activation_factors(layers: Sequence[Sizes], rank: int) -> list[str]:
    """What `activation_factor="auto"` stands for in each layer: `"action"` or `"low_rank"`.

    Matrices as long as the factors of all layers together hold no more numbers than the weights, which is what Adam
    keeps as second moments; beyond that the largest gives way first, and of equal ones the last (the first was worse,
    benchmarks/NOTES.md). And none for a layer with more than `WIDEST` inputs.
    """
    low_rank = [(2 * rank + 2) * layer.groups * layer.d_in for layer in layers]
    dense = [layer.groups * layer.d_in**2 for layer in layers]
    weights = sum(layer.groups * layer.d_out * layer.d_in for layer in layers)
    kinds = ["low_rank" if layer.d_in > WIDEST else "action" for layer in layers]
    for i in sorted(range(len(layers)), key=lambda i: (-dense[i], -i)):
        held = sum(a if kind == "action" else b for kind, a, b in zip(kinds, dense, low_rank, strict=True))
        if held <= weights or dense[i] <= low_rank[i]:
            break
        kinds[i] = "low_rank"
    return kinds


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

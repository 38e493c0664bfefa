"""A layer of the optimizer by itself, cut out of its group: what `KFQN.layers` shows."""

from __future__ import annotations

from torch import Tensor

from kfqn_core.estimate.activation import Activation
from kfqn_core.estimate.gradient import GradientFactor
from kfqn_core.layers import LayerView
from kfqn_core.training.groups import Group


class Layer:
    """A curvature layer as the optimizer's user looks at it: its parameters, the momentum, and the two factors.

    Attributes:
        name, view, weight, bias: of the layer.
    """

    def __init__(self, group: Group, i: int):
        selected = group.layers[i]
        self.name, self.weight, self.bias = selected.name, selected.weight, selected.bias
        self.view: LayerView = selected.view
        self._group, self._i = group, i

    @property
    def activation(self) -> Activation:
        """`H_a`, views of that of its group."""
        return self._held().layer_activation(self._i)

    @property
    def gradient(self) -> GradientFactor | None:
        """`H_g`, likewise; None where it is the identity."""
        return self._held().layer_gradient(self._i)

    @property
    def M(self) -> Tensor:
        """The momentum of `[W | b]`, `[groups, d_out, d_in]`. Where it is sharded every rank has to ask for it."""
        return self._group.momentum_of_layer(self._i)

    @property
    def started(self) -> bool:
        """Whether `H_a` has had its first estimate. Reading it waits for the device."""
        return bool(self._group.started[self._i])

    def direction(self) -> Tensor:
        """`D = H_g M H_a`, `[groups, d_out, d_in]`: the inverse of the Kronecker-factored Hessian applied to `M`."""
        D = self.M @ self.activation.H
        return D if self.gradient is None else self.gradient.inverse.apply(D)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name, `[groups, ...]` each."""
        rows = self._group.rows(self._i)
        return {"M": self.M, **{name: tensor[rows] for name, tensor in self._held().tensors().items()}}

    def _held(self) -> Group:
        """Its group. RuntimeError where another rank keeps the factors."""
        if not self._group.held:
            raise RuntimeError(
                f"the factors of layer {self.name!r} are kept by rank {self._group.owner} alone (owners=True): look "
                "there, or at state_dict(), which every rank has to call"
            )
        return self._group

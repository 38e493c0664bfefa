"""Experts as one parameter with three axes (mixtures of experts of Hugging Face's transformers, from version 5).

A router sends each of the rows of x to a few of E experts, and every expert e has a first layer `h = W_e x` of its own,
a slice of `gate_up_proj` `[E, d_out, d]`: a grouped layer in which a group sees some of the rows. To a group the others
are rows with `a = 0`, which add nothing: the gradient of W_e is a mean over all rows, and so is `A_e`,

    A_e v = 1/N sum_n m[n, e] x_n (x_n . v),    m[n, e] = 1 where row n goes to expert e, else 0.

No copies of rows, sorted by expert, are needed: the scores of all rows with all vectors are one product, the mask
takes those that count, and a second product sums. That costs E products per row where the layer itself has
k d_out of them, k experts being at work.

The input of the second layer, `down_proj`, is not shown by the module: that one is left to the fallback.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.layers.view import Call, LayerView, Part, UnsupportedLayer, check_floating, dtype_of_sums

_ROUTES = ("top_k_index", "router_indices", "selected_experts")


class ExpertsView(LayerView):
    """The first layer of E experts as E groups, of which each sees the rows that are routed to it; without bias.

    Inputs are `[N, ..., d + E]`: x, and behind it the mask m. N and T count all rows, routed or not.
    """

    rows_are_samples = True

    def __init__(self, weight: Tensor, *, transposed: bool) -> None:
        self.has_bias = False
        self.weight_shape = tuple(weight.shape)
        self._transposed = transposed
        self.groups, self.d_out, self.d_in = self.weight_shape
        if transposed:
            self.d_out, self.d_in = self.d_in, self.d_out

    def batched(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])  # [N, ..., d + E] -> [N T, d + E]

    def locations(self, x: Tensor) -> int:
        self._check_inputs(x)
        return math.prod(x.shape[1:-1])

    def inputs(self, x: Tensor) -> Tensor:
        rows, mask = self._rows(x)
        a = mask.unsqueeze(2) * rows.unsqueeze(1)  # [N T, E, d]
        return a.reshape(x.shape[0], -1, self.groups, self.d_in).transpose(1, 2)  # -> [N, E, T, d]

    def outputs(self, h: Tensor) -> Tensor:
        """Pre-activations of all experts side by side, `[N, ..., E d_out]`, as `[N, E, T, d_out]`."""
        self._check_outputs(h)
        return h.reshape(h.shape[0], -1, self.groups, self.d_out).transpose(1, 2)

    def sum_output(self, h: Tensor) -> Tensor:
        self._check_outputs(h)
        return h.reshape(-1, self.groups, self.d_out).sum(0, dtype=dtype_of_sums(h))  # [N T, E, d_out] -> [E, d_out]

    def mean_input(self, x: Tensor) -> Tensor:
        rows, mask = self._rows(x.to(dtype_of_sums(x)))
        return mask.mT @ rows / len(rows)  # [E, N T] [N T, d]

    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        self.check_vectors(v)
        rows, mask = self._rows(x.to(torch.promote_types(dtype_of_sums(x), v.dtype)))
        V = v.reshape(self.groups, self.d_in, -1).to(rows.dtype)
        vectors = V.transpose(0, 1).flatten(1)  # [E, d, k] -> [d, E k]
        scores = (rows @ vectors).unflatten(1, (self.groups, -1)) * mask.unsqueeze(2)
        total = rows.mT @ scores.flatten(1) / x.shape[0]  # [d, E k]
        return total.reshape(self.d_in, self.groups, -1).transpose(0, 1).reshape(v.shape)

    def rows_of(self, weight: Tensor) -> Tensor:
        return weight.mT if self._transposed else weight  # [E, d, d_out] -> [E, d_out, d]

    def weight_of(self, rows: Tensor) -> Tensor:
        return rows.mT if self._transposed else rows

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[N T, d]` and m `[N T, E]`."""
        self._check_inputs(x)
        rows, mask = x.reshape(-1, x.shape[-1]).split([self.d_in, self.groups], dim=1)
        return rows, mask

    def _check_inputs(self, x: Tensor) -> None:
        check_floating(x, "input")
        if x.ndim < 2 or x.shape[-1] != self.d_in + self.groups or x.numel() == 0:
            raise ValueError(
                f"the layer's input has shape {tuple(x.shape)}, but [N, ..., {self.d_in} + {self.groups}] (x and which "
                "experts it goes to) with at least one sample and one location is needed"
            )

    def _check_outputs(self, h: Tensor) -> None:
        check_floating(h, "output")
        if h.ndim < 2 or h.shape[-1] != self.groups * self.d_out or h.numel() == 0:
            raise ValueError(
                f"the layer's output has shape {tuple(h.shape)}, but [N, ..., {self.groups} * {self.d_out}] with at "
                "least one sample and one location is needed"
            )


def recognised(kind: type) -> bool:
    """Whether a class is one of transformers' collections of experts."""
    return kind.__module__.startswith("transformers.models.") and kind.__qualname__.endswith("Experts")


def parts(module: Any) -> tuple[Part, ...]:
    """The first layer of a collection of experts, if it is stored as one parameter.

    Raises UnsupportedLayer if it is not.
    """
    weight, transposed = getattr(module, "gate_up_proj", None), getattr(module, "is_transposed", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 3 or not isinstance(transposed, bool):
        raise UnsupportedLayer(
            f"{type(module).__name__} does not hold its experts as one parameter gate_up_proj [E, d_out, d] with its "
            "layout in is_transposed; leave its parameters to the fallback"
        )
    return (
        Part("gate_up_proj", ExpertsView(weight, transposed=transposed), "gate_up_proj", None, routed_input, False),
    )


def routed_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call | None:
    """What a call showed of `gate_up_proj`: x and m side by side, `[N, d + E]`."""
    x = args[0] if args else kwargs.get("hidden_states")
    index = args[1] if len(args) > 1 else next((kwargs[name] for name in _ROUTES if name in kwargs), None)
    if not (isinstance(x, Tensor) and isinstance(index, Tensor) and isinstance(output, Tensor)):
        return None
    if x.dim() != 2 or index.dim() != 2 or len(x) != len(index):
        return None
    experts = module.gate_up_proj.shape[0]
    # An index behind the last expert stands for an expert on another rank, whose row is not for any of these.
    mask = x.new_zeros(len(x), experts + 1).scatter_(1, index.long().clamp(max=experts), 1)
    return Call(torch.cat([x.detach(), mask[:, :-1]], dim=1), output, shows_h=False)

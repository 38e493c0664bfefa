"""K-FAC, kept here because no maintained package for it runs with the pinned torch: Martens & Grosse (2015), with the
convolutional factors of Grosse & Martens (2016).

    A = E[sum_t a a^T],  G = E[mean_t g g^T] with labels drawn from the model itself,
    D = (G + sqrt(lambda)/pi I)^-1 M (A + pi sqrt(lambda) I)^-1,  pi^2 = (tr A / d_in) / (tr G / d_out)

Not in it: the adaptive lambda, the exact quadratic model of the step, and weight decay. The step is shortened where its
squared Fisher norm exceeds `kl_clip`, the rule of Ba, Grosse & Martens (2017) that public implementations share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.training.preserve import restored
from kfqn_core.training.selection import curvature_layers


def _categorical(z: Tensor) -> Tensor:
    p = z.softmax(-1).flatten(0, -2)  # one distribution a row, several rows a sample where there are several labels
    return (p - nn.functional.one_hot(torch.multinomial(p, 1)[:, 0], p.shape[1])).view_as(z)


# Each draws labels for these outputs and returns the gradient of the negative log-likelihood, summed over all labels.
LIKELIHOODS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli": lambda z: z.sigmoid() - torch.bernoulli(z.sigmoid()),
    "categorical": _categorical,
    # The squared error, without a factor 1/2, belongs to a variance of 1/2: its gradient 2 (z - y) has a variance of 2.
    "gaussian": lambda z: math.sqrt(2) * torch.randn_like(z),
}


class KFAC(torch.optim.Optimizer):
    """K-FAC for the layers that `curvature_layers` finds; other parameters move by their momentum.

    Args:
        model: called as `model(x)` in each training step; its loss is a mean over samples.
        lr: step length.
        likelihood: `"bernoulli"` (outputs are logits of pixels), `"categorical"` (scores of classes, along the last
            dimension) or `"gaussian"` (the loss is the squared error, summed over outputs).
        every: factors and their inverses are updated at the first step and then at every `every`-th, from one further
            forward and backward pass over the mini-batch with labels drawn from the model.

    Raises:
        ValueError: for a loss that is not the likelihood of labels.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        likelihood: str,
        *,
        every: int = 10,
        damping: float = 0.03,
        momentum: float = 0.9,
        factor_decay: float = 0.95,
        kl_clip: float = 1e-3,
    ):
        if likelihood not in LIKELIHOODS:
            raise ValueError(
                f"KFAC: likelihood must be one of {sorted(LIKELIHOODS)}, got {likelihood!r}: K-FAC draws labels from "
                "the model, and this loss is not the negative log-likelihood of labels alone"
            )
        trainable = [p for p in model.parameters() if p.requires_grad]
        super().__init__(trainable, {"lr": lr, "momentum": momentum})
        self._model, self._layers = model, list(curvature_layers(model).values())
        covered = {id(p) for layer in self._layers for p in layer.parameters}
        self._rest = [p for p in trainable if id(p) not in covered]
        self._gradient = LIKELIHOODS[likelihood]
        self._every, self._damping, self._decay, self._kl_clip = every, damping, factor_decay, kl_clip
        self._steps = 0
        self._x: Tensor | None = None
        model.register_forward_pre_hook(self._remember)

    def _remember(self, model: nn.Module, args: tuple[Tensor, ...]) -> None:
        if model.training and torch.is_grad_enabled():
            self._x = args[0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        if self._steps % self._every == 0:
            self._update_factors()
        self._steps += 1
        lr, momentum = self.param_groups[0]["lr"], self.param_groups[0]["momentum"]
        moves: list[tuple[nn.Parameter, Tensor]] = []
        squared = torch.zeros(())
        for layer in self._layers:
            state = self.state[layer.weight]
            gradient = layer.view.to_matrix(layer.weight.grad, None if layer.bias is None else layer.bias.grad)
            M = state.setdefault("M", torch.zeros_like(gradient)).lerp_(gradient, 1 - momentum)
            D = state["G_inv"] @ M @ state["A_inv"]
            squared = squared + lr**2 * (D * gradient).sum()
            moves += zip(layer.parameters, layer.view.from_matrix(D), strict=False)  # without a bias, the weight alone
        for p in self._rest:
            moves.append((p, self.state[p].setdefault("M", torch.zeros_like(p)).lerp_(p.grad, 1 - momentum)))
        shorter = (self._kl_clip / squared.clamp_min(1e-30)).sqrt().clamp_max(1.0)
        for p, D in moves:
            p.sub_(lr * shorter * D)
        return loss

    def _update_factors(self) -> None:
        assert self._x is not None
        x, seen = self._x, {}

        def watch(module: nn.Module, args: tuple[Tensor, ...], h: Tensor) -> None:
            seen[module] = (args[0].detach(), h)

        handles = [layer.module.register_forward_hook(watch) for layer in self._layers]
        with restored(self._model), torch.enable_grad():
            z = self._model(x)
            gradients = torch.autograd.grad(
                z, [seen[layer.module][1] for layer in self._layers], self._gradient(z.detach())
            )
        for handle in handles:
            handle.remove()
        fresh = 0.0 if self._steps == 0 else self._decay
        for layer, g in zip(self._layers, gradients, strict=True):
            state: dict[str, Any] = self.state[layer.weight]
            rows = layer.view.outputs(g).transpose(0, 1).flatten(1, 2)  # [groups, N T, d_out]
            inputs = layer.view.batched(seen[layer.module][0])  # a fully connected layer's rows are samples
            moments = {"A": layer.view.second_moment(inputs), "G": rows.mT @ rows / rows.shape[1]}
            for name, moment in moments.items():
                state[name] = moment if name not in state else state[name].lerp_(moment, 1 - fresh)
            state["A_inv"], state["G_inv"] = damped_inverses(state["A"], state["G"], self._damping)


def damped_inverses(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """`(A + pi sqrt(lambda) I)^-1` and `(G + sqrt(lambda)/pi I)^-1` for `[groups, n, n]` factors."""
    traces = [F.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)[:, None, None] for F in (A, G)]
    pi, root = (traces[0] / traces[1]).sqrt(), math.sqrt(damping)
    eyes = [torch.eye(F.shape[-1], dtype=F.dtype) for F in (A, G)]
    A_inv, G_inv = (
        torch.cholesky_inverse(torch.linalg.cholesky(F + shift * eye))
        for F, shift, eye in zip((A, G), (pi * root, root / pi), eyes, strict=True)
    )
    return A_inv, G_inv

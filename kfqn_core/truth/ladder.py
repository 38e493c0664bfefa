"""From the exact block of a layer downwards: what the structure `h = W a` makes of the Hessian, and what is given up
on the way to one Kronecker product.

The formulas here use only the input vectors of a layer (`layers`) and the second derivatives in its output (`exact`);
that they agree with `exact.layer_hessian`, which knows nothing of either, is the content of chapters 3 and 4. Like
`exact`, these are references for small layers: they form what no method could store, and may read values on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfqn_core.layers import view
from kfqn_core.maths.algebra import nearest_kronecker
from kfqn_core.truth.exact import layer_call, preactivation_hessians
from kfqn_core.truth.functional import LossFunction

__all__ = ["Rung", "backward_step", "block_from_samples", "rungs", "structured_hessian"]


class Rung(NamedTuple):
    """An approximation of a layer's block, `[n, n]`, and its relative error in the Frobenius norm."""

    matrix: Tensor
    error: float


def structured_hessian(model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor, layer: nn.Module | str) -> Tensor:
    """Mean over samples of `sum_{t,t'} (a_t a_t'^T) (x) G_tt'`: the layer's Hessian block, `[n, n]`.

    Same layout as `exact.layer_hessian`, blocks between groups included. Derived in chapter 3.
    Raises as `exact.preactivation_hessians` does, and ValueError if another module shares the layer's parameters: its
    input then depends on them too, which the formula excludes.
    """
    return block_from_samples(*_samples(model, loss_fn, x, y, layer, preactivation_hessians))


def block_from_samples(a: Tensor, G: Tensor) -> Tensor:
    """Mean over samples of `sum_{t,t'} (a_t a_t'^T) (x) G_tt'`, `[n, n]` with `n = groups * d_in * d_out`.

    `a` is `[N, groups, T, d_in]` (`LayerView.patches`), `G` `[N, groups * d_out, T, groups * d_out, T]`
    (`exact.preactivation_hessians`). Derived in chapters 3 and 4. Raises ValueError if the shapes do not fit.
    """
    samples, groups, T, d_in = a.shape if a.ndim == 4 else (0, 0, 0, 0)
    if not samples or G.shape[:1] + G.shape[2:3] != (samples, T) or G.shape[1:3] != G.shape[3:] or G.shape[1] % groups:
        raise ValueError(
            f"a {tuple(a.shape)} and G {tuple(G.shape)} do not fit; needed: [N, groups, T, d_in] and "
            "[N, groups * d_out, T, groups * d_out, T], as LayerView.patches and exact.preactivation_hessians give them"
        )
    d_out = G.shape[1] // groups
    G = G.reshape(samples, groups, d_out, T, groups, d_out, T)
    # Indices: sample n; on the left group g, location t, input i, output o; on the right their capitals.
    right = torch.einsum("ngotGOT,nGTI->ngotGIO", G, a)
    H = torch.einsum("ngti,ngotGIO->gioGIO", a, right) / samples
    return H.reshape(groups * d_in * d_out, groups * d_in * d_out)


def rungs(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    layer: nn.Module | str,
    *,
    curvature: Callable[..., Tensor] = preactivation_hessians,
) -> dict[str, Rung]:
    """The approximations of a layer's block by name, each `[n, n]` in the layout of `exact.layer_hessian`.

    From the exact block down, each rung makes one assumption more than the one before it:

    * `exact`: mean over samples of `sum_{t,t'} (a_t a_t'^T) (x) G_tt'`, the block itself;
    * `separate groups`: no curvature between groups;
    * `uncorrelated locations`: only `t = t'`, mean of `sum_t (a_t a_t^T) (x) G_tt`;
    * `independence` of input and curvature: `sum_t E[a_t a_t^T] (x) E[G_tt]`;
    * `homogeneity` of the curvature over locations: one Kronecker product `A (x) G` per group, `A = E[sum_t a_t a_t^T]`
      a sum and `G = E[mean_t G_tt]` a mean over locations.

    Another way down, from `separate groups`, for layers whose locations are averaged:

    * `common curvature`: `G_tt'` the same for all pairs of locations, mean of `(abar abar^T) (x) sum_{t,t'} G_tt'`
      with abar the sample's mean patch;
    * `mean patch`: one product again, `A' (x) G'` with `A' = T E[abar abar^T]`, `G' = E[sum_{t,t'} G_tt'] / T`.

    And the yardstick:

    * `best product`: the Kronecker product per group that is nearest to the block, with the least error that any
      single product can have.

    `curvature=exact.preactivation_gauss_newton` gives the rungs of the Gauss-Newton block. Errors are relative to
    `exact`, whose own is zero. Derived in chapter 5. Raises as `structured_hessian` does.
    """
    a, G = _samples(model, loss_fn, x, y, layer, curvature)
    exact = block_from_samples(a, G)
    samples, groups, T, d_in = a.shape
    d_out = G.shape[1] // groups

    # Within each group: the exact block [groups, n, n], and G as [N, groups, d_out, d_out, T, T].
    n = d_in * d_out
    within = exact.reshape(groups, n, groups, n).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    G = G.reshape(samples, groups, d_out, T, groups, d_out, T).diagonal(dim1=1, dim2=4).permute(0, 5, 1, 3, 2, 4)
    G_tt = G.diagonal(dim1=-2, dim2=-1)
    G_sum = G.sum((-2, -1))
    a_mean = a.mean(2)
    aa_t = torch.einsum("ngti,ngtj->gtij", a, a) / samples
    aa_mean = torch.einsum("ngi,ngj->gij", a_mean, a_mean) / samples

    # Input indices i, j stand outside, output indices o, p inside: the order of vec.
    blocks = {
        "separate groups": within,
        "uncorrelated locations": torch.einsum("ngti,ngtj,ngopt->giojp", a, a, G_tt) / samples,
        "independence": torch.einsum("gtij,gopt->giojp", aa_t, G_tt.mean(0)),
        "homogeneity": torch.einsum("gij,gop->giojp", aa_t.sum(1), G_tt.mean((0, -1))),
        "common curvature": torch.einsum("ngi,ngj,ngop->giojp", a_mean, a_mean, G_sum) / samples,
        "mean patch": torch.einsum("gij,gop->giojp", T * aa_mean, G_sum.mean(0) / T),
        "best product": torch.einsum("gij,gop->giojp", *nearest_kronecker(within, d_in, d_out)),
    }
    matrices = {name: torch.block_diag(*block.reshape(groups, n, n)) for name, block in blocks.items()}
    return {name: Rung(matrix, _error(matrix, exact)) for name, matrix in {"exact": exact, **matrices}.items()}


def backward_step(W: Tensor, g: Tensor, G: Tensor, slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the backward recursion: gradient and Hessian in `h` from those in `h_next = W phi(h) + b`.

    `W` is `[d_next, d]` without bias column, `g` `[..., d_next]`, `G` `[..., d_next, d_next]`; `slope = phi'(h)` and
    `curvature = phi''(h)`, both `[..., d]`. Returns `([..., d], [..., d, d])`:
    `g = slope * W^T g_next` and `G = diag(slope) W^T G_next W diag(slope) + diag(curvature * W^T g_next)`.
    With `curvature = 0` the same step propagates the Gauss-Newton matrix. Derived in chapter 3.

    Raises ValueError if the shapes do not fit.
    """
    d_next, d = W.shape if W.ndim == 2 else (None, None)
    fits = d is not None and g.shape[-1:] == (d_next,) and G.shape[-2:] == (d_next, d_next)
    if not fits or slope.shape[-1:] != (d,) or curvature.shape[-1:] != (d,):
        raise ValueError(
            f"W {tuple(W.shape)}, g {tuple(g.shape)}, G {tuple(G.shape)}, slope {tuple(slope.shape)}, curvature "
            f"{tuple(curvature.shape)} do not fit; needed: [d_next, d], [..., d_next], [..., d_next, d_next], "
            "[..., d], [..., d]; W comes without its bias column"
        )
    pulled = g @ W
    J = W * slope[..., None, :]
    return slope * pulled, J.mT @ G @ J + torch.diag_embed(curvature * pulled)


def _samples(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    layer: nn.Module | str,
    curvature: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    call = layer_call(model, x, layer)
    _check_owner(model, call.module)
    return view(call.module).patches(call.input), curvature(model, loss_fn, x, y, layer)


def _error(actual: Tensor, expected: Tensor) -> float:
    difference, size = (actual - expected).norm().item(), expected.norm().item()
    return difference / size if size else difference and float("inf")


def _check_owner(model: nn.Module, layer: nn.Module) -> None:
    own = list(layer.parameters(recurse=False))
    for name, module in model.named_modules():
        if module is not layer and any(p is q for p in module.parameters(recurse=False) for q in own):
            raise ValueError(
                f"this {type(layer).__name__} shares a parameter with '{name}', so its input may depend on its own "
                "weights; give each layer its own parameters, or use exact.layer_hessian"
            )

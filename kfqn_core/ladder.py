"""From the exact block of a layer downwards: what the structure `h = W a` makes of the Hessian.

The formulas here use only the input vectors of a layer (`layers`) and the second derivatives in its output (`exact`);
that they agree with `exact.layer_hessian`, which knows nothing of either, is the content of chapter 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfqn_core.exact import LossFunction, layer_call, preactivation_hessians
from kfqn_core.layers import view

__all__ = ["backward_step", "structured_hessian"]


def structured_hessian(model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor, layer: nn.Module | str) -> Tensor:
    """Mean over samples of `sum_{t,t'} (a_t a_t'^T) (x) G_tt'`: the layer's Hessian block, `[n, n]`.

    Same layout as `exact.layer_hessian`, blocks between groups included. Derived in chapter 3.
    Raises as `exact.preactivation_hessians` does, and ValueError if another module shares the layer's parameters: its
    input then depends on them too, which the formula excludes.
    """
    call = layer_call(model, x, layer)
    _check_owner(model, call.module)
    layer_view = view(call.module)
    a = layer_view.patches(call.input)  # [N, groups, T, d_in]
    G = preactivation_hessians(model, loss_fn, x, y, layer)
    samples, groups, T, d_in = a.shape
    d_out = layer_view.d_out
    G = G.reshape(samples, groups, d_out, T, groups, d_out, T)
    # Indices: sample n; on the left group g, location t, input i, output o; on the right their capitals.
    right = torch.einsum("ngotGOT,nGTI->ngotGIO", G, a)
    H = torch.einsum("ngti,ngotGIO->gioGIO", a, right) / samples
    return H.reshape(groups * d_in * d_out, groups * d_in * d_out)


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


def _check_owner(model: nn.Module, layer: nn.Module) -> None:
    own = list(layer.parameters(recurse=False))
    for name, module in model.named_modules():
        if module is not layer and any(p is q for p in module.parameters(recurse=False) for q in own):
            raise ValueError(
                f"this {type(layer).__name__} shares a parameter with '{name}', so its input may depend on its own "
                "weights; give each layer its own parameters, or use exact.layer_hessian"
            )

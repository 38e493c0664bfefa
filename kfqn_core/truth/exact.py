"""The truth: exact second derivatives of a network by automatic differentiation, on which every claim is checked.

Nothing here knows about Kronecker products. Each matrix is built column by column from products with unit vectors,
differentiating `loss_fn(model(x), y)` twice; the cost grows with the square of the number of parameters, so these are
references for small networks (use float64). They may read values on the host and never change the model: buffers are
copied, hooks are removed even when something fails, and under `no_grad`, which `torch.func` inside does not heed, no
graph of the model outlives the call.

Layout. A layer's parameters are ordered group by group, in each group by `vec` (column stacking) of its matrix
`[W | b]`, `[d_out, d_in]` with the bias as last column (`layers.LayerView`). A layer is given as the module or by its
name in the model; one of several matrices in a module (`layers.parts`) by both names, `"attention.in_proj"`.
`max_bytes` bounds the matrix that is returned; larger ones raise ValueError before any work.

Definitions: chapter 3. Gauss-Newton: Schraudolph (2002). Fisher: Amari (1998).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad, jvp

from kfqn_core.layers import view
from kfqn_core.truth.functional import (
    CHUNK,
    LayerCall,
    LayerParameters,
    LossFunction,
    check_batch,
    check_distribution,
    check_mean_of_samples,
    check_model,
    check_predictions,
    check_samples,
    check_size,
    forward,
    gauss_newton_product,
    hessian_product,
    hooked,
    layer_calls,
    matrix_of,
    scalar,
)

__all__ = [
    "categorical",
    "cross_hessian",
    "layer_call",
    "layer_fisher",
    "layer_gauss_newton",
    "layer_hessian",
    "network_hessian",
    "preactivation_gauss_newton",
    "preactivation_hessians",
    "unit_gaussian",
]

MAX_BYTES = 2**30  # a Hessian of 11,585 parameters in float64


# ---------------------------------------------------------------------------------------------------------------------
# Hessians in the parameters


@torch.no_grad()
def network_hessian(
    model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor, *, max_bytes: int = MAX_BYTES
) -> Tensor:
    """Hessian of `loss_fn(model(x), y)` in all parameters, `[n, n]`.

    The parameters stand in the order of `model.parameters()`, each flattened by `reshape(-1)` (row by row, as PyTorch
    stores it); `layer_hessian` and `cross_hessian` give its blocks in the layout of this book.

    Raises ValueError if the loss is no scalar, x and y disagree or are empty, the model has no parameters, or the
    matrix exceeds `max_bytes`; TypeError if something is no tensor, or the model no module.
    """
    check_model(model)
    check_batch(x, y)
    named = dict(model.named_parameters())
    if not named:
        raise ValueError(
            f"{type(model).__name__} has no parameters, so its loss has no Hessian in them; pass a model with a layer"
        )
    names, parameters = list(named), list(named.values())
    sizes = [p.numel() for p in parameters]
    check_size("the network's Hessian", sum(sizes), sum(sizes), parameters[0], max_bytes)

    def loss(theta: Tensor) -> Tensor:
        pieces = [v.reshape(p.shape) for v, p in zip(theta.split(sizes), parameters, strict=True)]
        return scalar(loss_fn(forward(model, dict(zip(names, pieces, strict=True)), x), y))

    theta = torch.cat([p.detach().reshape(-1) for p in parameters])
    return matrix_of(lambda v: jvp(grad(loss), (theta,), (v,))[1], theta)


@torch.no_grad()
def layer_hessian(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    layer: nn.Module | str,
    *,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """Hessian of `loss_fn(model(x), y)` in one layer's `[W | b]`: the layer's diagonal block, `[n, n]`.

    Exact whatever the loss and however often the layer is called. Raises ValueError if the layer is not part of the
    model, is never called, x and y disagree or are empty, or the matrix exceeds `max_bytes`; TypeError if something is
    no tensor, or the model no module; UnsupportedLayer if the layer is no `h = W a`.
    """
    check_batch(x, y)
    own = LayerParameters(model, layer)
    layer_calls(model, own, x)
    check_size(f"the Hessian of layer '{own.name}'", own.theta.numel(), own.theta.numel(), own.theta, max_bytes)

    def loss(theta: Tensor) -> Tensor:
        return scalar(loss_fn(forward(model, own.parameters(theta), x), y))

    return matrix_of(lambda v: jvp(grad(loss), (own.theta,), (v,))[1], own.theta)


@torch.no_grad()
def cross_hessian(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    layer: nn.Module | str,
    other: nn.Module | str,
    *,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """Mixed second derivatives of two layers, `[n_layer, n_other]`: rows of `layer`, columns of `other`.

    Raises ValueError as `layer_hessian` does, and if both are the same layer.
    """
    check_batch(x, y)
    rows, columns = LayerParameters(model, layer), LayerParameters(model, other)
    if rows.module is columns.module:
        raise ValueError(f"both layers are '{rows.name}'; use layer_hessian for the diagonal block")
    for own in (rows, columns):
        layer_calls(model, own, x)
    what = f"the block of layers '{rows.name}' and '{columns.name}'"
    check_size(what, rows.theta.numel(), columns.theta.numel(), rows.theta, max_bytes)

    def gradient(theta: Tensor) -> Tensor:
        def loss(own: Tensor) -> Tensor:
            return scalar(loss_fn(forward(model, rows.parameters(own) | columns.parameters(theta), x), y))

        return grad(loss)(rows.theta)

    return matrix_of(lambda v: jvp(gradient, (columns.theta,), (v,))[1], columns.theta)


# ---------------------------------------------------------------------------------------------------------------------
# Curvature in the pre-activations


@torch.no_grad()
def layer_call(model: nn.Module, x: Tensor, layer: nn.Module | str) -> LayerCall:
    """The layer, its input and its output in `model(x)`, detached.

    Raises ValueError if x is empty, or the layer is not part of the model, is never called, is called more than once,
    or does not show its pre-activation; TypeError if x is no tensor; UnsupportedLayer if it is no `h = W a`.
    """
    check_samples(x)
    own = LayerParameters(model, layer)
    calls = layer_calls(model, own, x)
    if len(calls) > 1:
        raise ValueError(
            f"layer '{own.name}' is called {len(calls)} times in one forward pass, so it has no single pre-activation; "
            "call it once on the joined inputs (a sequence [N, T, d]), or use one layer per call"
        )
    if calls[0] is None:
        raise ValueError(
            f"the call of layer '{own.name}' does not show its input and its pre-activation; layer_hessian, "
            "cross_hessian, layer_gauss_newton and layer_fisher need neither"
        )
    return calls[0]


@torch.no_grad()
def preactivation_hessians(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    layer: nn.Module | str,
    *,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """G of every sample: Hessians of `l_i = loss_fn(model(x_i), y_i)` in the layer's output h.

    Returns `[N, d_out_total, T, d_out_total, T]` with `d_out_total = groups * d_out`; not divided by N. The loss must
    be the mean of per-sample losses and samples must not see each other; the values are compared and ValueError is
    raised otherwise (sum-reduced loss, BatchNorm or Dropout in training mode). Raises ValueError also as `layer_call`
    does and if the result exceeds `max_bytes`; UnsupportedLayer if the layer is no `h = W a`.
    """
    return _preactivation_curvature(model, loss_fn, x, y, layer, max_bytes, hessian_product)


@torch.no_grad()
def preactivation_gauss_newton(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    layer: nn.Module | str,
    *,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """`J_h^T H_z J_h` of every sample: J_h is the Jacobian of its output z in the layer's output h.

    What `preactivation_hessians` becomes when the network behind the layer is taken to be linear; same layout, scale
    and errors.
    """
    return _preactivation_curvature(model, loss_fn, x, y, layer, max_bytes, gauss_newton_product)


# ---------------------------------------------------------------------------------------------------------------------
# Gauss-Newton and Fisher, from their definitions


@torch.no_grad()
def layer_gauss_newton(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    layer: nn.Module | str,
    *,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """`J^T H_z J` of one layer, `[n, n]`: J is the Jacobian of the output z in `[W | b]`, H_z the loss's Hessian in z.

    Raises as `layer_hessian` does.
    """
    check_batch(x, y)
    own = LayerParameters(model, layer)
    layer_calls(model, own, x)
    check_size(f"the Gauss-Newton matrix of '{own.name}'", own.theta.numel(), own.theta.numel(), own.theta, max_bytes)

    def outputs(theta: Tensor) -> Tensor:
        return forward(model, own.parameters(theta), x)

    def loss(z: Tensor) -> Tensor:
        return scalar(loss_fn(z, y))

    return matrix_of(lambda v: gauss_newton_product(outputs, loss, own.theta, v), own.theta)


@torch.no_grad()
def layer_fisher(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    distribution: Callable[[Tensor], tuple[Tensor, Tensor]],
    layer: nn.Module | str,
    *,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """Fisher matrix of one layer, `[n, n]`: mean over samples of `E_y[g g^T]`, g the gradient of a sample's loss.

    The expectation runs over the model's own predictions: `distribution(z)` takes the outputs `[N, ...]` and returns
    targets `[K, N, ...]` with probabilities `[K, N]` (`categorical`, `unit_gaussian`). It is the Fisher matrix if
    `loss_fn` is minus the logarithm of that distribution, up to a constant. One observed target per sample with
    probability 1 gives what is called the empirical Fisher, another matrix.

    Raises as `layer_hessian` does, ValueError if the loss is not the mean of per-sample losses, and
    TypeError/ValueError if the distribution returns something else.
    """
    check_samples(x)
    own = LayerParameters(model, layer)
    layer_calls(model, own, x)
    check_size(f"the Fisher matrix of '{own.name}'", own.theta.numel(), own.theta.numel(), own.theta, max_bytes)
    predicted = distribution(forward(model, {}, x))
    check_distribution(predicted, len(x))
    targets, probabilities = predicted
    check_mean_of_samples(model, loss_fn, x, targets[0])

    def sample_loss(theta: Tensor, x_i: Tensor, y_i: Tensor) -> Tensor:
        return scalar(loss_fn(forward(model, own.parameters(theta), x_i[None]), y_i[None]))

    gradients = torch.vmap(grad(sample_loss), in_dims=(None, 0, 0), chunk_size=CHUNK)
    fisher = own.theta.new_zeros(own.theta.numel(), own.theta.numel())
    for target, probability in zip(targets, probabilities, strict=True):
        g = gradients(own.theta, x, target)
        fisher += g.mT @ (probability[:, None] * g) / len(x)
    return fisher


def categorical(z: Tensor) -> tuple[Tensor, Tensor]:
    """Every class with its softmax probability: targets `[K, N]`, probabilities `[K, N]` from logits `[N, K]`.

    The distribution of `nn.CrossEntropyLoss()`. Raises TypeError/ValueError unless z is `[N, K]`, real and not empty.
    """
    check_predictions(z, "logits")
    samples, classes = z.shape
    return torch.arange(classes, device=z.device)[:, None].expand(classes, samples), z.softmax(dim=1).mT


def unit_gaussian(z: Tensor) -> tuple[Tensor, Tensor]:
    """`y ~ N(z, I)` by 2K points with its mean and covariance: targets `[2K, N, K]`, probabilities `[2K, N]`.

    The distribution of the loss `||z - y||^2 / 2`, summed over the K outputs. Its gradient is linear in y, so that
    `E[g g^T]` needs only these two moments and the points give it exactly. Raises TypeError/ValueError unless z is
    `[N, K]`, real and not empty.
    """
    check_predictions(z, "outputs")
    samples, K = z.shape
    points = K**0.5 * torch.eye(K, dtype=z.dtype, device=z.device)
    targets = z + torch.cat([points, -points])[:, None, :]
    return targets, z.new_full((2 * K, samples), 1 / (2 * K))


def _preactivation_curvature(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    layer: nn.Module | str,
    max_bytes: int,
    product: Callable[..., Tensor],
) -> Tensor:
    """The matrix of every sample in `h` of which `product` gives products with vectors, as `preactivation_hessians`."""
    check_batch(x, y)
    module, _, h = layer_call(model, x, layer)
    layer_view = view(module)
    samples, size = h.shape[0], h[0].numel()
    check_size("the pre-activation Hessians of all samples", samples * size, size, h, max_bytes)
    check_mean_of_samples(model, loss_fn, x, y)

    def outputs(shift: Tensor) -> Tensor:
        with hooked(module, lambda _module, _args, _kwargs, output: output + shift.reshape(h.shape)):
            return forward(model, {}, x)

    def loss(z: Tensor) -> Tensor:
        return samples * scalar(loss_fn(z, y))

    # Samples do not see each other, so one unit vector, shifted into all of them at once, reads one column of each.
    zero = torch.zeros(samples, size, dtype=h.dtype, device=h.device)
    columns = torch.vmap(lambda v: product(outputs, loss, zero, v.expand(samples, size)), chunk_size=CHUNK)(
        torch.eye(size, dtype=h.dtype, device=h.device)
    )
    G = columns.permute(1, 2, 0)  # [size, N, size] -> [N, size, size], the last axis that of the unit vectors
    # Where each (output, location) of the view stands in h flattened: the layer's memory layout is the view's business.
    place = torch.arange(size, dtype=torch.float64, device=h.device).reshape(1, *h.shape[1:])
    place = layer_view.outputs(place).permute(0, 1, 3, 2).reshape(-1, layer_view.outputs(h).shape[2]).long()
    rows, locations = place.shape
    flat = place.reshape(-1)
    return G[:, flat][:, :, flat].reshape(samples, rows, locations, rows, locations)

"""A model as a function of what it is differentiated by: the tools behind `exact`.

Nothing here changes the model: buffers are copies, hooks are removed even when something fails. Values may be read on
the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfqn_core.layers import LayerView, Part, UnsupportedLayer, parts
from kfqn_core.maths.algebra import unvec, vec

LossFunction = Callable[[Tensor, Tensor], Tensor]
CHUNK = 64  # unit vectors differentiated at once: bounds the memory beside the result


class LayerCall(NamedTuple):
    """A layer of a model, and what it received and returned in one forward pass."""

    module: nn.Module
    input: Tensor
    output: Tensor


class LayerParameters:
    """One layer's `[W | b]` as a vector, and back to the names under which the model holds them.

    Attributes:
        name, module, part, view: of the layer.
        theta: `[n]` with `n = groups * d_in * d_out`, the columns of every group's matrix one after the other.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str) -> None:
        self.name, self.module, self.part = find_part(model, layer)
        self.view: LayerView = self.part.view
        module_name = next(name for name, module in model.named_modules() if module is self.module)
        self._prefix = f"{module_name}." if module_name else ""
        weight = self.module.get_parameter(self.part.weight)
        bias = None if self.part.bias is None else self.module.get_parameter(self.part.bias)
        self.theta = vec(self.view.to_matrix(weight, bias).detach()).reshape(-1)

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """`theta` `[n]` as weight and bias, by their names in the model."""
        v = self.view
        weight, bias = v.from_matrix(unvec(theta.reshape(v.groups, -1), v.d_out))
        named = {f"{self._prefix}{self.part.weight}": weight}
        return named if bias is None else named | {f"{self._prefix}{self.part.bias}": bias}


def find_part(model: nn.Module, layer: nn.Module | str) -> tuple[str, nn.Module, Part]:
    """Name, module and matrix of a layer given as its module, or by name.

    A module that holds several matrices has a name for each: its own, a dot, and the part's (`"attention.in_proj"`).
    Raises ValueError, with the names there are, if the model has no such layer or the module holds several;
    UnsupportedLayer if it is no `h = W a`.
    """
    check_model(model)
    known: dict[str, tuple[str, nn.Module, Part]] = {}
    for module_name, module in model.named_modules():
        try:
            matrices = parts(module)
        except UnsupportedLayer:
            continue
        for part in matrices:
            name = ".".join(filter(None, (module_name, part.name)))
            known.setdefault(name, (name, module, part))
    if isinstance(layer, str) and layer in known:
        return known[layer]
    for module_name, module in model.named_modules():
        if module is layer or (isinstance(layer, str) and module_name == layer):
            matrices = parts(module)
            if len(matrices) == 1:
                return ".".join(filter(None, (module_name, matrices[0].name))), module, matrices[0]
            names = ", ".join(repr(name) for name, (_, owner, _) in known.items() if owner is module)
            raise ValueError(f"'{module_name}' ({type(module).__name__}) holds several matrices; name one of {names}")
    wanted = repr(layer) if isinstance(layer, str) else f"this {type(layer).__name__}"
    names = ", ".join(repr(name) for name in known)
    raise ValueError(f"{wanted} is not a layer of the model; those it can be are {names or 'none'}")


def forward(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """`model(x)` with some parameters replaced; buffers are copies, so that running statistics do not move.

    Attention is computed as its formula says: its fused kernels have no second derivatives.
    """
    new = {id(buffer): buffer.clone() for buffer in model.buffers()}
    new |= {id(model.get_parameter(name)): tensor for name, tensor in parameters.items()}
    # Every place that holds one of them, under one name: PyTorch itself would replace the tensors of a module with two
    # names twice, and put only the first replacement back.
    replaced = {
        f"{prefix}.{name}".lstrip("."): _with_padding(module, tensor, new[id(tensor)])
        for prefix, module in model.named_modules()
        for name, tensor in (module._parameters | module._buffers).items()
        if id(tensor) in new
    }
    with sdpa_kernel(SDPBackend.MATH):
        output = functional_call(model, replaced, (x,), tie_weights=False)
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return one tensor, not {type(output).__name__}; wrap it in a module that does")
    return output


def _with_padding(module: nn.Module, tensor: Tensor, replacement: Tensor) -> Tensor:
    """The replacement, in which the padding row of an embedding is the constant that its zero gradient says it is."""
    if not isinstance(module, nn.Embedding) or module.padding_idx is None:
        return replacement
    padding = torch.arange(len(tensor), device=tensor.device) == module.padding_idx
    return torch.where(padding[:, None], tensor.detach(), replacement)


@contextmanager
def hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    """A forward hook `(module, args, kwargs, output)` for the length of a block, gone afterwards even on an error."""
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def layer_calls(model: nn.Module, own: LayerParameters, x: Tensor) -> list[LayerCall | None]:
    """Every call of a layer in `model(x)`, in order; None for one that does not show `h`. ValueError if there is none.

    A call shows `h` if it is what the module returns, so that a hook can shift it.
    """
    calls: list[LayerCall | None] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = own.part.call(module, args, kwargs, output)
        if call is not None and call.shows_h and call.h is output and isinstance(call.x, Tensor):
            calls.append(LayerCall(module, call.x.detach(), call.h.detach()))
        else:
            calls.append(None)

    with hooked(own.module, record):
        forward(model, {}, x)
    if not calls:
        raise ValueError(
            f"layer '{own.name}' is never called in model(x), so the loss does not depend on it; name another"
        )
    return calls


def hessian_product(
    outputs: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], point: Tensor, v: Tensor
) -> Tensor:
    """`H v` `[n]` at `point` `[n]`, where H is the Hessian of `loss(outputs(.))` (Pearlmutter 1994)."""

    def composed(at: Tensor) -> Tensor:
        return loss(outputs(at))

    return jvp(grad(composed), (point,), (v,))[1]


def gauss_newton_product(
    outputs: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], point: Tensor, v: Tensor
) -> Tensor:
    """`J^T H_z J v` `[n]` at `point` `[n]`: J the Jacobian of `outputs`, H_z the Hessian of `loss` in the output.

    Source: Schraudolph (2002).
    """
    z, dz = jvp(outputs, (point,), (v,))[:2]
    Hdz = jvp(grad(loss), (z,), (dz,))[1]
    return vjp(outputs, point)[1](Hdz)[0]


def matrix_of(column: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The matrix whose j-th column is `column(e_j)`, `[m, n]`, for a vector `like` `[n]`."""
    identity = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
    return torch.vmap(column, out_dims=1, chunk_size=CHUNK)(identity)


def scalar(loss: Tensor) -> Tensor:
    """The loss itself, `[]`; TypeError if it is no tensor, ValueError if it is not a scalar."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned a {type(loss).__name__}, but a scalar tensor is needed; leave out .item()")
    if loss.ndim:
        raise ValueError(f"loss_fn returned shape {tuple(loss.shape)}, but a scalar is needed; reduce it by a mean")
    return loss


def check_model(model: nn.Module) -> None:
    """TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but an nn.Module is needed; wrap the function in one")


def check_samples(x: Tensor) -> None:
    """TypeError unless x is a tensor, ValueError unless it is `[N, ...]` with at least one sample."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, but a tensor [N, ...] is needed; convert it, torch.as_tensor(x)")
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but [N, ...] with at least one sample is needed; add a batch dimension, or "
            "pass a mini-batch that is not empty"
        )


def check_batch(x: Tensor, y: Tensor) -> None:
    """TypeError unless x and y are tensors, ValueError unless they have the same, positive number of samples."""
    check_samples(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"y is a {type(y).__name__}, but a tensor [N, ...] is needed; convert it, torch.as_tensor(y)")
    if y.ndim == 0 or len(x) != len(y):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y has shape {tuple(y.shape)}; both need the same, positive number of "
            "samples as their first dimension"
        )


def check_size(what: str, rows: int, columns: int, like: Tensor, max_bytes: int) -> None:
    """ValueError, with the count, if a matrix of these sizes would exceed `max_bytes`."""
    needed = rows * columns * like.dtype.itemsize
    if needed > max_bytes:
        raise ValueError(
            f"{what} has {rows} x {columns} entries, {needed:,} bytes, and max_bytes is {max_bytes:,}; "
            "use a smaller network, smaller images or fewer samples, or raise max_bytes"
        )


def check_distribution(predicted: Any, samples: int) -> None:
    """TypeError unless it is two tensors, ValueError unless they are `[K, N, ...]` and `[K, N]` for `samples` N."""
    if not isinstance(predicted, tuple | list) or [isinstance(part, Tensor) for part in predicted] != [True, True]:
        raise TypeError(
            f"distribution returned a {type(predicted).__name__}, but a pair of tensors, targets and probabilities, is "
            "needed; see categorical and unit_gaussian"
        )
    targets, probabilities = predicted
    K = len(targets) if targets.ndim >= 2 else 0
    if K == 0 or targets.shape[1] != samples or probabilities.shape != (K, samples):
        raise ValueError(
            f"distribution returned targets {tuple(targets.shape)} and probabilities {tuple(probabilities.shape)}, but "
            f"[K, {samples}, ...] and [K, {samples}] with at least one target a sample are needed; K goes first"
        )


def check_predictions(z: Tensor, what: str) -> None:
    """TypeError unless `z` is a real floating-point tensor, ValueError unless it is `[N, K]` and not empty."""
    if not isinstance(z, Tensor) or not z.is_floating_point():
        found = z.dtype if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"{what} must be a real floating-point tensor, not {found}; pass model(x)")
    if z.ndim != 2 or z.numel() == 0:
        raise ValueError(
            f"{what} have shape {tuple(z.shape)}, but [N, K] is needed with at least one sample and one output; "
            "flatten what is behind the samples, or write a distribution of your own"
        )


def check_mean_of_samples(model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor) -> None:
    """ValueError unless the loss of the batch is the mean of the losses of its samples, each evaluated alone."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"'{name}' ({type(module).__name__}) is in training mode: its output for one sample depends on the "
                "others, so there are no per-sample losses; call model.eval()"
            )
    batch = scalar(loss_fn(forward(model, {}, x), y))
    losses = torch.stack([scalar(loss_fn(forward(model, {}, x[i : i + 1]), y[i : i + 1])) for i in range(len(x))])
    # Different summation orders agree to a few roundings; the square root of one is far from both those and a mistake.
    tolerance = torch.finfo(losses.dtype).eps ** 0.5 * float(losses.abs().mean())
    if not abs(float(batch - losses.mean())) <= tolerance:
        raise ValueError(
            f"loss_fn(model(x), y) is {float(batch):.6g} but the mean of the {len(x)} per-sample losses is "
            f"{float(losses.mean()):.6g}; the loss must be their mean: use reduction='mean' (not 'sum') over samples, "
            "and model.eval() if a layer is random or mixes samples"
        )

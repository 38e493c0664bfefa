"""`nn.MultiheadAttention`: two matrices in one module, neither of which is a layer by itself.

With L queries, and S keys and values, all of E entries, the module computes per sample

    q = W_q x_q + b_q,   k = W_k x_k + b_k,   v = W_v x_v + b_v,   o = attention(q, k, v),   y = W_o o + b_o.

`in_proj_weight` holds W_q, W_k and W_v one below the other: a grouped layer with three groups, in which each group has
an input of its own. In self-attention the three are one tensor, in cross-attention they are not, and the formulas are
the same. `out_proj` is an ordinary fully connected layer, whose input o never leaves the module.

What a hook on the module sees is x_q, x_k, x_v and y. So q, k and v are not shown; y is the pre-activation of W_o, and
a tensor through which every gradient passes on its way to all four matrices. And o is what autograd keeps for the
weight gradient of W_o: `saved_input` finds it there. Where no gradients are computed nobody keeps o, and PyTorch may
take a faster way that never forms it: `graph_of_its_own` has it kept all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils import checkpoint

from kfqn_core.layers.linear import LinearView, as_rows, check_rows
from kfqn_core.layers.view import Call, LayerView, Part, UnsupportedLayer, check_floating, dtype_of_sums

# What activation checkpointing leaves in the place of a tensor; nothing, should a PyTorch have another way.
_CHECKPOINTED: Any = getattr(checkpoint, "_Holder", ())
FARTHEST = 8  # nodes of the graph between the module's output and its last product: two or three, in this PyTorch


class InProjectionView(LayerView):
    """`in_proj_weight` and `in_proj_bias`: queries, keys and values as three groups.

    Inputs are `[N, ..., 3, E]`, the dimensions between being the locations. Where the sequences of queries and of keys
    differ in length, the shorter one ends in locations that see nothing: there `a` is zero with the 1 of the bias,
    which is why such an input brings its own, `[N, ..., 3, E + 1]`, 1 for what is there and 0 for what is not. Means
    run over the locations of the longer one in all three groups, so that sums over locations are what they are.
    """

    rows_are_samples = True

    def __init__(self, weight: Tensor, *, has_bias: bool) -> None:
        self.groups = 3
        self.has_bias = has_bias
        self.weight_shape = tuple(weight.shape)
        self.features = self.d_out = weight.shape[1]
        self.d_in = self.features + has_bias

    def batched(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and x.stride(0) < x.stride(1):
            x = x.transpose(0, 1)  # rows are samples in any order: that of memory needs no copy
        if x.stride(-2) == 0:  # one tensor for all three, and it stays one
            rows = x[..., 0, :].reshape(-1, x.shape[-1])
            return rows.unsqueeze(1).expand(-1, 3, -1)  # [N, ..., 3, E] -> [N T, 3, E]
        return x.reshape(-1, 3, x.shape[-1])

    def locations(self, x: Tensor) -> int:
        self._check_inputs(x)
        return math.prod(x.shape[1:-2])

    def patches(self, x: Tensor) -> Tensor:
        self._check_inputs(x)
        a = x.reshape(x.shape[0], -1, 3, x.shape[-1]).transpose(1, 2)  # [N, ..., 3, E] -> [N, 3, T, E]
        if x.shape[-1] > self.features:
            return a[..., : self.d_in]  # with a 1 of its own, or without
        return pad(a, (0, 1), value=1.0) if self.has_bias else a

    def inputs(self, x: Tensor) -> Tensor:
        return self.patches(x)[..., : self.features]

    def outputs(self, h: Tensor) -> Tensor:
        """q, k and v, or their gradient, side by side: `[N, ..., 3 E]` as `[N, 3, T, E]`."""
        # [N, 1, T, 3 E] -> [N, T, 3, E] -> [N, 3, T, E]
        return as_rows(h, 3 * self.d_out, "output").squeeze(1).unflatten(2, (3, self.d_out)).transpose(1, 2)

    def sum_output(self, h: Tensor) -> Tensor:
        check_rows(h, 3 * self.d_out, "output")
        return h.reshape(-1, 3, self.d_out).sum(0, dtype=dtype_of_sums(h))  # [N, ..., 3 E] -> [N T, 3, E] -> [3, E]

    def mean_input(self, x: Tensor) -> Tensor:
        rows = self._rows(x)
        mean = rows.mean(1, dtype=dtype_of_sums(x)).expand(3, -1)  # [1 or 3, E] -> [3, E]
        if rows.shape[-1] == self.features and self.has_bias:
            return pad(mean, (0, 1), value=1.0)
        return mean[:, : self.d_in].contiguous()

    def activation_action(self, x: Tensor, v: Tensor) -> Tensor:
        self.check_vectors(v)
        dtype = torch.promote_types(dtype_of_sums(x), v.dtype)
        rows, V = self._rows(x).to(dtype), v.reshape(3, self.d_in, -1).to(dtype) / x.shape[0]
        k = V.shape[-1]
        if len(rows) == 1:  # one input for three groups: their vectors side by side, in one product
            V = V.transpose(0, 1).reshape(1, self.d_in, 3 * k)  # [3, d_in, k] -> [1, d_in, 3 k]
        if rows.shape[-1] == self.features and self.has_bias:
            scores = rows @ V[:, :-1] + V[:, -1:]
            total = torch.cat([rows.mT @ scores, scores.sum(1, keepdim=True)], dim=1)
        else:
            rows = rows[..., : self.d_in]
            total = rows.mT @ (rows @ V)
        if len(rows) == 1:
            total = total.reshape(self.d_in, 3, k).transpose(0, 1)  # [1, d_in, 3 k] -> [3, d_in, k]
        return total.reshape(v.shape)

    def _rows(self, x: Tensor) -> Tensor:
        """`[3, N T, E]`, or `[1, N T, E]` where all three groups have the same input."""
        self._check_inputs(x)
        if x.stride(-2) == 0:
            return x[..., 0, :].reshape(1, -1, x.shape[-1])
        return x.reshape(-1, 3, x.shape[-1]).transpose(0, 1)

    def _check_inputs(self, x: Tensor) -> None:
        check_floating(x, "input")
        fits = x.ndim >= 3 and x.shape[-2] == 3 and x.shape[-1] in (self.features, self.features + 1)
        if not fits or x.numel() == 0:
            raise ValueError(
                f"the layer's input has shape {tuple(x.shape)}, but [N, ..., 3, {self.features}] (queries, keys, "
                "values) with at least one sample and one location is needed; add a batch dimension if there is none"
            )


def parts(module: nn.MultiheadAttention) -> tuple[Part, ...]:
    """The matrices of an attention module: `in_proj` and `out_proj`.

    Where keys or values have other sizes than queries there are three weights with one bias between them: `q_proj`,
    `k_proj` and `v_proj`, each without it. `bias_k` and `bias_v` belong to no matrix. What another module computes (a
    parametrization), or replaces (another kind of `out_proj`), is left out.

    Raises UnsupportedLayer if nothing is left.
    """
    found = []
    if _owned(module, "in_proj_weight"):
        has_bias = _owned(module, "in_proj_bias")
        projections = InProjectionView(module.in_proj_weight, has_bias=has_bias)
        found.append(
            Part("in_proj", projections, "in_proj_weight", "in_proj_bias" if has_bias else None, in_projection, False)
        )
    for which, name in enumerate(("q_proj", "k_proj", "v_proj")):
        weight = f"{name}_weight"
        if _owned(module, weight):
            view = LinearView.of(getattr(module, weight), has_bias=False)
            found.append(Part(name, view, weight, None, partial(one_projection, which), False))
    out = module.out_proj
    if type(out) is NonDynamicallyQuantizableLinear and _owned(out, "weight"):
        view, bias = LinearView(out), None if out.bias is None else "out_proj.bias"
        found.append(Part("out_proj", view, "out_proj.weight", bias, out_projection, False))
    if not found:
        raise UnsupportedLayer(
            f"{type(module).__name__} computes its weights from other parameters, so h is not linear in those; "
            "remove the parametrizations, or leave its parameters to the fallback"
        )
    return tuple(found)


def refuse_out_projection(module: nn.Module) -> tuple[Part, ...]:
    """The `out_proj` of an attention module, whose forward nobody calls: it is a part of that module."""
    raise UnsupportedLayer(
        f"{type(module).__name__} is the out_proj of an nn.MultiheadAttention, which uses its weight and never calls "
        "it; it is a part of that module. Elsewhere use nn.Linear, or leave its parameters to the fallback"
    )


def in_projection(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call | None:
    """What a call showed of `in_proj`: queries, keys and values as one tensor `[N, T, 3, E]` (`InProjectionView`)."""
    inputs = _inputs(module, args, kwargs)
    y = _attended(output)
    if inputs is None or y is None:
        return None
    q, k, v = inputs
    if q is k and k is v:
        x = _batch_first(module, q)
        return Call(x.unsqueeze(-2).expand(*x.shape[:-1], 3, x.shape[-1]), y, shows_h=False)
    rows = [_batch_first(module, x.detach()) for x in inputs]
    if any(x.dim() != 3 or x.shape[0] != rows[0].shape[0] for x in rows):
        return None
    T = max(x.shape[1] for x in rows)
    if any(x.shape[1] < T for x in rows):
        rows = [pad(pad(x, (0, 1), value=1.0), (0, 0, 0, T - x.shape[1])) for x in rows]  # with its 1, then nothing
    return Call(torch.stack(rows, dim=-2), y, shows_h=False)


def one_projection(
    which: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Call | None:
    """What a call showed of the projection of queries (0), keys (1) or values (2)."""
    inputs, y = _inputs(module, args, kwargs), _attended(output)
    return None if inputs is None or y is None else Call(_batch_first(module, inputs[which]), y, shows_h=False)


def out_projection(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call | None:
    """What a call showed of `out_proj`: its input, `[rows, E]`, from the graph once backward has come to the output.

    At once where there are no rows, and where nobody computes gradients and the graph is one of its own
    (`graph_of_its_own`): no backward will come. `shows_h` is False although the output is `h`: rows stand in another
    order.
    """
    y = _attended(output)
    if y is None:
        return None
    if y.numel() == 0:
        return Call(y.detach().reshape(0, y.shape[-1]), y, shows_h=False)
    x = saved_input(y, module.get_parameter("out_proj.weight"))
    if x is None:
        return None
    return Call(x if torch.is_grad_enabled() else x(), y, shows_h=False)


@contextmanager
def graph_of_its_own(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, each of these attention modules keeps the input of its `out_proj` also where no gradients are computed.

    The module runs with gradients, as it does in training, and its hooks see an output with a graph, from which
    `out_projection` reads. What is behind the hooks gets the output without it. Memory: what autograd keeps of one call
    of one module at a time. A call in which gradients are computed anyway, or of nested tensors, which only the way
    without gradients knows, is left as it is.
    """
    restore = []
    for module in modules:
        handle = module.register_forward_hook(_without_graph)  # the last one: after those that look
        restore.append((module, handle, vars(module).get("forward")))
        vars(module)["forward"] = partial(_with_graph, module, module.forward)
    try:
        yield
    finally:
        for module, handle, forward in restore:
            handle.remove()
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


def _with_graph(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.set_grad_enabled(torch.is_grad_enabled() or _inputs(module, args, kwargs) is not None):
        return forward(*args, **kwargs)


def _without_graph(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if torch.is_grad_enabled() or not isinstance(output, tuple):
        return None
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in output)


def saved_input(y: Tensor, weight: nn.Parameter) -> Callable[[], Tensor] | None:
    """The input of the product with `weight` that gave `y`: a function to be called while backward stands at `y`.

    Autograd keeps the input of a product for the gradient of its weight, until backward has passed. The product is
    found behind `y` if only views lie between, and known by where its other operand comes from. None for anything else:
    no graph, a compiled one, another product, or tensors saved in a way that may not be read twice (hooks of
    `torch.autograd.graph.saved_tensors_hooks` other than those of checkpointing).
    """
    node: Any = y.grad_fn
    for _ in range(FARTHEST):
        if not type(node).__name__.startswith(_VIEWS):
            break
        node = node.next_functions[0][0]
    # A node that holds its own hook is never freed: there must be a view between.
    name, operand = _PRODUCTS.get(type(node).__name__, ("", 0))
    if not name or node is y.grad_fn or not _leads_to(node.next_functions[operand][0], weight):
        return None
    saved = getattr(node, f"_raw_saved_{name}", None)
    return partial(_read, node, name) if saved is not None and _may_be_read(saved) else None


_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Alias", "Clone")
# What a product keeps its input as, and which of its operands the weight is.
_PRODUCTS = {"AddmmBackward0": ("mat1", 2), "MmBackward0": ("self", 1), "LinearBackward0": ("input", 1)}


def _leads_to(node: Any, weight: nn.Parameter) -> bool:
    """Whether a node is the weight behind a transpose or a change of dtype."""
    for _ in range(FARTHEST):
        if node is None or hasattr(node, "variable"):
            return node is not None and node.variable is weight
        if len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
    return False


def _may_be_read(saved: Any) -> bool:
    """Whether a saved tensor can be read before it is used, and still be used."""
    if hasattr(saved, "unpack_hook"):
        return saved.unpack_hook is None or isinstance(saved.data, _CHECKPOINTED)
    try:
        saved.register_hooks(_same, _same)  # an older PyTorch does not tell, but takes only one pair of hooks
    except RuntimeError:
        return False
    return True


def _same(x: Tensor) -> Tensor:
    return x


def _read(node: Any, name: str) -> Tensor:
    """A tensor that a node has saved; the node still finds it when its turn comes."""
    holder = getattr(getattr(node, f"_raw_saved_{name}"), "data", None)
    if not isinstance(holder, _CHECKPOINTED):
        return getattr(node, f"_saved_{name}")
    # Checkpointing computes what it has not kept, gives it out once and crosses it out. Here it is not crossed out.
    holder.handles = _Kept(holder.handles)
    try:
        return getattr(node, f"_saved_{name}")
    finally:
        holder.handles = dict(holder.handles)


class _Kept(dict):
    """A dictionary in which nothing is crossed out."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if value is not None:
            super().__setitem__(key, value)


def _owned(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Parameter)


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries, keys and values as they were passed; None if they are no dense tensors."""
    named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    inputs = tuple(named.get(name) for name in ("query", "key", "value"))
    dense = all(isinstance(x, Tensor) and not x.is_nested and x.dim() in (2, 3) for x in inputs)
    return inputs if dense else None  # type: ignore[return-value]


def _attended(output: Any) -> Tensor | None:
    """The first of the two outputs, or None."""
    return output[0] if isinstance(output, tuple) and output and isinstance(output[0], Tensor) else None


def _batch_first(module: Any, x: Tensor) -> Tensor:
    """Samples along axis 0, locations along axis 1."""
    if x.dim() == 2:
        return x.unsqueeze(0)  # [T, E] -> [1, T, E]
    return x if module.batch_first else x.transpose(0, 1)  # [T, N, E] -> [N, T, E]

"""What the optimizer will do with each parameter of a model, as a table, before training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kfqn_core.parallel.shards import local
from kfqn_core.training.optimizer import KFQN
from kfqn_core.training.owned import sent
from kfqn_core.training.plan import adam_bytes
from kfqn_core.training.preserve import cuda_devices, restored, run_on
from kfqn_core.training.report import summary
from kfqn_core.training.second_pass import leaves_of
from kfqn_core.training.selection import Selected


@dataclass(frozen=True)
class Row:
    """One line of a `Description`. `T` is None where no example was given; sizes are per group."""

    name: str
    kind: str
    shape: tuple[int, ...]
    T: int | None
    factors: str
    state_bytes: int


@dataclass(frozen=True)
class Description:
    """What the optimizer will do with each parameter of a model; printed as a table, coverage first."""

    summary: str
    rows: tuple[Row, ...]
    adam_bytes: int

    @property
    def state_bytes(self) -> int:
        """Bytes of state that the optimizer will hold."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        header = ("parameter", "treatment", "shape", "T", "factors", "state")
        lines = [
            (row.name, row.kind, "x".join(map(str, row.shape)), str(row.T or "-"), row.factors, _bytes(row.state_bytes))
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                 for line in (header, *lines)]  # fmt: skip
        ratio = self.state_bytes / self.adam_bytes
        return "\n".join([self.summary, *table, f"state {_bytes(self.state_bytes)}, {ratio:.2f} of Adam's"])


class _OnPaper(KFQN):
    """The optimizer with a state that has shapes and no memory, and without hooks."""

    _device = torch.device("meta")


def describe(model: nn.Module, example: Any = None, **options: Any) -> Description:
    """What `KFQN(model, **options)` would do with each parameter.

    Args:
        model: any module; it is not changed.
        example: a mini-batch of model inputs: a tensor, a tuple of positional arguments, or a dict of keywords. With it
            the table says at how many places T each layer acts in one sample (of a sequence all positions, each of
            which counts as a sample when it trains), and which layers another part of the model uses behind
            their back.
        options: those of `KFQN`, for instance `**presets.KBFGS_2020`.

    Returns:
        A `Description`; `print` it. State bytes are those that the optimizer will hold in this process; where factors
        have owners, a line says who sends what of its layer in every step.

    Raises:
        ValueError, TypeError: as `KFQN` does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table says it
        optimizer = _OnPaper(model, **options)
    optimizer.remove_hooks()
    locations: dict[str, int] = {}
    if example is not None:
        locations, behind = _look(model, optimizer, example)
        optimizer.leave(behind)
    names = {id(p): name for name, p in model.named_parameters()}
    plan, rows = optimizer.plan, []
    for name, (group, i) in plan.places.items():
        weight, bias = group.state(i)
        tensors = group.tensors()
        factors = ", ".join(f"{key} {'x'.join(map(str, t.shape[1:]))}" for key, t in tensors.items())
        view = group.layers[i].view
        if group.owner is not None:
            each = _size(sent(group).values()) // len(group.layers)
            factors += f"; rank {group.owner} sends {', '.join(sent(group))}, {_bytes(each)} a step"
        kept = weight if group.held else {key: t for key, t in weight.items() if key not in tensors}
        size = _size((*kept.values(), *bias.values()))
        rows.append(Row(name, "Kronecker", (view.d_out, view.d_in), locations.get(name), factors, size))
    for p in (p for params in plan.rest for p in params):
        state = optimizer.fallback.state[p]
        kind = "Adam" if "exp_avg" in state else "momentum"
        rows.append(Row(names.get(id(p), "-"), kind, tuple(p.shape), None, "-", _size(state.values())))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if not p.requires_grad or id(p) not in held:
            rows.append(Row(name, "left out" if p.requires_grad else "frozen", tuple(p.shape), None, "-", 0))
    moving = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return Description(summary(plan, optimizer.fallback), tuple(rows), adam_bytes(moving))


def _look(model: nn.Module, optimizer: KFQN, example: Any) -> tuple[dict[str, int], list[str]]:
    """T of every layer that runs in `model(example)`; and those whose weight is used without their forward."""
    layers = {name: optimizer.plan.layer(name) for name in optimizer.plan.places}
    noticed, locations = set(), {}

    def watch(name: str, layer: Selected) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = layer.part.call(module, args, kwargs, output)
            if call is not None:
                noticed.add(name)
                if isinstance(call.x, Tensor) and call.x.numel():
                    as_it_is = layer.view.rows_are_samples and call.x.dim() > 1 and call.x.layout != torch.jagged
                    x = call.x if as_it_is else layer.view.batched(call.x)
                    locations[name] = layer.view.locations(x)

        return hook

    handles = [layer.module.register_forward_hook(watch(n, layer), with_kwargs=True) for n, layer in layers.items()]
    try:
        with restored(model, cuda_devices(model.parameters())), torch.enable_grad():
            output = run_on(model, example)
    finally:
        for handle in handles:
            handle.remove()
    used = {id(leaf) for tensor in tree_leaves(output) if isinstance(tensor, Tensor) for leaf in leaves_of(tensor)}
    behind = [name for name, layer in layers.items() if id(layer.weight) in used and name not in noticed]
    return locations, behind


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"

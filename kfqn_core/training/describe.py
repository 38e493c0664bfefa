"""What the optimizer will do with each parameter of a model, as a table, before training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.training.groups import Layer
from kfqn_core.training.optimizer import KFQN
from kfqn_core.training.second_pass import cuda_devices, restored


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
    """What the optimizer will do with each parameter of a model; printed as a table."""

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
        return "\n".join([*table, f"state {_bytes(self.state_bytes)}, {ratio:.2f} of Adam's"])


def describe(model: nn.Module, example: Tensor | None = None, **options: Any) -> Description:
    """What `KFQN(model, lr, **options)` would do with each parameter.

    Args:
        model: any module; it is not changed.
        example: a mini-batch of model inputs. With it the table says how many locations T each layer has.
        options: those of `KFQN`, for instance `**presets.KBFGS_2020`.

    Returns:
        A `Description`; `print` it. State bytes are those that the optimizer will hold.

    Raises:
        ValueError: as `KFQN` does.
    """
    # A copy whose parameters have shapes and no memory: the optimizer itself says what it would allocate.
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    optimizer = KFQN(copy.deepcopy(model, memo), **options)
    names = {id(memo[id(p)]): name for name, p in model.named_parameters()}
    locations = {} if example is None else _locations(model, optimizer.layers, example)
    rows = []
    for name, layer in optimizer.layers.items():
        tensors = layer.tensors()
        factors = ", ".join(f"{key} {'x'.join(map(str, t.shape[1:]))}" for key, t in tensors.items() if key != "M")
        shape = (layer.view.d_out, layer.view.d_in)
        rows.append(Row(name, "Kronecker", shape, locations.get(name), factors, _size(tensors.values())))
    for p in (p for group in optimizer.param_groups[1:] for p in group["params"]):
        kind = "Adam" if "exp_avg" in optimizer.state[p] else "momentum"
        rows.append(Row(names[id(p)], kind, tuple(p.shape), None, "-", _size(optimizer.state[p].values())))
    for name, p in model.named_parameters():
        if not p.requires_grad:
            rows.append(Row(name, "frozen", tuple(p.shape), None, "-", 0))
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Description(tuple(rows), 2 * _size(trainable))


def _locations(model: nn.Module, layers: dict[str, Layer], example: Tensor) -> dict[str, int]:
    seen: dict[str, int] = {}

    def watch(name: str, layer: Layer) -> Any:
        def hook(module: nn.Module, args: object, h: Tensor) -> None:
            seen[name] = layer.view.outputs(h).shape[2]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name, layer)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), restored(model, cuda_devices(list(model.parameters()))):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"

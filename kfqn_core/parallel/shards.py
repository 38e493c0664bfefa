"""Parameters of which every process holds some rows, as `fully_shard` makes them (FSDP2), and how they become whole.

A parameter is cut along its first axis into as many parts as there are processes, all of the same number of rows but
the last, which have fewer or none. Between steps a process holds its part. Parts of several parameters, each filled up
with zeros to the size of the largest, are a flat tensor that is as long on every rank: one message brings all of them
together (`gather`). Derived and counted in chapter 12.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kfqn_core.parallel.ranks import all_answering

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

RESHARDED = "what another number of processes has saved in shards is read through torch.distributed.checkpoint"


def is_shard(tensor: Tensor) -> bool:
    """Whether it is spread over processes: a `DTensor`, whose module takes a second to import."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """What this process has of it, in the same memory: of a shard its rows, else all."""
    if not is_shard(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def shard_like(p: Any, part: Tensor) -> Tensor:
    """`part`, in the same memory, as the rows of this process of a tensor that is spread as `p` is."""
    if not is_shard(p) or part.is_meta:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )  # fmt: skip


def own_rows(p: Any, whole: Tensor) -> Tensor:
    """The rows of this process of a tensor shaped like `p` as a whole: a view, shaped like `local(p)`."""
    rows = _rows_at_most(p)
    first = rows * p.device_mesh.get_local_rank()
    return whole[first : first + rows].view_as(local(p))


def padded(shard: Any) -> Tensor:
    """What this process has of a shard, flat `[padded_numel]`, with zeros up to the size of the largest part."""
    own = local(shard).reshape(-1)
    return pad(own, (0, padded_numel(shard) - own.numel()))


def padded_numel(shard: Any) -> int:
    """How many numbers `padded` gives, the same on every rank."""
    return _rows_at_most(shard) * math.prod(shard.shape[1:])


def gather(shards: Sequence[Any], flat: Tensor) -> list[Tensor]:
    """Tensors as a whole, the same bits on every rank, in one message.

    Args:
        shards: how each is spread; all over the same processes.
        flat: what `padded` gives of each, one after the other.
    """
    mesh = shards[0].device_mesh
    message = flat.new_empty(mesh.size() * flat.numel())
    with all_answering():
        all_gather()(message, flat, group=mesh.get_group())
    # [processes, numbers of all shards] -> [processes, numbers of one] -> [rows, ...], of which the last are filling
    pieces = message.view(mesh.size(), -1).split([padded_numel(shard) for shard in shards], dim=1)
    return [
        piece.reshape(-1, *shard.shape[1:])[: shard.shape[0]] for piece, shard in zip(pieces, shards, strict=True)
    ]  # fmt: skip


def whole(tensor: Any) -> Tensor:
    """All of it, where it is spread by a message of its own that every rank has to wait for."""
    full: Tensor = gather([tensor], padded(tensor))[0] if is_shard(tensor) else tensor
    return full


def fits(own: Any, value: Any) -> bool:
    """Whether `value` can be copied into `own`: of the same shape, and if it is spread, then in the same way."""
    if own.shape != value.shape:
        return False
    if not is_shard(value):
        return True
    return is_shard(own) and own.placements == value.placements and local(own).shape == local(value).shape


def part_for(own: Tensor, value: Tensor) -> Tensor:
    """What this process has of `value`, a whole or a shard that `fits`, shaped like `local(own)`."""
    return own_rows(own, value) if is_shard(own) and not is_shard(value) else local(value)


def processes(model: nn.Module, given: ProcessGroup | None = None) -> ProcessGroup | None:
    """Those over which the parameters of `model` are spread; if they are not, those that are `given`.

    Raises:
        TypeError: if parameters are spread in another way than by rows over one set of processes, or for something
            else than a process group.
        ValueError: if others are given.
    """
    if given is not None and not hasattr(given, "rank"):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup (new_group() makes one) or None, got {given!r}"
        )
    found = spread_over(model)
    if found is None:
        return given
    if given is not None and _members(given) != _members(found):
        raise ValueError(
            "process_group is not the group of the mesh that the parameters are sharded over: leave it out, since "
            "fully_shard averages gradients over its mesh"
        )
    return found


def require_spread(model: nn.Module, sharded: bool) -> None:
    """Raise TypeError if parameters are spread over processes now and were not, or the other way round."""
    if (spread_over(model) is not None) != sharded:
        raise TypeError(
            "the parameters of the model were sharded over processes after KFQN was made, or are no longer: call "
            "fully_shard first and make KFQN then"
        )


def spread_over(model: nn.Module) -> ProcessGroup | None:
    """The processes over which `fully_shard` has spread parameters, None if all are whole. `TypeError`: `processes`."""
    reshard(model.modules())
    wrapped = [name for name, module in model.named_modules() if _is_fully_sharded(module)]
    group: ProcessGroup | None = None
    for name, module in model.named_modules():
        params = list(module.parameters(recurse=False))
        shards: list[Any] = [p for p in params if is_shard(p)]
        if type(module).__name__ == "FullyShardedDataParallel":
            raise _refusal(name, module, "")
        if not shards:
            continue
        inside = any(not outer or name == outer or name.startswith(f"{outer}.") for outer in wrapped)
        if not inside or any(not _by_rows(p) for p in shards):
            raise _refusal(name, module, f" ({', '.join(map(str, shards[0].placements))})")
        own = [p.device_mesh.get_group() for p in shards]
        group = group or own[0]
        if len(shards) < len(params) or any(_members(other) != _members(group) for other in own):
            raise _refusal(name, module, " in part, or over others than those of other modules")
    return group


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let every module have its shards for parameters: after a forward without backward it may still have the whole."""
    for module in modules:
        if _is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def _is_fully_sharded(module: nn.Module) -> bool:
    if "torch.distributed.fsdp" not in sys.modules:  # then nothing is
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _by_rows(p: Any) -> bool:
    """Over a mesh of one dimension, on whose devices the rows lie."""
    from torch.distributed.tensor import Shard

    return tuple(p.placements) == (Shard(0),) and local(p).device.type == p.device_mesh.device_type


def _members(group: ProcessGroup) -> list[int]:
    return torch.distributed.get_process_group_ranks(group)


def all_gather() -> Any:
    """By the name that it has had since torch 2.13, or by that before."""
    return getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor


def _rows_at_most(p: Any) -> int:
    """Rows of the largest part."""
    return -(-p.shape[0] // p.device_mesh.size())


def _refusal(name: str, module: nn.Module, how: str) -> TypeError:
    return TypeError(
        f"the parameters of {name or type(module).__name__!r} are sharded over processes{how}, but KFQN needs whole "
        "matrices, or their rows as fully_shard spreads them over a mesh of one dimension: use that or "
        "DistributedDataParallel, without offloading, instead of FullyShardedDataParallel, a mesh with replicas, or "
        "tensor parallelism"
    )

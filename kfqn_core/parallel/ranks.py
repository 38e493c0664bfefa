"""One model trained by several processes, each on its own part of the mini-batch.

`DistributedDataParallel` averages the gradients. The copies of the model stay equal only if everything else that makes
a step is equal too. The optimizer keeps functions of means over the mini-batch (`A`, `A v`, and the means of `a`, `h`
and `g`), and the mean over ranks of the means over equal parts is the mean over the whole: every such mean is averaged
before it is used, `O(d)` numbers per layer and step, or `d_in^2` where `A` itself is kept or started.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """The processes that train one model: those of `group`, or of the `DistributedDataParallel` that runs its layers.

    The wrapper is noticed when it runs: the optimizer may know it or the module inside, made before or after. Ranks
    count alike, as they do in the averaged gradient, whatever number of samples each has seen. A copy or a pickle is
    alone again until it runs.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._given = group
        self._wrapper: DistributedDataParallel | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"_given": None, "_wrapper": None}

    @property
    def group(self) -> ProcessGroup | None:
        """The processes that train this model, as far as is known."""
        return self._given if self._wrapper is None else self._wrapper.process_group

    def notice(self) -> None:
        """To be called inside a forward: remember the wrapper that runs it, if one does."""
        wrapper = DistributedDataParallel._get_active_ddp_module()  # kept for torch.compile, which needs it too
        if wrapper is not None:
            self._wrapper = wrapper

    def require_group(self) -> None:
        """Raises RuntimeError if there are other processes and nothing has told whether they train this model."""
        if self.group is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            size = torch.distributed.get_world_size()
            if size > 1:
                raise RuntimeError(
                    f"this is one of {size} processes, and nothing tells whether they train one model: wrap it in "
                    "DistributedDataParallel, or say KFQN(model, process_group=...) with those that average its "
                    "gradients (a group of this process alone, if nobody else does)"
                )

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.group is None or self.size == 1

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over ranks, the same bits on each. Every rank must call it, in the same order."""
        if self.alone:
            return value
        total = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over ranks, the same bits on each. Every rank must call it, in the same order."""
        return value if self.alone else self.sum(value) / self.size

    def all(self, flag: Tensor) -> Tensor:
        """Whether the boolean scalar `flag` holds on every rank."""
        return flag if self.alone else self.mean(flag.float()) == 1

    @contextmanager
    def apart(self) -> Iterator[None]:
        """For a pass that the wrapper is to know nothing of: no gradient is waited for, no buffer is broadcast."""
        if self._wrapper is None:
            yield
            return
        broadcast = self._wrapper.require_forward_param_sync  # without gradients to average the wrapper clears it
        self._wrapper.require_forward_param_sync = False
        try:
            with self._wrapper.no_sync():
                yield
        finally:
            self._wrapper.require_forward_param_sync = broadcast


def refuse_shards(model: nn.Module) -> None:
    """Raises TypeError if a parameter of `model` is spread over processes: a factor needs its whole matrix."""
    for name, module in model.named_modules():
        sharded = [key for key, p in module.named_parameters(recurse=False) if hasattr(p, "device_mesh")]
        if sharded or type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"the parameters of {name or type(module).__name__!r} are sharded over processes, but KFQN needs whole "
                "matrices: wrap the model in DistributedDataParallel instead of FSDP"
            )

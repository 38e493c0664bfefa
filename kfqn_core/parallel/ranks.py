"""One model trained by several processes, each on its own part of the mini-batch.

`DistributedDataParallel` averages the gradients. The copies of the model stay equal only if everything else that makes
a step is equal too. The optimizer keeps functions of means over the mini-batch (`A`, `A v`, and the means of `a`, `h`
and `g`), and the mean over ranks of the means over equal parts is the mean over the whole: every such mean is averaged
before it is used, `O(d)` numbers per layer and step, or `d_in^2` where `A` itself is kept or started.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Ranks:
    """The processes that train one model; a process alone until it has run a layer under `DistributedDataParallel`.

    The wrapper is noticed when it runs: the optimizer may know it or the module inside, made before or after. Ranks
    count alike, as they do in the averaged gradient, whatever number of samples each has seen. A copy or a pickle is
    alone again until it runs.
    """

    def __init__(self) -> None:
        self._wrapper: DistributedDataParallel | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"_wrapper": None}

    def notice(self) -> None:
        """To be called inside a forward: remember the wrapper that runs it, if one does."""
        wrapper = DistributedDataParallel._get_active_ddp_module()  # kept for torch.compile, which needs it too
        if wrapper is not None:
            self._wrapper = wrapper

    def require_acquaintance(self) -> None:
        """Raises RuntimeError if there are other processes and no forward has shown whether they train this model."""
        if self._wrapper is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            size = torch.distributed.get_world_size()
            if size > 1:
                raise RuntimeError(
                    f"this is one of {size} processes, and nothing tells yet whether they train one model: give KFQN "
                    "the wrapped model, KFQN(DistributedDataParallel(model)), before the warm start"
                )

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self._wrapper is None or self._wrapper.process_group.size() == 1

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over ranks, the same bits on each. Every rank must call it, in the same order."""
        if self._wrapper is None or self.alone:
            return value
        total = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self._wrapper.process_group)
        return total / self._wrapper.process_group.size()

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

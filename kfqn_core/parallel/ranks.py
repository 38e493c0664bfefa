"""One model trained by several processes, each on its own part of the mini-batch.

`DistributedDataParallel` averages the gradients. The copies of the model stay equal only if everything else that makes
a step is equal too. The optimizer keeps functions of means over the mini-batch (`A`, `A v`, and the means of `a`, `h`
and `g`), and the mean over ranks of the means over equal parts is the mean over the whole: every such mean is averaged
before it is used, `O(d)` numbers per layer and update, or `d_in^2` where `A` itself is kept, started or inverted. They
travel together (`Ranks.sums`): the time of a small message does not depend on its size. Derived and counted in
chapter 12.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def look(self, model: nn.Module) -> None:
        """Remember the wrapper that `model` is, or has inside, before it has run."""
        wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        self._wrapper = wrappers[0] if wrappers else self._wrapper

    def require_group(self) -> None:
        """Raise RuntimeError where ranks would drift apart.

        If there are other processes and nothing has told whether they train this model; or inside `join`, where a rank
        without data answers for the wrapper, and nobody for the optimizer.
        """
        if self._wrapper is not None and self._wrapper._join_config.enable and self.size > 1:
            raise RuntimeError(
                "a rank that has run out of data cannot answer for KFQN inside join(): give every rank the same number "
                "of mini-batches, as DistributedSampler does (they may be of different size, or empty)"
            )
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
    def rank(self) -> int:
        """Which of them this is, from 0."""
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.group is None or self.size == 1

    def sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The sum of every value over ranks, the same bits on each; one message for all of one device and dtype.

        Every rank must call it with as many values of the same shapes, in the same order.

        Raises:
            RuntimeError: if a rank does not answer within the time limit of the process group.
        """
        totals = list(values)
        if self.alone:
            return totals
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, value in enumerate(values):
            alike.setdefault((value.device, value.dtype), []).append(i)
        for places in alike.values():
            message = torch.cat([values[i].reshape(-1) for i in places])  # [numbers of all of them]
            self._all_reduce(message)
            for i, part in zip(places, message.split([values[i].numel() for i in places]), strict=True):
                totals[i] = part.view(values[i].shape)
        return totals

    def _all_reduce(self, message: Tensor) -> None:
        with all_answering():
            torch.distributed.all_reduce(message, group=self.group)

    def means(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The mean of every value over ranks; see `sums`."""
        return list(values) if self.alone else [total / self.size for total in self.sums(values)]

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


@contextmanager
def all_answering() -> Iterator[None]:
    """For a message: RuntimeError, with what to do, if a rank does not answer within the limit of its process group."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # of this rank
    except RuntimeError as error:
        raise RuntimeError(
            "the other processes that train this model did not answer, since one has stopped or has taken another "
            f"number of steps: start all of them again from the last checkpoint ({error})"
        ) from error

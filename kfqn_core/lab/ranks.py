"""Several processes on this machine that train one model, over gloo on the CPU: for chapters and tests.

A process that is started anew finds a function only in a module, not in a notebook.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from kfqn_core.parallel.ranks import Ranks

CALLS = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce",
         "reduce_scatter_tensor", "all_to_all_single", "barrier")  # fmt: skip


def run(work: Callable[..., Any], ranks: int, *args: Any, seconds: float = 120) -> list[Any]:
    """What `work(rank, *args)` returns on each of several processes that know each other.

    Args:
        work: a function at the top of a module. The default process group is there when it begins.
        ranks: how many processes.
        args: the same for all.
        seconds: after which all are ended; one that waits for another gives up a little earlier.

    Returns:
        By rank.

    Raises:
        ProcessRaisedException: what a rank has raised; the others are ended.
        ProcessExitedException: if a rank has died without a word; the others are ended.
        TimeoutError: if they are not done in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Started anew and not forked: a copy of this process would have the threads of torch in an unknown state.
        processes = multiprocessing.spawn(_process, (work, ranks, folder, seconds, args), nprocs=ranks, join=False)
        deadline = time.monotonic() + seconds
        try:
            while not processes.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{ranks} processes were still at work after {seconds} s: give them more")
        finally:
            for process in processes.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _process(rank: int, work: Callable[..., Any], ranks: int, folder: str, seconds: float, args: Any) -> None:
    torch.set_num_threads(1)  # processes that share cores would wait for each other's threads
    store, patience = f"file://{folder}/store", timedelta(seconds=0.8 * seconds)
    distributed.init_process_group("gloo", store, patience, rank=rank, world_size=ranks)
    torch.save(work(rank, *args), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@contextmanager
def messages() -> Iterator[list[int]]:
    """The sizes, in bytes, of all that is sent through `torch.distributed` inside: of one call each, and what a gather
    brings.

    What `DistributedDataParallel` sends does not pass here: see `gradient_messages`.
    """
    sent: list[int] = []

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def send(*args: Any, **kwargs: Any) -> Any:
            sent.append(sum(value.numel() * value.element_size() for value in args[:1] if isinstance(value, Tensor)))
            return call(*args, **kwargs)

        return send

    with ExitStack() as patches:
        for name in filter(lambda name: hasattr(distributed, name), CALLS):  # one of them is new in torch 2.13
            patches.enter_context(mock.patch.object(distributed, name, counted(getattr(distributed, name))))
        yield sent


def gradient_messages(wrapper: DistributedDataParallel) -> list[int]:
    """A list that grows by the size, in bytes, of every bucket of gradients that the wrapper sends from now on."""
    sent: list[int] = []

    def hook(group: Any, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        sent.append(buffer.numel() * buffer.element_size())
        mean = group.allreduce([buffer.div_(group.size())]).get_future()  # past `messages`
        return mean.then(lambda done: done.value()[0])

    wrapper.register_comm_hook(wrapper.process_group, hook)
    return sent


@contextmanager
def alike(size: int, refusing: int = 0) -> Iterator[list[int]]:
    """Inside, this process believes itself one of `size`, whose mini-batches and states are all the same as its own.

    A sum over ranks is then `size` times the value: what is sent can be counted without sending it.

    Args:
        size: how many.
        refusing: how many of the others have found a number that is not finite.

    Returns:
        The sizes of the messages, in bytes.
    """
    sent: list[int] = []

    def all_reduce(message: Tensor, group: Any = None) -> None:
        sent.append(message.numel() * message.element_size())
        message.mul_(size)
        if len(sent) == 1 and refusing:  # the flag comes first in the first message of a step
            message[0] -= refusing

    one_of_many = mock.patch.multiple(Ranks, size=size, alone=False)
    with one_of_many, mock.patch.object(distributed, "all_reduce", all_reduce):
        yield sent

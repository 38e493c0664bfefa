"""Work for several processes, each with its part of every mini-batch: what chapter 12 has them do.

Every function runs in one process as well, which then has the whole.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from kfqn_core.lab.networks import multilayer_perceptron
from kfqn_core.lab.ranks import gradient_messages, messages
from kfqn_core.training import moves
from kfqn_core.training.groups import Group
from kfqn_core.training.optimizer import KFQN

Closure = Callable[[], Tensor]


def network(width: int, layers: int = 3, dtype: torch.dtype = torch.float64, norm: bool = False) -> nn.Module:
    """Layers of one width with ReLU between them, always the same; `norm` puts a batch norm in front."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = multilayer_perceptron([width] * (layers + 1))
    return (nn.Sequential(nn.BatchNorm1d(width), *body) if norm else body).to(dtype)


def part(rank: int, batch: int, samples: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """This rank's part of a mini-batch by its number: inputs and targets, `[samples / ranks, width]`."""
    draw = torch.Generator().manual_seed(batch)
    x, y = (torch.randn(samples, width, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    return x.chunk(_ranks())[rank], y.chunk(_ranks())[rank]


def start(width: int, options: Mapping[str, Any], **kind: Any) -> tuple[nn.Module, Any, Any]:
    """A network, what is called in its place (the wrapper, if there are other ranks), and its optimizer."""
    model = network(width, **kind)
    wrapped = DistributedDataParallel(model) if _ranks() > 1 else model
    return model, wrapped, KFQN(wrapped, 0.03, **options)


def closure(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Closure:
    """Forward, loss and backward."""

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    return evaluate


def steps(rank: int, model: nn.Module, optimizer: Any, of: range, width: int) -> None:
    """Some steps, on the mini-batches of these numbers, 32 samples each."""
    for k in of:
        optimizer.step(closure(model, optimizer, *part(rank, k % 4, 32, width)))


def state(model: nn.Module, optimizer: Any) -> Tensor:
    """All that is there after a step, parameters, momenta and factors, as one vector."""
    own = [p.detach() for p in model.parameters()]
    own += [tensor for layer in optimizer.layers.values() for tensor in layer.tensors().values()]
    return torch.cat([tensor.flatten().to(torch.float64) for tensor in own])


def trained(rank: int, options: Mapping[str, Any], number: int = 20, norm: bool = False, broken: str = "") -> Tensor:
    """The state after so many steps of a network of width 12.

    Args:
        rank: of this process; 0 for one that is alone.
        options: of KFQN.
        number: of steps.
        norm: whether there is a batch norm.
        broken: a name of what is broken, for checks: nothing is sent, and a rank takes its own part for the whole.
    """
    unsent = mock.patch.object(distributed, "all_reduce", lambda message, group=None: message.mul_(_ranks()))
    with unsent if broken else nullcontext():
        model, wrapped, optimizer = start(12, options, norm=norm)
        steps(rank, wrapped, optimizer, range(number), 12)
    return state(model, optimizer)


def several(rank: int, cases: Mapping[str, Mapping[str, Any]], **how: Any) -> dict[str, Tensor]:
    """`trained` for several options, by name."""
    return {name: trained(rank, options, **how) for name, options in cases.items()}


def owned(rank: int, cases: Mapping[str, Mapping[str, Any]], width: int, layers: int = 3, broken: str = "") -> Any:
    """Steps where each rank keeps the factors of its own layers, for several options.

    Args:
        rank: of this process; 0 for one that is alone, and keeps all.
        cases: options of KFQN, by name.
        width, layers: of the network.
        broken: a name of what is broken, for checks: nothing is fetched, and the `D` of others are zero.

    Returns:
        By name the `state` of all ranks, the `held` bytes of factors of this one, and the sizes of the messages of the
        last two of 21 steps, `between` updates and of an `update` where the options say `refresh=2`.
    """
    unsent = mock.patch.object(moves, "directions", _own_directions)
    found = {}
    for name, options in cases.items():
        with unsent if broken else nullcontext():
            model, wrapped, optimizer = start(width, {**options, "owners": True}, layers=layers)
            steps(rank, wrapped, optimizer, range(19), width)
            with messages() as between:
                steps(rank, wrapped, optimizer, range(19, 20), width)
            with messages() as update:
                steps(rank, wrapped, optimizer, range(20, 21), width)
            tensors = [t for _, of in sorted(optimizer.state_dict()["state"].items()) for t in of.values()]
        groups = optimizer.plan.layer_groups
        factors = [t for group in groups if group.held for t in group.tensors().values()]
        found[name] = {
            "state": torch.cat([t.detach().flatten().double() for t in (*model.parameters(), *tensors)]),
            "held": sum(t.numel() * t.element_size() for t in factors),
            "between": list(between),
            "update": list(update),
        }
    return found


def _own_directions(groups: Sequence[Group], out: Sequence[Tensor]) -> set[Group]:
    """As `owned.directions`, but that nothing is fetched."""
    owned_groups = [(group, D) for group, D in zip(groups, out, strict=True) if group.owner is not None]
    for group, D in owned_groups:
        _ = group.direction(D) if group.held else D.zero_()
    return {group for group, _ in owned_groups}


def story(rank: int, widths: Sequence[int], sizes: Sequence[int]) -> dict[str, Any]:
    """All that chapter 12 asks of two processes; see the functions that are called."""
    return {
        "traffic": [traffic(rank, width) for width in widths],
        "seconds of a message": [seconds_of_message(size) for size in sizes],
        "seconds of a step": seconds_of_step(rank),
        "norm": trained(rank, {}, norm=True),
        "accident": accident(rank),
        "run": (run := resumed(rank)),
        "again": resumed(rank, run["saved"])["end"],
    }


def traffic(rank: int, width: int) -> dict[str, list[int]]:
    """Bytes of each message of a step between updates and of one with an update; and those of the gradients."""
    _, wrapped, optimizer = start(width, {"activation_factor": "action", "refresh": 2}, dtype=torch.float32)
    gradients = gradient_messages(wrapped)
    sent: dict[str, list[int]] = {}
    for k, name in enumerate(("first", "between", "update")):
        gradients.clear()
        with messages() as own:
            optimizer.step(closure(wrapped, optimizer, *part(rank, k, 32, width, torch.float32)))
        sent[name] = list(own)
    return {**sent, "gradients": list(gradients)}


def seconds_of_message(size: int, times: int = 30) -> float:
    """The median time of a sum over ranks of so many float32."""
    message, taken = torch.zeros(size), []
    for _ in range(times):
        began = time.perf_counter()
        distributed.all_reduce(message)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def seconds_of_step(rank: int, width: int = 256, samples: int = 512) -> dict[str, float]:
    """The median time of a training step, forward and backward included."""
    taken: dict[str, float] = {}
    for name in ("Adam", "KFQN"):
        model, wrapped, optimizer = start(width, {}, dtype=torch.float32)
        if name == "Adam":
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        times = []
        for k in range(40):
            evaluate = closure(wrapped, optimizer, *part(rank, k % 4, samples, width, torch.float32))
            began = time.perf_counter()
            optimizer.step(evaluate)
            times.append(time.perf_counter() - began)
        taken[name] = statistics.median(times[10:])
    return taken


def accident(rank: int) -> dict[str, Any]:
    """One input of the last rank is not a number: whether anything changed, and how many steps were skipped."""
    model, wrapped, optimizer = start(12, {})
    steps(rank, wrapped, optimizer, range(3), 12)
    before = state(model, optimizer)
    x, y = part(rank, 3, 32, 12)
    if rank == _ranks() - 1:
        x[0, 0] = torch.nan
    optimizer.step(closure(wrapped, optimizer, x, y))
    unchanged = torch.equal(state(model, optimizer), before)
    return {"unchanged": unchanged, "skipped": optimizer.skipped_steps}


def resumed(rank: int, saved: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """Six steps, with what was saved after three of them; or the last three from there, in a new model."""
    model, wrapped, optimizer = start(12, {"refresh": 1})
    if saved is None:
        steps(rank, wrapped, optimizer, range(3), 12)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    else:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    steps(rank, wrapped, optimizer, range(3, 6), 12)
    return {"saved": saved, "end": state(model, optimizer)}


def _ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1

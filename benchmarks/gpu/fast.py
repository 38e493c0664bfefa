"""How fast: a step at sizes that papers use, eager and as CUDA graphs, against fused Adam, Muon, SOAP and the floors.

The data are noise: only the cost of a step is of interest. Every contestant has the machine to itself for a second.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from benchmarks.counting import count
from benchmarks.flops import floor_ratio, shapes
from benchmarks.methods import METHODS, muon, state_bytes
from benchmarks.timing import NEVER, mean_interval
from kfqn_core import KFQN, capture
from kfqn_core.lab.further_problems import token_cross_entropy
from kfqn_core.lab.networks import GPT, multilayer_perceptron, residual_network
from kfqn_core.lab.problems import autoencoder, pixel_cross_entropy

__all__ = ["CASES", "Case", "Made", "captured", "fused_adam", "measure", "rows_of"]

TURNS, TURN = 5, 0.05  # turns of each contestant, and seconds of each, about
STEPS = 1000  # of a run, over which steps that update and steps that do not are put together
WARM_UP = 4
TOP = 12  # kernels named of every profile
Step = Callable[[], Any]
Made = Callable[[torch.device], tuple[nn.Module, Callable[[], Tensor]]]


@dataclass(frozen=True)
class Case:
    """A model, its mini-batch and its loss."""

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    batch: int
    loss: Callable[[Tensor, Tensor], Tensor]
    classes: int | None = None  # None: the target is the input
    tokens: bool = False
    bfloat16: bool = False

    def made(self, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
        """The model on a device, and what gives its loss on the mini-batch."""
        with device:
            model = self.make()
        x, y = self.batch_on(device)

        def loss() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
                return self.loss(model(x), y)

        return model, loss

    def batch_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Noise as inputs, and targets."""
        if self.tokens:
            x = torch.randint(self.classes or 2, (self.batch, *self.inputs), device=device)
            return x, x.roll(-1, 1)
        x = torch.rand(self.batch, *self.inputs, device=device)
        return x, x if self.classes is None else torch.randint(self.classes, (self.batch,), device=device)


def resnet50() -> nn.Module:
    import torchvision  # ImportError where it is not installed: the case is left out

    return torchvision.models.resnet50()


CASES = (
    Case("MNIST autoencoder 784-1000-500-250-30, batch 1000", lambda: autoencoder((784, 1000, 500, 250, 30)), (784,),
         1000, pixel_cross_entropy),
    Case("GPT of 163 million weights, 8 x 1024 tokens, bfloat16", lambda: GPT(50304, 1024, 768, 12, 12), (1024,), 8,
         token_cross_entropy, 50304, tokens=True, bfloat16=True),
    Case("ResNet-50 at 224 x 224, batch 64", resnet50, (3, 224, 224), 64, cross_entropy, 1000),
    Case("MLP of width 4096, four layers, batch 1024", lambda: multilayer_perceptron((4096, 4096, 4096, 4096, 10)),
         (4096,), 1024, cross_entropy, 10),
    Case("ResNet-32 at 32 x 32, batch 128", lambda: residual_network(blocks=5), (3, 32, 32), 128, cross_entropy, 10),
    Case("FACES autoencoder 625-2000-1000-500-30, batch 1000", lambda: autoencoder((625, 2000, 1000, 500, 30)), (625,),
         1000, pixel_cross_entropy),
    Case("CURVES autoencoder 784-400-200-100-50-25-6, batch 1000", lambda: autoencoder((784, 400, 200, 100, 50, 25, 6)),
         (784,), 1000, pixel_cross_entropy),
)  # fmt: skip
TOY = Case("toy", lambda: multilayer_perceptron((12, 8, 8, 3)), (12,), 16, cross_entropy, 3)
SMALL_TOKENS = Case("toy GPT", lambda: GPT(30, 8, 12, 2, 1), (8,), 4, token_cross_entropy, 30, tokens=True)


class Nothing:
    """Forward and backward alone."""

    def __init__(self, model: nn.Module):
        self.param_groups = [{"params": list(model.parameters())}]
        self.state: dict[Tensor, Any] = {}

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def step(self, closure: Step) -> Any:
        return closure()


def fused_adam(model: nn.Module, lr: float | Tensor = 1e-4) -> torch.optim.Optimizer:
    """As fast as torch's Adam can be, in a graph too."""
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.Adam(model.parameters(), lr=lr, fused=True, capturable=on_gpu)


CONTESTANTS: dict[str, Callable[[nn.Module], Any]] = {
    "forward and backward": Nothing,
    "adam": fused_adam,
    "muon": lambda model: muon(model, 1e-4),
    "soap": lambda model: METHODS["soap"].constructor(model, 1e-4, **METHODS["soap"].settings),
    "kfqn, updating": lambda model: KFQN(model, 1e-4, refresh=1),
    "kfqn, between updates": lambda model: KFQN(model, 1e-4, refresh=NEVER),
}
GRAPHED = [name for name in CONTESTANTS if name != "soap"]  # which counts its steps, and decomposes, on the host


def measure(write: Callable[[dict[str, Any]], None], real: bool) -> None:
    """A line for the machine, then one for every case."""
    device = torch.device("cuda" if real else "cpu")
    write({"machine": machine(device)})
    for case in CASES if real else (TOY, SMALL_TOKENS):
        try:
            record = _of_case(case, device)
        except ImportError as error:
            record = {"left out": f"{error}"}
        write({"case": case.name, **record})


def machine(device: torch.device) -> dict[str, float]:
    """What the floors are taken from: bytes moved and products made per second."""
    n = 2**28 if device.type == "cuda" else 2**20
    x, y = torch.ones(n, device=device), torch.empty(n, device=device)
    copy = _seconds(lambda: y.copy_(x), device)
    size = 8192 if device.type == "cuda" else 256
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        A, B = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rates[f"TFLOP/s of a product in {str(dtype)[6:]}"] = (
            2 * size**3 / _seconds(lambda A=A, B=B: A @ B, device) / 1e12
        )
    return {"TB/s of a copy": 2 * 4 * n / copy / 1e12, **rates}


def _of_case(case: Case, device: torch.device) -> dict[str, Any]:
    return {"rows": rows_of(case.made, device), **_floors(case, device, mean_interval(METHODS["kfqn"], STEPS))}


def rows_of(made: Made, device: torch.device, *, detailed: bool = True) -> dict[str, dict[str, Any]]:
    """What a step of every contestant costs on one model, and of KFQN put together over a run.

    Args:
        made: gives a model and what computes its loss, afresh for every contestant.
        device: of both.
        detailed: whether kernels are counted and named.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, make in tqdm(CONTESTANTS.items(), desc="step costs", leave=False):
        rows[name] = row = {}
        for mode in ("eager", "graph"):
            if mode == "graph" and (device.type != "cuda" or name not in GRAPHED):
                continue
            torch.manual_seed(0)
            try:
                row |= _of_contestant(made, make, device, mode, detailed)
            except Exception as error:  # of a peer, or of a mode: the others go on
                row[f"{mode} failed"] = f"{type(error).__name__}: {error}"[:200]
            gc.collect()  # models and closures hold each other
            if device.type == "cuda":
                torch.cuda.empty_cache()
    interval = mean_interval(METHODS["kfqn"], STEPS)
    for mode in ("eager ms", "graph ms"):
        often, seldom = (rows[f"kfqn, {kind}"].get(mode) for kind in ("updating", "between updates"))
        if often is not None and seldom is not None:
            together = often / interval + seldom * (1 - 1 / interval)
            rows.setdefault("kfqn", {})[mode] = together
            for peer in ("adam", "muon", "soap"):
                if (of_peer := rows[peer].get(mode, rows[peer].get("eager ms"))) is not None:
                    rows["kfqn"][f"{mode[:-3]} to {peer}"] = together / of_peer
    return rows


def _of_contestant(
    made: Made, make: Callable[[nn.Module], Any], device: torch.device, mode: str, detailed: bool
) -> dict[str, Any]:
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # what captured graphs have left behind
    model, loss_of_batch = made(device)
    optimizer = make(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of_batch()
        loss.backward()
        return loss

    if mode == "graph":
        step = capture(optimizer, closure) if isinstance(optimizer, KFQN) else captured(lambda: optimizer.step(closure))
        return {"graph ms": _seconds(step, device) * 1e3}
    row: dict[str, Any] = {"eager ms": _seconds(lambda: optimizer.step(closure), device) * 1e3}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row |= _profile(lambda: optimizer.step(closure), device) if detailed else {}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    row["MB of state"] = state_bytes(optimizer) / 1e6
    row["MB of parameters"] = parameters / 1e6
    if device.type == "cuda":
        row["MB at most"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    else:
        row["operations"] = count(lambda: optimizer.step(closure)).operations
    return row


def captured(step: Step) -> Step:
    """A whole step of another optimizer as one graph, after a few that are taken."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _seconds(step: Step, device: torch.device) -> float:
    """Of a step: the median of a few turns, the device's queue emptied around each."""
    for _ in range(WARM_UP):
        step()
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def turn(steps: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return (time.perf_counter() - start) / steps

    # Ten at a time, since some methods do more in every tenth step.
    steps = 10 * max(1, round(TURN / turn(10) / 10)) if device.type == "cuda" else 1
    return float(np.median([turn(steps) for _ in range(TURNS)]))


def _profile(step: Step, device: torch.device) -> dict[str, Any]:
    """Of one step: kernels, their time in all, and those that take most of it."""
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:TOP]
    return {
        "kernels": sum(event.count for event in kernels),
        "kernel ms": sum(event.self_device_time_total for event in kernels) / 1e3,
        "longest": [[event.key[:60], event.count, event.self_device_time_total / 1e3] for event in longest],
    }


def _floors(case: Case, device: torch.device, interval: float) -> dict[str, Any]:
    """What a step needs at least, in units of forward and backward, and in bytes that the optimizer must move."""
    with device:
        model = case.make()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = KFQN(model, 1e-4)
    factors = sum(t.numel() * t.element_size() for t in _factors(optimizer))
    held = state_bytes(optimizer)
    moved = {
        # Gradient and parameters are read, parameters written; what is kept is read, and what changes written.
        "adam": 3 * parameters + 4 * parameters,
        "kfqn, updating": 3 * parameters + 2 * held,
        "kfqn, between updates": 3 * parameters + 2 * held - factors,
    }
    found: dict[str, Any] = {"MB moved at least": {name: size / 1e6 for name, size in moved.items()}}
    if not case.tokens and not case.name.startswith("ResNet-50"):  # `shapes` follows plain stacks of layers
        layers = shapes(model, case.batch_on(device)[0])
        settings = {name: {"refresh": every} for name, every in (("kfqn", interval), ("kfqn-1", 1))}
        found["operations to forward and backward"] = {
            "kfqn": floor_ratio("kfqn", settings["kfqn"], layers),
            "kfqn, updating": floor_ratio("kfqn", settings["kfqn-1"], layers),
            "muon": floor_ratio("muon", {}, layers),
        }
    return found


def _factors(optimizer: KFQN) -> Iterator[Tensor]:
    """Of all layers; momenta are not among them."""
    for layer in optimizer.layers.values():
        yield from (tensor for name, tensor in layer.tensors().items() if name != "M")

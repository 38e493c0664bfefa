"""The contestants: each by name, with how it is built, what it is built with, and the rate where its tuning begins.

Every peer has the settings of its package but where the table below says otherwise; whatever a peer recomputes now and
then, it recomputes every ten steps (`EVERY`), because that is where SOAP's authors put it. No method uses weight decay
except the 2020 presets, whose L2 term of 1e-5 belongs to them. Momentum is the method's own. Where torch has a fused
kernel, it is used.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from pytorch_optimizer import SOAP, Kron, ScalableShampoo
from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting
from torch import Tensor, nn

from benchmarks.kfac import KFAC
from benchmarks.problems import Task
from kfqn_core import KFQN, presets
from kfqn_core.training import length, steadiness
from kfqn_core.training.options import INTERVAL_GROWTH, Options

__all__ = ["METHODS", "Method", "muon", "state_bytes"]

EVERY = 10

# What is recorded of KFQN: every option of the method, and those of its parameter groups that decide how layers move.
# (How a decay of zero would enter decides nothing: it is recorded as it was when the first results were.)
DEFAULTS = {**asdict(Options()), "linear": None, "momentum": 0.9, "weight_decay": 0.0, "decoupled_weight_decay": False}

YOUNGER = ("safeguard", "owners")  # options that the first records say nothing of, since nobody could use them


@dataclass(frozen=True)
class Method:
    """A contestant. `settings` are the keyword arguments of `constructor` and are recorded with each result.

    `lr` is the rate where tuning begins, a rung of `protocol.LADDER`, and `lr_pixels` replaces it where the loss is a
    sum over pixels, for methods whose step scales with the loss. `default_lr` is a rate that the method promises
    without tuning: it is reported beside the tuned one. `tuned` has settings that are tuned with the rate, and their
    values. `period` is the number of steps after which costs repeat. `package` names the distribution whose version is
    recorded. Of methods with the same label the one with the cheaper step is a contestant.
    """

    name: str
    label: str
    constructor: Callable[..., Any]
    lr: float
    package: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr_pixels: float | None = None
    default_lr: float | None = None
    tuned: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    period: int = 1
    warm_start: bool = False

    def __hash__(self) -> int:
        return hash((self.name, str(self.described())))

    def first_rate(self, task: Task) -> float:
        """The rate where tuning begins on this problem."""
        return self.lr_pixels if self.lr_pixels and task.likelihood in ("bernoulli", "elbo") else self.lr

    def variants(self) -> list[Method]:
        """The method with every combination of the settings that are tuned."""
        names = list(self.tuned)
        return [
            replace(self, settings={**self.settings, **dict(zip(names, values, strict=True))})
            for values in itertools.product(*self.tuned.values())
        ]

    def build(self, model: nn.Module, lr: float, task: Task) -> Any:
        """An optimizer that `kfqn_core.lab.training.train` can drive: `step(closure)`, `zero_grad`, `param_groups`."""
        if self.constructor is KFAC:
            return KFAC(model, lr, task.likelihood, **self.settings)
        return self.constructor(model, lr, **self.settings)

    def described(self) -> dict[str, Any]:
        """What is recorded of a method: readable, and equal for equal methods.

        Of KFQN all options, so that results of an earlier default are not taken for those of the present one.
        """
        settings = {**DEFAULTS, **self.settings} if self.constructor is KFQN else self.settings
        if settings.get("step_length") == "normalised_rows":
            settings = {
                **settings,
                "row": length.ROW,
                "deep": length.DEEP,
                "thin": length.THIN,
                "kept": steadiness.KEPT,
                "steady": "mean length",
            }
        if self.constructor is KFQN and settings["refresh"] is None:
            settings = {**settings, "growth": INTERVAL_GROWTH}
        settings = {key: value for key, value in settings.items() if value or key not in YOUNGER}
        if settings.get("activation_factor") == "auto":
            settings = {**settings, "start": "shrunk"}  # matrices from a first A that is shrunk to its diagonal
        return {key: value if isinstance(value, int | float | str | None) else str(value)
                for key, value in sorted(settings.items()) if key != "lr"}  # fmt: skip


def from_parameters(optimizer: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """A constructor that takes a model in place of parameters."""

    def build(model: nn.Module, lr: float, **settings: Any) -> torch.optim.Optimizer:
        return optimizer(model.parameters(), lr=lr, **settings)

    return build


class MuonAndAdam:
    """`torch.optim.Muon` for weights, Adam at the same learning rate for everything else.

    Muon takes matrices only. A convolution's weight is handed to it as `[d_out, channels * kernel]`, as Muon's authors
    do: a parameter that shares the weight's memory, whose gradient is pointed at the weight's before each step.

    Args:
        model: any.
        lr: of both parts.
        bfloat16: multiply in bfloat16, as torch does it; else in the dtype of the gradient, which is faster on a CPU.
        settings: of Muon.
    """

    def __init__(self, model: nn.Module, lr: float, bfloat16: bool = False, **settings: Any):
        weights = [p for p in model.parameters() if p.ndim >= 2]
        self._matrices = [(nn.Parameter(p.detach().flatten(1)), p) for p in weights]
        muon = torch.optim.Muon([matrix for matrix, _ in self._matrices], lr=lr, **settings)
        others = [p for p in model.parameters() if p.ndim < 2]
        on_gpu = any(p.is_cuda for p in others)
        adam = torch.optim.Adam(others, lr=lr, fused=True, capturable=on_gpu)  # its step may become a CUDA graph
        self._model, self._optimizers, self._bfloat16 = model, (muon, adam), bfloat16
        self.param_groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {p: state for optimizer in self._optimizers for p, state in optimizer.state.items()}

    def zero_grad(self) -> None:
        self._model.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        loss = closure()
        for matrix, weight in self._matrices:
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        as_it_is = {} if self._bfloat16 else {"_zeropower_via_newtonschulz": orthogonalised}
        with mock.patch.multiple("torch.optim._muon", **as_it_is) if as_it_is else contextlib.nullcontext():
            for optimizer in self._optimizers:
                optimizer.step()
        return loss


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's Newton-Schulz iteration, `X <- a X + b (X X^T) X + c (X X^T)^2 X`, in the dtype of `matrix` `[m, n]`.

    For singular values between 0 and 1 it brings all of them near 1 (Jordan 2024).
    """
    a, b, c = coefficients
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    X = wide / wide.norm().clamp_min(eps)
    for _ in range(steps):
        gram = X @ X.mT
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if matrix.shape[0] > matrix.shape[1] else X


def muon(model: nn.Module, lr: float) -> MuonAndAdam:
    """Muon as it is fastest where the model lies: in bfloat16 on a GPU, in float32 on a CPU."""
    method = METHODS["muon-bfloat16" if next(model.parameters()).is_cuda else "muon"]
    return method.constructor(model, lr, **method.settings)


def state_bytes(optimizer: Any) -> int:
    """Bytes that an optimizer holds between steps beside parameters and gradients, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(optimizer.state, set())}
    own = {p.untyped_storage().data_ptr() for group in optimizer.param_groups for p in group["params"]}
    return sum(size for address, size in storages.items() if address not in own)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor below `value`, through containers and through a package's own objects."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry, seen)
    elif isinstance(value, list | tuple | set):
        for entry in value:
            yield from _tensors(entry, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value), seen)


NORMALISED = 0.03  # steps whose length is that of the rate, whatever the gradient
RAW = 0.1


def _peer(name: str, label: str, optimizer: type[torch.optim.Optimizer], lr: float, **settings: Any) -> Method:
    return Method(name, label, from_parameters(optimizer), lr, "pytorch_optimizer", settings, period=EVERY)


def _kfqn(name: str, label: str, **options: Any) -> Method:
    """A configuration of `KFQN` with its normalised step. More are added here, each one line."""
    period = options.get("refresh", 1)
    return Method(name, label, KFQN, NORMALISED, "kfqn-core", options, period=period)


def _published(name: str, label: str, options: Mapping[str, Any], warm_start: bool) -> tuple[Method, Method]:
    """A preset as published, and refreshed every five steps."""
    return (
        Method(name, label, KFQN, RAW, "kfqn-core", options, warm_start=warm_start),
        Method(
            f"{name}-5", f"{label}, refresh 5", KFQN, RAW, "kfqn-core",
            {**options, "refresh": 5}, period=5, warm_start=warm_start,
        ),
    )  # fmt: skip


# The scale of Adam's step, so that one learning rate fits both parts.
_MUON = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
_NO_CLIP = 1e30

_ALL = (
    Method("kfqn", "KFQN", KFQN, NORMALISED, "kfqn-core", default_lr=0.03),
    _kfqn("kfqn-1", "KFQN, refresh 1", refresh=1),
    _kfqn("kfqn-5", "KFQN, refresh 5", refresh=5),
    _kfqn("kfqn-dense", "KFQN, dense", activation_factor="action"),
    _kfqn("kfqn-low-rank", "KFQN, low rank", activation_factor="low_rank"),
    _kfqn("kfqn-exact", "KFQN, exact inverse", activation_factor="inverse"),
    _kfqn("kfqn-layers", "KFQN, layers normalised", step_length="normalised"),
    _kfqn("kfqn-next-batch", "KFQN, H_g from the next batch", pairs="next_batch"),
    _kfqn("kfqn-second-pass", "KFQN, H_g by second pass", pairs="second_pass"),
    *_published("kbfgs", "K-BFGS 2020", presets.KBFGS_2020, warm_start=True),
    *_published("kbfgs-l", "K-BFGS(L) 2020", presets.KBFGS_L_2020, warm_start=True),
    *_published("kfqn-2021", "KF-QN-CNN 2021", presets.KFQN_CNN_2021, warm_start=False),
    *_published("kfqn-2022", "KF-QN 2022", presets.KFQN_2022, warm_start=False),
    # M (A + lambda I)^-1 without a length: of a running A inverted now and then (Benzing 2022), and of every
    # mini-batch's own (Petersen et al. 2023).
    Method(
        "foof", "FOOF", KFQN, RAW, "kfqn-core",
        {"activation_factor": "inverse", "activation_decay": 0.95, "step_length": "raw", "refresh": EVERY},
        tuned={"damping": (0.01, 0.1, 1.0)}, period=EVERY,
    ),
    Method(
        "isaac", "ISAAC", KFQN, RAW, "kfqn-core",
        {"activation_factor": "inverse", "step_length": "raw", "refresh": 1}, tuned={"damping": (0.01, 0.1, 1.0)},
    ),
    Method(
        "sgd", "SGD with momentum", from_parameters(torch.optim.SGD), 0.1, "torch",
        {"momentum": 0.9, "fused": True}, lr_pixels=0.003,
    ),
    Method("adam", "Adam", from_parameters(torch.optim.Adam), 0.003, "torch", {"fused": True}),
    Method("muon", "Muon", MuonAndAdam, NORMALISED, "torch", _MUON),
    Method("muon-bfloat16", "Muon", MuonAndAdam, NORMALISED, "torch", {**_MUON, "bfloat16": True}),
    _peer("soap", "SOAP", SOAP, 0.01, weight_decay=0.0, precondition_frequency=EVERY),
    _peer(
        "shampoo", "Shampoo", ScalableShampoo, 0.003,
        preconditioning_compute_steps=EVERY, start_preconditioning_step=EVERY, graft_type=LayerWiseGrafting.RMSPROP,
    ),
    _peer("psgd", "PSGD Kron", Kron, 0.03, pre_conditioner_update_probability=1 / EVERY),
    Method(
        "kfac", "K-FAC", KFAC, RAW, "kfqn-core", {"every": EVERY},
        tuned={"damping": (0.003, 0.03, 0.3), "kl_clip": (1e-3, _NO_CLIP)}, period=EVERY,
    ),
)  # fmt: skip
METHODS = {method.name: method for method in _ALL}

"""The options of `KFQN`: which values there are, checked once, and when curvature is updated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from kfqn_core.layers import LayerView, LinearView

PAIRS = (None, "next_batch", "second_pass")
PAIR_DAMPINGS = ("double", "levenberg-marquardt")
DAMPING_SPLITS = ("even", "locations")
ACTIVATION_FACTORS = ("auto", "action", "low_rank", "diagonal", "inverse")
STEP_LENGTHS = ("raw", "normalised", "normalised_rows")
LINEAR_OPTIONS = frozenset({"activation_decay", "pair_damping"})  # in which the method of 2021 told layers apart
INTERVAL_GROWTH, LONGEST_INTERVAL = 10, 10  # steps after which the interval between updates grows by one, and its end


@dataclass(frozen=True)
class Options:
    """What the method is, for all layers alike.

    Args:
        pairs: `None` leaves `H_g` the identity; `"second_pass"` measures its secant pair on the same mini-batch, after
            the step; `"next_batch"` takes the difference of consecutive mini-batches instead, which costs nothing and
            is noisy (chapter 2).
        damping: lambda. Without pairs `A` carries it all, `lambda_A = lambda`; with pairs it is split.
        damping_split: `"even"`, `lambda_A = lambda_G = sqrt(lambda)` (2020); or `"locations"`,
            `lambda_A = sqrt(lambda T)` and `lambda_G = sqrt(lambda / T)` for a layer with T locations (2022).
        pair_damping: how a pair is made safe: `"double"`, Powell on `H_g`, then on the identity (2020; needs
            `lambda_G < 1`), or `"levenberg-marquardt"`, Powell on `H_g`, then `y + lambda_G s` (2021).
        activation_factor: how `H_a` is kept. `"action"`, a matrix, by Hessian action (the papers); `"low_rank"`, as a
            diagonal and `rank` directions; `"diagonal"`; `"auto"`, what of these keeps the state at most as large as
            Adam's, from at most 4096 input vectors of a mini-batch (`selection.activation_factors`), matrices from a
            first `A` that is shrunk to its diagonal (`activation.towards_diagonal`); `"inverse"`,
            a matrix inverted at every update, the slow reference.
        rank: directions of a low-rank `H_a`.
        activation_decay: weight of the past in the running average of `A`; `None` takes the action of `A` from the
            current mini-batch and keeps no `A`.
        memory: pairs kept by a limited-memory `H_g` (K-BFGS(L)); `None` keeps a dense `H_g`.
        pair_momentum: weight of the past in the running average of the secant pairs. Use 0 with full-batch gradients.
        mu1: Powell's constant for `H_g`, in (0, 1).
        refresh: curvature is updated every `refresh` steps. `None` begins with every step, where curvature changes
            fastest, and grows the interval to ten steps (`refreshes`). Layers that such a step does not reach follow in
            the next that does (`Plan.due`). Only steps that update something pay for a second pass.
        step_length: `"raw"` moves layers by `lr D`, and other parameters by `lr` times their averaged gradient (the
            papers); `"normalised"` moves layers by `lr 0.2 sqrt(numel D) / ||D||_F D`, and others by Adam;
            `"normalised_rows"` gives each row of D, that is the weights of each output unit, the length `3 lr`,
            shorter where the gradient is mostly noise while the rate stands (`steadiness`), in layers with more than
            eight inputs for each output, and in networks of more than twelve layers (`length`).
        safeguard: take a step back after which the loss of its mini-batch is larger, or not finite, and after
            two in a row halve the next, until one lowers it. Only
            `pairs="second_pass"` knows that loss, and for nothing; the closure must return it. Costs a copy of the
            parameters while a step is taken.
        owners: of several processes each keeps and updates the factors of its own layers alone, and sends the others in
            every step what they need of them (`parallel.owners`); `state_dict` must then be called on every rank.
        linear: options that differ for fully connected layers, by name: any of `activation_decay`, `pair_damping`.

    Raises:
        ValueError: for a value out of range or in contradiction to another.
    """

    pairs: str | None = None
    damping: float = 0.03
    damping_split: str = "even"
    pair_damping: str = "double"
    activation_factor: str = "auto"
    rank: int = 16
    activation_decay: float | None = None
    memory: int | None = None
    pair_momentum: float = 0.9
    mu1: float = 0.2
    refresh: int | None = None
    step_length: str = "normalised_rows"
    safeguard: bool = False
    owners: bool = False
    linear: tuple[tuple[str, Any], ...] | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        linear = dict(self.linear or {})
        unknown = set(linear) - LINEAR_OPTIONS
        if unknown:
            raise ValueError(
                f"linear takes {sorted(LINEAR_OPTIONS)}, got {sorted(unknown)}: give the others for all layers"
            )
        object.__setattr__(self, "linear", tuple(sorted(linear.items())))
        known: dict[str, tuple[str | None, ...]] = {
            "pairs": PAIRS, "damping_split": DAMPING_SPLITS, "pair_damping": PAIR_DAMPINGS,
            "activation_factor": ACTIVATION_FACTORS, "step_length": STEP_LENGTHS,
        }  # fmt: skip
        for name, values in known.items():
            self._require(name, values.__contains__, f"one of {values}")
        self._require("damping", lambda value: is_number(value) and value > 0, "a number > 0")
        if self.pairs is None:
            self._require("memory", lambda value: value is None, "None unless H_g is estimated (give pairs)")
        elif self.pair_damping == "double":
            self._require("damping", lambda value: value < 1, "below 1: double damping of pairs needs lambda_G < 1")
        for name in ("safeguard", "owners"):
            self._require(name, lambda value: isinstance(value, bool), "True or False")
        if self.safeguard:
            self._require("pairs", lambda value: value == "second_pass", '"second_pass" with safeguard')
        self._require("rank", _is_natural, "a whole number >= 1")
        self._require("memory", lambda value: value is None or _is_natural(value), "None or a whole number >= 1")
        self._require("refresh", lambda value: value is None or _is_natural(value), "None or a whole number >= 1")
        self._require("mu1", lambda value: is_number(value) and 0 < value < 1, "a number in (0, 1)")
        self._require("pair_momentum", is_fraction, "a number in [0, 1)")
        self._require("activation_decay", lambda v: v is None or is_fraction(v), "None or a number in [0, 1)")
        if linear:
            replace(self, linear=None, **linear)  # checks them

    def _require(self, name: str, accepts: Callable[[Any], bool], expected: str) -> None:
        require(name, getattr(self, name), accepts, expected)

    @classmethod
    def of_keywords(cls, keywords: Mapping[str, Any]) -> Options:
        """Options from keywords. TypeError, with those there are, for an unknown one."""
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(keywords) - set(names))
        if unknown:
            raise TypeError(f"KFQN has no option {', '.join(map(repr, unknown))}; those of the method are {names}")
        return cls(**keywords)

    def of(self, view: LayerView) -> Options:
        """The options of a layer of this kind."""
        linear = dict(self.linear or ())
        return replace(self, linear=None, **linear) if isinstance(view, LinearView) else replace(self, linear=None)

    @property
    def split(self) -> bool:
        """Whether damping depends on T."""
        return self.pairs is not None and self.damping_split == "locations"

    def lambdas(self, T: float) -> tuple[float, float]:
        """lambda -> lambda_A, lambda_G for a layer with T locations.

        Without `H_g`, `A` carries it all. `"even"` gives each sqrt(lambda); `"locations"` gives sqrt(lambda T) to `A`,
        which sums over locations, and sqrt(lambda / T) to `G`, which averages (2022; what this does when T changes is
        in chapter 9). The product is lambda in both.
        """
        if self.pairs is None:
            return self.damping, 1.0
        T = T if self.split else 1.0
        return math.sqrt(self.damping * T), math.sqrt(self.damping / T)


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a value of a parameter group that is out of range."""
    for name in ("lr", "fallback_lr"):  # or a tensor with one
        require(name, group[name], _is_rate, "a number >= 0")
    require("weight_decay", group["weight_decay"], lambda value: is_number(value) and value >= 0, "a number >= 0")
    require("momentum", group["momentum"], is_fraction, "a number in [0, 1)")
    require("eps", group["eps"], lambda value: is_number(value) and value >= 0, "a number >= 0")
    betas = group["betas"]
    require("betas", betas, lambda v: isinstance(v, tuple | list) and len(v) == 2 and all(map(is_fraction, v)),
            "two numbers in [0, 1)")  # fmt: skip
    for name in ("curvature", "decoupled_weight_decay"):
        require(name, group[name], lambda value: isinstance(value, bool), "True or False")


def require(name: str, value: Any, accepts: Callable[[Any], bool], expected: str) -> None:
    """Raise ValueError, with the name, what was expected and the value, unless `accepts(value)`."""
    if not accepts(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def is_number(value: Any) -> bool:
    """A finite one, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_fraction(value: Any) -> bool:
    """In [0, 1)."""
    return is_number(value) and 0 <= value < 1


def _is_natural(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_rate(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else is_number(value) and value >= 0


def refreshes(step: int, refresh: int | None) -> bool:
    """Whether curvature is updated at `step` (from 0): every `refresh` steps.

    For `None` the interval is one step for the first ten, two for the next ten, and so on up to ten: early updates were
    found to be worth their cost, and one in ten steps to be enough later (benchmarks/NOTES.md).
    """
    interval = min(LONGEST_INTERVAL, 1 + step // INTERVAL_GROWTH) if refresh is None else refresh
    return step % interval == 0

"""The options of `KFQN`: which values there are, and when curvature is updated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PAIRS = (None, "next_batch", "second_pass")
PAIR_DAMPINGS = ("double", "levenberg-marquardt")
DAMPING_SPLITS = ("even", "locations")
ACTIVATION_FACTORS = ("auto", "action", "low_rank", "inverse")
STEP_LENGTHS = ("raw", "normalised", "normalised_rows")
LINEAR_OPTIONS = frozenset({"activation_decay", "pair_damping"})  # in which the method of 2021 told layers apart
INTERVAL_GROWTH, LONGEST_INTERVAL = 25, 10  # steps after which the interval between updates grows by one, and its end


def check_options(**options: Any) -> None:
    """Raise ValueError for a value out of range or in contradiction to another; `options` are those of `KFQN`."""

    def number(name: str) -> bool:
        value = options[name]
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def natural(name: str) -> bool:
        return isinstance(options[name], int) and not isinstance(options[name], bool) and options[name] >= 1

    def require(name: str, accepted: bool, expected: str) -> None:
        if not accepted:
            raise ValueError(f"{name} must be {expected}, got {options[name]!r}")

    require("lr", number("lr") and options["lr"] >= 0, "a number >= 0")
    require("pairs", options["pairs"] in PAIRS, f"one of {PAIRS}")
    require("damping", number("damping") and options["damping"] > 0, "a number > 0")
    require("damping_split", options["damping_split"] in DAMPING_SPLITS, f"one of {DAMPING_SPLITS}")
    require("pair_damping", options["pair_damping"] in PAIR_DAMPINGS, f"one of {PAIR_DAMPINGS}")
    if options["pairs"] is None:
        require("memory", options["memory"] is None, "None unless H_g is estimated (give pairs)")
    elif options["pair_damping"] == "double":
        require("damping", options["damping"] < 1, "below 1: double damping of pairs needs lambda_G < 1")
    require("activation_factor", options["activation_factor"] in ACTIVATION_FACTORS, f"one of {ACTIVATION_FACTORS}")
    require("rank", natural("rank"), "a whole number >= 1")
    require("memory", options["memory"] is None or natural("memory"), "None or a whole number >= 1")
    require("mu1", number("mu1") and 0 < options["mu1"] < 1, "a number in (0, 1)")
    for name in ("momentum", "pair_momentum"):
        require(name, number(name) and 0 <= options[name] < 1, "a number in [0, 1)")
    name = "activation_decay"
    require(name, options[name] is None or (number(name) and 0 <= options[name] < 1), "None or a number in [0, 1)")
    require("weight_decay", number("weight_decay") and options["weight_decay"] >= 0, "a number >= 0")
    require("refresh", options["refresh"] is None or natural("refresh"), "None or a whole number >= 1")
    require("step_length", options["step_length"] in STEP_LENGTHS, f"one of {STEP_LENGTHS}")


def of_linear_layers(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `linear` of `KFQN` as a dict. ValueError for an option that cannot differ between kinds of layers."""
    unknown = set(options or {}) - LINEAR_OPTIONS
    if unknown:
        raise ValueError(
            f"linear takes {sorted(LINEAR_OPTIONS)}, got {sorted(unknown)}: give the others for all layers"
        )
    return dict(options or {})


def refreshes(step: int, refresh: int | None) -> bool:
    """Whether curvature is updated at `step` (from 0): every `refresh` steps.

    For `None` the interval is one step for the first 25, two for the next 25, and so on up to ten: early updates were
    found to be worth their cost, and one in ten steps to be enough later (benchmarks/NOTES.md).
    """
    interval = min(LONGEST_INTERVAL, 1 + step // INTERVAL_GROWTH) if refresh is None else refresh
    return step % interval == 0

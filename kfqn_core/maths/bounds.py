"""What is guaranteed, as numbers: of damped pairs, of the eigenvalues of an updated `H`, and of a stochastic iteration.

The first half bounds three ratios of a damped pair, and what those imply for `H` (derived in chapter 7); bounds are
numbers or tensors, as their arguments are. The second half is the theorem of chapter 10 about the iteration
`theta <- theta - alpha_k H_k g_k`: the objective is bounded below and its gradient has the Lipschitz constant `L`;
`g_k` is unbiased with variance at most `variance`, sigma^2 / m for a mini-batch of m; `H_k` was fixed before the
mini-batch was drawn and has its eigenvalues in `[low, high]`. Training needs nothing of this room.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kfqn_core.maths.damping import check_vectors

Number = Tensor | float


class Ratios(NamedTuple):
    """`r1 = |s|^2 / s'y`, `r2 = y'Hy / s'y`, `r3 = |y|^2 / s'y`: of a pair, or upper bounds of them."""

    r1: Number
    r2: Number
    r3: Number


def pair_ratios(H_y: Tensor, s: Tensor, y: Tensor) -> Ratios:
    """The three ratios of pairs `[..., n]` with `s'y > 0`, each `[...]`; `H_y` is `H y`.

    Raises TypeError/ValueError for vectors that do not fit together. Source: derived in chapter 7.
    """
    check_vectors(H_y=H_y, s=s, y=y)
    sy = (s * y).sum(-1)
    return Ratios((s * s).sum(-1) / sy, (y * H_y).sum(-1) / sy, (y * y).sum(-1) / sy)


def powell_bounds(low: Number, mu1: float) -> Ratios:
    """Bounds after `powell_on_inverse`, for an `H` with smallest eigenvalue `low`. Nothing bounds `r1`.

    Source: derived in chapter 7.
    """
    return Ratios(math.inf, 1 / mu1, 1 / (low * mu1))


def double_damping_bounds(low: Number, high: Number, mu1: float, mu2: float) -> Ratios:
    """Bounds after `double_damping`, for an `H` with eigenvalues in `[low, high]`. Source: derived in chapter 7."""
    r2 = (mu1**-0.5 + (mu2 * high) ** 0.5) ** 2
    return Ratios(1 / mu2, r2, ((low * mu1) ** -0.5 + mu2**0.5) ** 2)


def levenberg_marquardt_bounds(low: Number, high: Number, mu1: float, mu2: float) -> Ratios:
    """Bounds after `powell_on_inverse` and then `levenberg_marquardt`, for an `H` with eigenvalues in `[low, high]`.

    Source: derived in chapter 7.
    """
    return Ratios(1 / mu2, 1 / mu1 + mu2 * high, 1 / (low * mu1) + mu2)


def update_bounds(low: Number, high: Number, ratios: Ratios) -> tuple[Number, Number]:
    """Lower and upper bound of the eigenvalues after one BFGS update of an `H` with eigenvalues in `[low, high]`.

    Source: derived in chapter 7.
    """
    r1, r2, r3 = ratios
    return 1 / (1 / low + r3), (high**0.5 + (r1 * r2) ** 0.5) ** 2 + r1


def cautious(s: Tensor, y: Tensor, c1: float, c2: float) -> Tensor:
    """Whether a pair `[..., n]` may enter a limited memory with provable bounds: `|s|^2 <= c1 s'y`, `|y|^2 <= c2 s'y`.

    Bool `[...]`; false for `s'y <= 0` and for NaN. Raises ValueError unless `c1 c2` is at least 1, since no pair passes
    otherwise, and TypeError/ValueError for vectors that do not fit together. Source: derived in chapter 7.
    """
    check_vectors(s=s, y=y)
    _check_cautious(c1, c2)
    sy = (s * y).sum(-1)
    return (sy > 0) & ((s * s).sum(-1) <= c1 * sy) & ((y * y).sum(-1) <= c2 * sy)


def limited_memory_bounds(gamma: float, memory: int, c1: float, c2: float) -> tuple[float, float]:
    """Bounds of the eigenvalues of a `LimitedMemoryInverse` all of whose pairs passed `cautious(s, y, c1, c2)`.

    Raises ValueError unless `gamma` is positive and finite, `memory` a positive integer, and `c1 c2` at least 1.
    Source: derived in chapter 7.
    """
    _check_positive(gamma=gamma)
    _check_cautious(c1, c2)
    if not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory must be a positive integer, got {memory!r}: the number of pairs that are kept")
    high = gamma
    for _ in range(memory):
        high = c1 * c2 * high + c1  # r1 r3 |H| + r1, the second bound of one update
    return 1 / (1 / gamma + memory * c2), high


def permitted_step(L: float, high: float) -> float:
    """The longest step length that the theorem covers, `1 / (L high)`.

    Raises ValueError unless both are positive and finite. Source: derived in chapter 10.
    """
    _check_positive(L=L, high=high)
    return 1 / (L * high)


def gradient_bound(steps: Sequence[float], *, gap: float, L: float, low: float, high: float, variance: float) -> float:
    """Upper bound of the mean of `E |grad f(theta_k)|^2`, each k weighted by its step length `alpha_k`.

    `steps` are the `alpha_k`, fixed in advance; `gap` is `f(theta_0)` minus a lower bound of f. The bound is
    `(2 gap + L high^2 variance sum alpha^2) / (low sum alpha)`. It holds for the smallest of the squared norms, too.

    Raises ValueError if there is no step, if one is not positive or longer than `permitted_step`, or if a constant is
    out of range. Source: derived in chapter 10.
    """
    _check_positive(L=L, low=low, high=high)
    if not (math.isfinite(gap) and gap >= 0 and math.isfinite(variance) and variance >= 0):
        raise ValueError(f"gap and variance must be finite and at least 0, got {gap!r} and {variance!r}")
    if low > high:
        raise ValueError(f"low must not exceed high, got {low!r} and {high!r}")
    longest = permitted_step(L, high)
    for alpha in steps:
        if not 0 < alpha <= longest * (1 + 1e-12):  # the caller may have divided in another order
            raise ValueError(
                f"step lengths must be positive and at most 1 / (L high) = {longest:.6g}, got {alpha!r}; "
                "of longer steps the theorem says nothing"
            )
    if not steps:
        raise ValueError("steps must hold at least one step length")
    total, squares = math.fsum(steps), math.fsum(alpha * alpha for alpha in steps)
    return (2 * gap + L * high**2 * variance * squares) / (low * total)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _check_cautious(c1: float, c2: float) -> None:
    if not (c1 > 0 and c2 > 0 and c1 * c2 >= 1):
        raise ValueError(
            f"c1 and c2 must be positive with c1 c2 >= 1, got {c1!r} and {c2!r}: |s|^2 |y|^2 >= (s'y)^2, so no pair "
            "would pass; raise c2"
        )

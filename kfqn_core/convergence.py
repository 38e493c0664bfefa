"""What the stochastic quasi-Newton theorem permits and promises, as numbers (derived in chapter 10).

The iteration is `theta <- theta - alpha_k H_k g_k`. The objective is bounded below and its gradient has the Lipschitz
constant `L`; `g_k` is unbiased with variance at most `variance`, sigma^2 / m for a mini-batch of m; `H_k` was fixed
before the mini-batch was drawn and has its eigenvalues in `[low, high]`. Everything here is a Python number.
"""

import math
from collections.abc import Sequence


def permitted_step(L: float, high: float) -> float:
    """The longest step length that the theorem covers, `1 / (L high)`.

    Raises ValueError unless both are positive and finite.
    """
    _check_positive(L=L, high=high)
    return 1 / (L * high)


def gradient_bound(steps: Sequence[float], *, gap: float, L: float, low: float, high: float, variance: float) -> float:
    """Upper bound of the mean of `E |grad f(theta_k)|^2`, each k weighted by its step length `alpha_k`.

    `steps` are the `alpha_k`, fixed in advance; `gap` is `f(theta_0)` minus a lower bound of f. The bound is
    `(2 gap + L high^2 variance sum alpha^2) / (low sum alpha)`. It holds for the smallest of the squared norms, too.

    Raises ValueError if there is no step, if one is not positive or longer than `permitted_step`, or if a constant is
    out of range.
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

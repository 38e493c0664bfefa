"""The convergence bound against quadratics, whose expectations follow an exact recursion for the second moments."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfqn_core.maths.bounds import gradient_bound, permitted_step
from tests.test_damping import eigenrange, fractions, instance, recorded, seeds, sizes


@recorded
@given(sizes, st.integers(1, 30), st.floats(0.0, 10.0), fractions, seeds)
def test_bound_holds_for_quadratics_with_noise(achieved, n, steps, noise, fraction, seed):
    """f = theta' B theta / 2, gradients with independent noise: P = E[theta theta'] obeys a linear recursion."""
    H, theta, _ = instance(n, seed)
    B, _, _ = instance(n, seed + 1)
    (low, high), L = eigenrange(H), eigenrange(B)[1]
    generator = torch.Generator().manual_seed(seed)
    alphas = [
        permitted_step(L, high) * (fraction + (1 - fraction) * u)
        for u in torch.rand(steps, generator=generator).tolist()
    ]
    covariance = noise * instance(n, seed + 2)[0]
    variance = covariance.trace().item()
    P, weighted = torch.outer(theta, theta), 0.0
    gap = ((P * B).sum() / 2).item()
    for alpha in alphas:
        before, squared = (P * B).sum() / 2, (B @ P @ B).trace()
        weighted += alpha * squared.item()
        step = torch.eye(n, dtype=torch.float64) - alpha * H @ B
        P = step @ P @ step.T + alpha**2 * H @ covariance @ H
        growth = L * alpha**2 * high**2 * variance / 2
        achieved("one step", (P * B).sum() / 2 + alpha * low / 2 * squared, before + growth)
    bound = gradient_bound(alphas, gap=gap, L=L, low=low, high=high, variance=variance)
    achieved("weighted mean", weighted / sum(alphas), bound)


@pytest.mark.parametrize(("L", "kappa"), [(3.0, 0.5), (0.1, 20.0)])
def test_bound_is_attained_by_one_newton_step(L, kappa):
    """f = L theta^2 / 2 with H = kappa: the permitted step lands on the minimum, and nothing is given away."""
    alpha, theta = permitted_step(L, kappa), 1.7
    assert theta - alpha * kappa * L * theta == pytest.approx(0, abs=1e-15)
    bound = gradient_bound([alpha], gap=L * theta**2 / 2, L=L, low=kappa, high=kappa, variance=0.0)
    assert bound == pytest.approx((L * theta) ** 2, rel=1e-14)


def test_what_the_theorem_does_not_cover_is_refused():
    constants = {"gap": 1.0, "L": 2.0, "low": 0.1, "high": 5.0, "variance": 1.0}
    assert gradient_bound([0.1], **constants) > 0
    for steps in ([0.1, 0.11], [0.1, 0.0], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match=r"at most 1 / \(L high\) = 0.1"):
            gradient_bound(steps, **constants)
    with pytest.raises(ValueError, match="at least one"):
        gradient_bound([], **constants)
    for change in ({"L": 0.0}, {"low": -1.0}, {"low": 6.0}, {"gap": -1.0}, {"variance": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(change))):
            gradient_bound([0.1], **{**constants, **change})
    with pytest.raises(ValueError, match="L must be positive"):
        permitted_step(float("inf"), 1.0)


@recorded
@given(sizes, st.floats(0.0, 10.0), fractions, seeds)
def test_bound_in_the_metric_of_the_estimate(achieved, n, noise, fraction, seed):
    """One step where the Hessian B is at most ell H^-1: `permitted_step(ell, 1)` serves, however large L |H| is."""
    H, theta, _ = instance(n, seed)
    B, _, _ = instance(n, seed + 1)
    ell = torch.linalg.eigvals(H @ B).real.max().item()
    alpha = fraction * permitted_step(ell, 1.0)
    assert permitted_step(eigenrange(B)[1], eigenrange(H)[1]) <= permitted_step(ell, 1.0) * (1 + 1e-9)
    covariance = noise * instance(n, seed + 2)[0]
    after = theta - alpha * H @ B @ theta
    expected = (after @ B @ after + alpha**2 * (B @ H @ covariance @ H).trace()) / 2
    slope = theta @ B @ H @ B @ theta
    growth = ell * eigenrange(H)[1] * covariance.trace() * alpha**2 / 2
    achieved("one step", expected + alpha / 2 * slope, theta @ B @ theta / 2 + growth)

"""What the eigenvalue bounds say about many updates: growth without limit, and what a limited memory repairs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfqn_core.maths.bounds import (
    Ratios,
    cautious,
    double_damping_bounds,
    levenberg_marquardt_bounds,
    limited_memory_bounds,
    pair_ratios,
    update_bounds,
)
from kfqn_core.maths.damping import double_damping, levenberg_marquardt, powell_on_inverse
from kfqn_core.maths.secant import LimitedMemoryInverse, bfgs_inverse_update
from tests.test_damping import EIGENVALUE_ERROR, eigenrange, fractions, instance, recorded, seeds, sizes

MU1, MU2 = 0.2, 0.1


@recorded
@given(sizes, seeds)
def test_update_bounds_hold_for_every_pair_of_positive_curvature(achieved, n, seed):
    H, s, y = instance(n, seed)
    y = y * torch.sign(s @ y)
    low, high = eigenrange(H)
    measured = pair_ratios(H @ y, s, y)
    for ratio, vectors in zip(measured, ((s, s), (y, H @ y), (y, y)), strict=True):
        assert ratio == pytest.approx(((vectors[0] @ vectors[1]) / (s @ y)).item(), rel=1e-12)
    low_bound, high_bound = update_bounds(low, high, measured)
    new_low, new_high = eigenrange(bfgs_inverse_update(H, s, y))
    achieved("lambda_max", new_high, high_bound)
    achieved("1 / lambda_min", low_bound, new_low + EIGENVALUE_ERROR * n * new_high)


def test_update_bounds_are_attained_where_the_pair_is_aligned():
    """In one dimension H+ = s/y = r1, which the lower bound 1/(B + r3) misses by B alone; numbers give numbers."""
    low, high = update_bounds(2.0, 2.0, Ratios(4.0, 0.0, 0.0))
    assert (low, high) == (2.0, 6.0)


@recorded
@given(sizes, fractions, fractions, seeds)
def test_two_over_mu1_bounds_r2_while_the_estimate_is_small(achieved, n, mu1, mu2, seed):
    """The diagnostic of the authors' public code, r2 <= 2/mu1: it holds for |H| <= (sqrt 2 - 1)^2 / (mu1 mu2)."""
    H, s, y = instance(n, seed)
    limit = (math.sqrt(2) - 1) ** 2 / (mu1 * mu2)
    H = H * min(1.0, limit / eigenrange(H)[1])
    s, y = double_damping(H @ y, s, y, mu1, mu2)
    achieved("r2", pair_ratios(H @ y, s, y).r2, 2 / mu1)


def hill_climb(damp, updates):
    """lambda_max(H) after each update, the pair being the best of a random search that narrows around its best find."""
    generator = torch.Generator().manual_seed(0)
    n, H, history = 3, torch.eye(3, dtype=torch.float64), []
    for _ in range(updates):
        best, reached, scale = torch.randn(2, n, generator=generator, dtype=torch.float64), 0.0, 1.0
        for _ in range(40):
            noise = torch.randn(100, 2, n, generator=generator, dtype=torch.float64)
            lengths = best.norm(dim=-1, keepdim=True)
            trials = torch.cat([best[None], best + scale * lengths * noise])
            s, y = trials.unbind(1)
            damped = damp((H @ y.unsqueeze(-1)).squeeze(-1), s, y)
            high = torch.linalg.eigvalsh(bfgs_inverse_update(H.expand(len(s), n, n), *damped))[:, -1]
            scale *= 0.8 if high.max() <= reached * 1.001 else 1.0
            reached, best = high.max().item(), trials[high.argmax()]
        s, y = damp(H @ best[1], *best)
        H = bfgs_inverse_update(H, s, y)
        history.append(reached)
    return history


def powell_then_levenberg_marquardt(H_y, s, y):
    return levenberg_marquardt(*powell_on_inverse(H_y, s, y, MU1), MU2)


@pytest.mark.parametrize(
    ("damp", "bounds", "growth"),
    [
        (lambda H_y, s, y: double_damping(H_y, s, y, MU1, MU2), double_damping_bounds, 15),
        (powell_then_levenberg_marquardt, levenberg_marquardt_bounds, 5),
    ],
)
def test_an_adversary_drives_a_damped_estimate_up(damp, bounds, growth, achieved):
    """One update obeys its bound; twelve in a row multiply lambda_max, far above the 1/mu2 of a single pair."""
    history = hill_climb(damp, updates=12)
    previous = 1.0
    for high in history:
        achieved("lambda_max", high, update_bounds(1e-300, previous, bounds(1e-300, previous, MU1, MU2))[1])
        assert high > previous
        previous = high
    assert history[-1] > growth * history[0]
    assert history[-1] > 5 / MU2


@recorded
@given(sizes, st.integers(1, 5), st.floats(0.1, 3), st.floats(1.0, 10.0), st.floats(1.01, 4.0), seeds)
def test_limited_memory_with_a_cautious_test_is_bounded(achieved, n, memory, gamma, c1, slack, seed):
    """Whatever pairs come, in a window that slides."""
    c2 = slack / c1
    limited = LimitedMemoryInverse(n, memory, gamma, dtype=torch.float64)
    low_bound, high_bound = limited_memory_bounds(gamma, memory, c1, c2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3 * memory):
        # Pairs just inside and just outside the test: y at the angle that c1 c2 allows, or a little beyond.
        s, z = torch.randn(2, n, generator=generator, dtype=torch.float64)
        across = z - (s @ z) / (s @ s) * s
        width, stretch = torch.rand(2, generator=generator, dtype=torch.float64)
        tangent = 1.05 * width.sqrt() * (slack - 1) ** 0.5
        y = (s + tangent * s.norm() / across.norm().clamp_min(1e-9) * across) / c1 * (1 + 0.1 * stretch)
        keep = cautious(s, y, c1, c2)
        assert keep == ((s @ s <= c1 * (s @ y)) and (y @ y <= c2 * (s @ y)))
        limited.append(s, y, keep)
        H = limited.dense()
        low, high = eigenrange((H + H.T) / 2)
        achieved("lambda_max", high, high_bound)
        achieved("1 / lambda_min", low_bound, low + EIGENVALUE_ERROR * n * high_bound)


def test_double_damping_alone_does_not_bound_a_limited_memory():
    """One pair in memory: Powell's guarantee is about the estimate before the drop, and the pair sits on another."""
    limited, highest = LimitedMemoryInverse(2, 1, dtype=torch.float64), []
    for _ in range(12):
        H = limited.dense()
        values, Q = torch.linalg.eigh((H + H.T) / 2)
        # y almost along the smallest eigenvalue, as long as Powell's test for s'y = 1/mu2 allows; s at s'y = mu2 |s|^2.
        y = (1 / (MU1 * MU2 * values[0])).sqrt() * 0.9 * Q[:, 0]
        tilt = torch.asin(1 / y.norm())
        s = (tilt.sin() * Q[:, 0] + tilt.cos() * Q[:, 1]) / MU2
        s, y = double_damping(H @ y, s, y, MU1, MU2)
        limited.append(s, y)
        highest.append(eigenrange(limited.dense())[1])
    assert all(later > 2 * earlier for earlier, later in pairwise(highest))
    assert highest[-1] > 1e5


@recorded
@given(sizes, sizes, seeds)
def test_a_step_is_as_short_and_as_long_as_the_factors_allow(achieved, d_out, d_in, seed):
    """lmin(H_a) lmin(H_g) |M|^2 <= <M, H_g M H_a> and |H_g M H_a| <= lmax(H_a) lmax(H_g) |M|."""
    H_g, H_a = instance(d_out, seed)[0], instance(d_in, seed + 1)[0]
    M = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (low_g, high_g), (low_a, high_a) = eigenrange(H_g), eigenrange(H_a)
    D = H_g @ M @ H_a
    achieved("descent", low_a * low_g * M.square().sum(), (M * D).sum())
    achieved("length", D.norm(), high_a * high_g * M.norm())
    low, high = eigenrange(torch.kron(H_a, H_g))
    assert high == pytest.approx(high_a * high_g, rel=1e-12)
    assert low == pytest.approx(low_a * low_g, rel=1e-12, abs=1e-14 * d_in * d_out * high)


@pytest.mark.parametrize(("c1", "c2"), [(1.0, 0.5), (-1.0, -2.0), (2.0, float("nan"))])
def test_constants_that_no_pair_passes_are_refused(c1, c2):
    with pytest.raises(ValueError, match="c1 c2 >= 1"):
        limited_memory_bounds(1.0, 3, c1, c2)
    with pytest.raises(ValueError, match="c1 c2 >= 1"):
        cautious(torch.ones(2), torch.ones(2), c1, c2)


@pytest.mark.parametrize(
    ("gamma", "memory", "named"), [(0.0, 3, "gamma"), (-1.0, 3, "gamma"), (math.inf, 3, "gamma"), (1.0, 0, "memory")]
)
def test_a_memory_that_there_is_not_has_no_bounds(gamma, memory, named):
    with pytest.raises(ValueError, match=f"{named} must be"):
        limited_memory_bounds(gamma, memory, 1.0, 2.0)


@pytest.mark.parametrize(("curvature", "passes"), [(0.49, False), (0.51, True), (2.9, True), (3.1, False)])
def test_cautious_measures_both_vectors_by_their_product(curvature, passes):
    """|s|^2 <= 2 s'y and |y|^2 <= 3 s'y, in four dimensions: curvatures from 1/2 to 3."""
    s = torch.ones(4)
    assert cautious(s, curvature * s, 2.0, 3.0).item() == passes


def test_cautious_refuses_what_is_not_a_pair():
    s = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [math.nan, 1.0]])
    y = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert cautious(s, y, 2.0, 2.0).tolist() == [True, False, False, False]

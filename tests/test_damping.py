"""The dampings against their guarantees, over sizes, conditioning, scales and every kind of curvature, in float64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kfqn_core.maths.bounds import double_damping_bounds, levenberg_marquardt_bounds, powell_bounds, update_bounds
from kfqn_core.maths.damping import double_damping, levenberg_marquardt, powell_on_identity, powell_on_inverse
from kfqn_core.maths.secant import bfgs_inverse_update
from tests.conftest import SLACK

properties = settings(derandomize=True, deadline=None, database=None, max_examples=300)
# One report for all examples is what `achieved` is for.
recorded = settings(properties, suppress_health_check=[HealthCheck.function_scoped_fixture])
EIGENVALUE_ERROR = 1e-14  # of eigvalsh, relative to the largest eigenvalue and per dimension

sizes = st.integers(1, 6)
seeds = st.integers(0, 10**6)
fractions = st.floats(0.05, 0.95)


def instance(n, seed):
    """`H` with condition up to 1e3 and overall scale 1/10..10, and a pair of any curvature and lengths 1/10..10."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    H = (Q * 10 ** (3 * rand(n) - 1.5)) @ Q.T * 10 ** (2 * rand(1) - 1)
    s, y = torch.randn(2, n, generator=generator, dtype=torch.float64) * 10 ** (2 * rand(2, 1) - 1)
    return (H + H.T) / 2, s, y


def eigenrange(H):
    eigenvalues = torch.linalg.eigvalsh(H)
    return eigenvalues[0].item(), eigenvalues[-1].item()


def ratios(H, s, y):
    """r1 = |s|^2 / s^T y, r2 = y^T H y / s^T y, r3 = |y|^2 / s^T y."""
    return ((s @ s) / (s @ y)).item(), ((y @ H @ y) / (s @ y)).item(), ((y @ y) / (s @ y)).item()


@properties
@given(sizes, fractions, seeds)
def test_powell_on_inverse_reaches_its_fraction_or_keeps_s(n, mu1, seed):
    H, s, y = instance(n, seed)
    s_new, y_new = powell_on_inverse(H @ y, s, y, mu1)
    yHy = y @ H @ y
    assert torch.equal(y_new, y)
    if s @ y >= mu1 * yHy:
        assert torch.equal(s_new, s)
    else:
        # Equality, up to rounding of the products that s^T y is summed from.
        assert abs(s_new @ y - mu1 * yHy) < 1e-14 * (s_new.norm() + (H @ y).norm()) * y.norm()
        theta = (1 - mu1) * yHy / (yHy - s @ y)
        assert 0 < theta < 1
        torch.testing.assert_close(s_new, theta * s + (1 - theta) * (H @ y), rtol=1e-12, atol=1e-12 * s_new.norm())


@properties
@given(sizes, fractions, seeds)
def test_powell_on_identity_reaches_its_fraction_or_keeps_y(n, mu2, seed):
    _, s, y = instance(n, seed)
    s_new, y_new = powell_on_identity(s, y, mu2)
    ss = s @ s
    assert torch.equal(s_new, s)
    if s @ y >= mu2 * ss:
        assert torch.equal(y_new, y)
    else:
        assert abs(s @ y_new - mu2 * ss) < 1e-14 * (y_new.norm() + s.norm()) * s.norm()
        theta = (1 - mu2) * ss / (ss - s @ y)
        assert 0 < theta < 1
        torch.testing.assert_close(y_new, theta * y + (1 - theta) * s, rtol=1e-12, atol=1e-12 * y_new.norm())


@properties
@given(sizes, fractions, seeds)
def test_powell_sign_leaves_positive_curvature(n, mu1, seed):
    """With a minus between theta s and (1 - theta) H y, more than half of such pairs keep a negative curvature."""
    H, s, y = instance(n, seed)
    for pair in ((s, y), (s, -y)):
        s_new, y_new = powell_on_inverse(H @ pair[1], *pair, mu1)
        assert s_new @ y_new > 0
        assert s_new @ y_new > mu1 * (y @ H @ y) / SLACK


@recorded
@given(sizes, fractions, seeds)
def test_powell_on_inverse_bounds_the_update_from_below(achieved, n, mu1, seed):
    """r2 <= 1/mu1 and r3 <= |B|/mu1, hence lambda_min(H+) >= lambda_min(H) mu1/(1 + mu1)."""
    H, s, y = instance(n, seed)
    low, high = eigenrange(H)
    bounds = powell_bounds(low, mu1)
    assert bounds.r1 == math.inf
    assert update_bounds(low, high, bounds)[0] == pytest.approx(low * mu1 / (1 + mu1), rel=1e-12)
    s, y = powell_on_inverse(H @ y, s, y, mu1)
    _, r2, r3 = ratios(H, s, y)
    achieved("r2", r2, bounds.r2)
    achieved("r3", r3, bounds.r3)
    new_low, new_high = eigenrange(bfgs_inverse_update(H, s, y))
    achieved("1 / lambda_min", low * mu1 / (1 + mu1), new_low + EIGENVALUE_ERROR * n * new_high)


@recorded
@given(sizes, fractions, fractions, seeds)
def test_double_damping_bounds(achieved, n, mu1, mu2, seed):
    H, s, y = instance(n, seed)
    low, high = eigenrange(H)
    bounds = double_damping_bounds(low, high, mu1, mu2)
    s, y = double_damping(H @ y, s, y, mu1, mu2)
    for name, value, bound in zip(("r1", "r2", "r3"), ratios(H, s, y), bounds, strict=True):
        achieved(name, value, bound)
    new_low, new_high = eigenrange(bfgs_inverse_update(H, s, y))
    low_bound, high_bound = update_bounds(low, high, bounds)
    assert high_bound == pytest.approx((2 * math.sqrt(high) + 1 / math.sqrt(mu1 * mu2)) ** 2 + 1 / mu2, rel=1e-12)
    achieved("lambda_max", new_high, high_bound)
    achieved("1 / lambda_min", low_bound, new_low + EIGENVALUE_ERROR * n * new_high)


@properties
@given(sizes, fractions, fractions, seeds)
def test_double_damping_is_one_damping_after_the_other(n, mu1, mu2, seed):
    H, s, y = instance(n, seed)
    s_once, _ = powell_on_inverse(H @ y, s, y, mu1)
    expected = powell_on_identity(s_once, y, mu2)
    for actual, reference in zip(double_damping(H @ y, s, y, mu1, mu2), expected, strict=True):
        assert torch.equal(actual, reference)


@recorded
@given(sizes, fractions, st.floats(0.05, 20), seeds)
def test_levenberg_marquardt_after_powell_bounds(achieved, n, mu1, mu2, seed):
    """The bounds that the damping of the convolutional method rests on; mu2 may exceed 1."""
    H, s, y = instance(n, seed)
    low, high = eigenrange(H)
    bounds = levenberg_marquardt_bounds(low, high, mu1, mu2)
    s, y = levenberg_marquardt(*powell_on_inverse(H @ y, s, y, mu1), mu2)
    for name, value, bound in zip(("r1", "r2", "r3"), ratios(H, s, y), bounds, strict=True):
        achieved(name, value, bound)
    new_low, new_high = eigenrange(bfgs_inverse_update(H, s, y))
    low_bound, high_bound = update_bounds(low, high, bounds)
    assert low_bound == pytest.approx(1 / ((1 + 1 / mu1) / low + mu2), rel=1e-12)
    achieved("lambda_max", new_high, high_bound)
    achieved("1 / lambda_min", low_bound, new_low + EIGENVALUE_ERROR * n * new_high)


@properties
@given(sizes, fractions, fractions, seeds)
def test_second_theta_of_double_damping_stays_near_one(n, mu1, mu2, seed):
    """After Powell on H s'y is positive, so that theta2 = (1 - mu2) / (1 - s'y / |s|^2) is in [1 - mu2, 1]."""
    H, s, y = instance(n, seed)
    s, y = powell_on_inverse(H @ y, s, y, mu1)
    _, damped = powell_on_identity(s, y, mu2)
    across = y - (s @ y) / (s @ s) * s  # damped - theta y is a multiple of s
    if n > 1 and across.norm() > 1e-6 * y.norm():
        theta = (damped @ across) / (y @ across)
        assert (1 - mu2) / SLACK <= theta <= SLACK


def test_levenberg_marquardt_adds_mu2_to_the_curvature():
    _, s, y = instance(5, 0)
    s_new, y_new = levenberg_marquardt(s, y, 1.5)
    assert torch.equal(s_new, s)
    assert abs(s @ y_new - (s @ y + 1.5 * s @ s)) < 1e-14 * s.norm() * y_new.norm()


def test_very_negative_curvature_keeps_its_digits():
    """theta is 1e-12 here; computed as 1 - (1 - theta) it would keep four of its sixteen digits."""
    s, y = torch.tensor([-1e12], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    s_new, _ = powell_on_inverse(y, s, y, 0.2)
    assert abs(s_new.item() - 0.2) < 1e-15


ZERO, ONE = torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize("s", [ZERO, ONE, -ONE])
@pytest.mark.parametrize("y", [ZERO, ONE, -ONE])
def test_degenerate_pairs_give_no_nan(s, y):
    """Zero vectors (a dead layer), and s^T y equal to y^T H y and to |s|^2, where the formulas divide by zero."""
    for damped in (
        powell_on_inverse(y, s, y, 0.2),
        powell_on_identity(s, y, 0.2),
        double_damping(y, s, y, 0.2, 0.3),
        levenberg_marquardt(s, y, 0.3),
    ):
        assert all(t.isfinite().all() for t in damped)
    if not s.any() and not y.any():
        assert not any(t.any() for t in double_damping(y, s, y, 0.2, 0.3))


def test_batched_damping_is_the_loop():
    instances = [instance(4, seed) for seed in range(12)]
    H, s, y = (torch.stack(parts).reshape(3, 4, *parts[0].shape) for parts in zip(*instances, strict=True))
    H_y = (H @ y.unsqueeze(-1)).squeeze(-1)
    batched = double_damping(H_y, s, y, 0.2, 0.3)
    changed = [not torch.equal(new, old) for new, old in zip(batched[0].flatten(0, 1), s.flatten(0, 1), strict=True)]
    assert 0 < sum(changed) < 12  # both branches occur in one batch
    for i in range(3):
        for j in range(4):
            alone = double_damping(H_y[i, j], s[i, j], y[i, j], 0.2, 0.3)
            for whole, one in zip(batched, alone, strict=True):
                torch.testing.assert_close(whole[i, j], one, rtol=1e-13, atol=1e-13)


def test_no_tensor_is_read_on_the_host():
    with FakeTensorMode():  # holds shapes and no values: reading one raises
        s, y = double_damping(torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 5), 0.2, 0.3)
        s, y = levenberg_marquardt(s, y, 0.3)
        assert s.shape == y.shape == (2, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: powell_on_inverse(ONE, ONE, ONE, 1.0), ValueError, r"mu1 must be in \(0, 1\), got 1.0"),
        (lambda: powell_on_inverse(ONE, ONE, ONE, torch.tensor(0.2)), TypeError, "mu1 .* Tensor"),
        (lambda: powell_on_identity(ONE, ONE, 1.7), ValueError, "got 1.7; .* extrapolated .* levenberg_marquardt"),
        (lambda: powell_on_identity(ONE, ONE, float("nan")), ValueError, "got nan"),
        (lambda: double_damping(ONE, ONE, ONE, 0.2, 0.0), ValueError, "mu2 .* got 0.0"),
        (lambda: double_damping(ONE, ONE, ONE, -0.2, 0.5), ValueError, "mu1 .* got -0.2"),
        (lambda: levenberg_marquardt(ONE, ONE, 0.0), ValueError, "mu2 must be positive and finite, got 0.0"),
        (lambda: levenberg_marquardt(ONE, ONE, torch.tensor(1.0)), TypeError, "mu2 .* Tensor"),
        (lambda: powell_on_inverse(torch.ones(2), ONE, ONE, 0.2), ValueError, r"'H_y': \[2\], 's': \[3\]"),
        (lambda: powell_on_identity(ONE, ONE.double(), 0.2), TypeError, "float32.*float64"),
        (lambda: levenberg_marquardt(ONE.long(), ONE.long(), 0.2), TypeError, "int64"),
        (lambda: powell_on_inverse([1.0], ONE, ONE, 0.2), TypeError, r"H_y is a list; expected a tensor \[..., n\]"),
        (lambda: powell_on_identity(ONE, ONE.to("meta"), 0.2), TypeError, "s torch.float32 on cpu, y .* on meta"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()

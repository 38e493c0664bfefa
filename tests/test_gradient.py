"""`GradientFactor` against the formulas of chapter 7, and what must not reach it, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kfqn_core.estimate.gradient import GradientFactor
from kfqn_core.lab.checks import relative_error
from kfqn_core.layers import view
from tests.test_activation import F64, LIKE, TRUE, expected_update, properties, random_spd, seeds, sizes

DAMPINGS = ("double", "levenberg-marquardt")


def gradient_factor(d_out, groups, memory, pair_damping="double", damping=0.3, pair_momentum=0.9):
    return GradientFactor(
        view(nn.Conv1d(groups, groups * d_out, 1, groups=groups)), damping, memory, pair_damping=pair_damping,
        pair_momentum=pair_momentum, mu1=0.2, **LIKE,
    )  # fmt: skip


def damped_by_the_formulas(H, s, y, pair_damping, mu1, mu2):
    """D_P, then D_I or D_LM, of one pair, with branches."""
    if s @ y < mu1 * (y @ H @ y):
        theta = (1 - mu1) * (y @ H @ y) / (y @ H @ y - s @ y)
        s = theta * s + (1 - theta) * H @ y
    if pair_damping == "levenberg-marquardt":
        return s, y + mu2 * s
    if s @ y < mu2 * (s @ s):
        theta = (1 - mu2) * (s @ s) / (s @ s - s @ y)
        y = theta * y + (1 - theta) * s
    return s, y


@properties
@given(sizes, st.integers(1, 3), st.sampled_from(DAMPINGS), st.floats(0.01, 0.9), st.sampled_from([0.0, 0.9]), seeds)
def test_update_averages_then_damps_then_updates(d_out, groups, pair_damping, mu2, pair_momentum, seed):
    """Pairs of any curvature; the averages are kept as they were before the damping."""
    generator = torch.Generator().manual_seed(seed)
    factor = gradient_factor(d_out, groups, None, pair_damping, mu2, pair_momentum)
    s_mean, y_mean = torch.zeros(2, groups, d_out, dtype=F64)
    for turn in range(3):
        s, y, g = torch.randn(3, groups, d_out, generator=generator, dtype=F64)
        H = random_spd(d_out, seed + turn, groups)
        factor.inverse.H.copy_(H)
        factor.update(s, y, g)
        s_mean = pair_momentum * s_mean + (1 - pair_momentum) * s
        y_mean = pair_momentum * y_mean + (1 - pair_momentum) * y
        assert relative_error(factor.s_mean, s_mean) < 1e-14
        assert relative_error(factor.y_mean, y_mean) < 1e-14
        for u in range(groups):
            s_u, y_u = damped_by_the_formulas(H[u], s_mean[u], y_mean[u], pair_damping, 0.2, mu2)
            expected = H[u]
            if s_u @ y_u > 1e-4 * (s_u @ s_u) * g[u].norm():
                expected = expected_update(H[u : u + 1], s_u[None], y_u[None])[0]
            # The definition cancels terms as large as |H| |s| |y| / s'y.
            scale = H[u].norm() * (1 + (s_u.norm() * y_u.norm() / (s_u @ y_u)) ** 2) + expected.norm()
            assert (factor.inverse.dense()[u] - expected).norm() < 1e-13 * scale


@pytest.mark.parametrize("memory", [None, 2])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dampings", [0.3, [0.3, 0.05, 0.9]])
def test_rows_side_by_side_are_factors_alone(dampings, poison, memory):
    """Also with a damping for each row; a change that is not finite is dropped and disturbs nobody else."""
    generator = torch.Generator().manual_seed(1)
    together = gradient_factor(4, 3, memory, damping=dampings)
    own = dampings if isinstance(dampings, list) else 3 * [dampings]
    alone = [gradient_factor(4, 1, memory, damping=damping) for damping in own]
    for turn in range(4):
        s, y, g_mean = torch.randn(3, 3, 4, generator=generator, dtype=F64)
        if turn == 1:
            y[1, -1] = poison
        where = torch.tensor([turn != 2, True, True])
        together.update(s, y, g_mean, where)
        for i, factor in enumerate(alone):
            factor.update(s[i : i + 1], y[i : i + 1], g_mean[i : i + 1], where[i])
    for i, factor in enumerate(alone):
        for name, tensor in together.tensors().items():
            assert torch.isfinite(tensor).all()
            assert relative_error(tensor[i], factor.tensors()[name][0]) < 1e-12  # sums of other lengths


@pytest.mark.parametrize("pair_damping", DAMPINGS)
def test_a_limited_memory_is_the_dense_recursion_over_its_pairs(pair_damping):
    """As long as nothing was dropped from it: the same averages, damping and test."""
    generator = torch.Generator().manual_seed(2)
    dense, limited = (gradient_factor(5, 2, memory, pair_damping) for memory in (None, 6))
    for _ in range(6):
        s, y, g = torch.randn(3, 2, 5, generator=generator, dtype=F64)
        for factor in (dense, limited):
            factor.update(s, y, g)
    assert relative_error(limited.inverse.dense(), dense.inverse.dense()) < 1e-11  # conditions about 1e3


@pytest.mark.parametrize("pair_damping", DAMPINGS)
def test_a_pair_of_rounding_errors_is_a_pair_without_curvature(pair_damping):
    """Before batch norm mean gradients are zero up to rounding, whose sign Powell's damping would otherwise act on."""
    results = []
    for noise in (0.0, 1e-17, -1e-17):
        factor = gradient_factor(4, 1, None, pair_damping)
        s = torch.tensor([[1.0, -2.0, 0.5, 1.0]], dtype=F64)
        factor.update(s, noise * torch.tensor([[1.0, -0.3, 2.0, -1.0]], dtype=F64), torch.ones(1, 4, dtype=F64), TRUE)
        results.append(factor.inverse.dense())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    # Curvature lambda_G along s, from the damping alone.
    assert relative_error(results[0][0] @ s[0], s[0] / 0.3) < 1e-12


@pytest.mark.parametrize("memory", [None, 3])
def test_a_pair_that_is_not_finite_does_not_append_the_old_average_again(memory):
    factor = gradient_factor(4, 1, memory)
    s, y = torch.tensor([[[1.0, -2.0, 0.5, 1.0]], [[2.0, -3.0, 1.5, 1.0]]], dtype=F64)
    factor.update(s, y, y, TRUE)
    before = {name: tensor.clone() for name, tensor in factor.tensors().items()}
    factor.update(torch.nan * s, y, y, TRUE)
    factor.update(s, torch.inf * y, y, TRUE)
    factor.update(s, y, y, torch.tensor(False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in factor.tensors().items())
    factor.update(s, y, y, TRUE)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in factor.tensors().items())


def test_no_tensor_is_read_on_the_host():
    with FakeTensorMode():  # holds shapes and no values: reading one raises
        for memory in (None, 3):
            for damping in (0.3, [0.3, 0.4]):
                factor = gradient_factor(4, 2, memory, damping=damping)
                s = torch.randn(2, 4, dtype=F64)
                factor.update(s, s, s, torch.ones((), dtype=torch.bool))
                assert factor.inverse.dense().shape == (2, 4, 4)


def test_a_steep_direction_is_taken_in_however_long_its_y_is():
    """The curvature test is s'y > 1e-4 |s|^2 |v|: it measures the step, and not the change of the gradient."""
    factor = gradient_factor(3, 1, None, "levenberg-marquardt", damping=0.3, pair_momentum=0.0)
    factor.inverse.H.mul_(0.5e-6)  # so that Powell's damping leaves the pair alone
    s, v = torch.eye(3, dtype=F64)[:2, None]
    factor.update(s, 1e6 * s, v)
    assert relative_error(factor.inverse.H[0] @ ((1e6 + 0.3) * s[0]), s[0]) < 1e-12

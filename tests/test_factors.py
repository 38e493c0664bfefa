"""`ActivationFactor` against the bounds that chapter 6 derives, over sizes, conditioning and groups, in float64.

Every bound is tested as the ratio achieved/bound, which hypothesis drives upwards (`target`): a bound that is violated
is wrong, and one that is never approached says little.
"""

import pytest
import torch
from hypothesis import given, settings, target
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kfqn_core.estimate import inverses as factors
from kfqn_core.estimate.statistics import Record, Use
from kfqn_core.estimate.inverses import (
    ActivationFactor,
    Change,
    DenseInverse,
    ExactActivationFactor,
    GradientFactor,
    Pair,
    _shared_rows,
    acceptable,
    aligned_bmm,
    append_pairs,
    damped_pairs,
)
from kfqn_core.lab.checks import relative_error
from kfqn_core.layers import view
from kfqn_core.maths.secant import LimitedMemoryInverse, bfgs_inverse_update

F64 = torch.float64
TRUE = torch.tensor(True)
properties = settings(derandomize=True, deadline=None, database=None, max_examples=200)

sizes = st.integers(1, 8)
seeds = st.integers(0, 10**6)
dampings = st.floats(0.01, 1)
scales = st.floats(-1, 1)  # log10 of the size of the inputs
decays = st.sampled_from([None, 0.0, 0.9])


def linear_case(d, samples, seed, scale=0.0, groups=1):
    """A layer and the record of one mini-batch; with groups, a 1x1 convolution, whose locations are pixels."""
    generator = torch.Generator().manual_seed(seed)
    if groups == 1:
        layer, shape = nn.Linear(d, 2, dtype=F64), (samples, d)
    else:
        layer, shape = nn.Conv2d(groups * d, groups, 1, groups=groups, dtype=F64), (samples, groups * d, 2, 3)
    x = 10**scale * torch.randn(shape, generator=generator, dtype=F64)
    return layer, record_of(layer, x)


def record_of(layer, x):
    v = view(layer)
    return Record(v, [Use(x, v.locations(x))])


def factor_of(record, damping, decay):
    return ActivationFactor(record.view, damping, decay, dtype=F64, device=torch.device("cpu"))


def second_moment(record):
    """A by its definition, from the patches."""
    a = torch.cat([record.view.patches(use.x) for use in record.uses])
    return torch.einsum("nuti,nutj->uij", a, a) / len(a)


def damped(A, damping):
    return A + damping * torch.eye(A.shape[-1], dtype=A.dtype)


def random_spd(d, seed, groups=1):
    """Positive definite matrices of condition up to 1e4 and of any overall size between 1/10 and 10."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(groups, d, d, generator=generator, dtype=F64)).Q
    exponents = 4 * torch.rand(groups, 1, d, generator=generator, dtype=F64) - 2
    size = 10 ** (2 * torch.rand(1, generator=generator, dtype=F64) - 1)
    H = size * (Q * 10**exponents) @ Q.mT
    return (H + H.mT) / 2


def spectrum(H, M):
    """Eigenvalues of M^(1/2) H M^(1/2), ascending: those of L^T H L with M = L L^T."""
    L = torch.linalg.cholesky(M)
    K = L.mT @ H @ L
    return torch.linalg.eigvalsh((K + K.mT) / 2)


def expected_update(H, s, y):
    """The definition, written with whole matrices, group by group."""
    new = []
    for H_u, s_u, y_u in zip(H, s, y, strict=True):
        rho = 1 / (s_u @ y_u)
        P = torch.eye(len(s_u), dtype=F64) - rho * torch.outer(s_u, y_u)
        new.append(P @ H_u @ P.T + rho * torch.outer(s_u, s_u))
    return torch.stack(new)


@properties
@given(sizes, st.integers(1, 3), dampings, scales, decays, seeds)
def test_pair_is_the_damped_second_moment_times_the_step(d, groups, damping, scale, decay, seed):
    """`update` is the BFGS update with s = H_a abar, y = (A + lambda_A I) s, A of the batch or the running average."""
    _, first = linear_case(d, 6, seed, scale, groups)
    _, record = linear_case(d, 5, seed + 1, scale, groups)
    factor = factor_of(record, damping, decay)
    factor.start(second_moment(first))
    A = second_moment(record)
    if decay is not None:
        factor.average(A, TRUE)
        A = decay * second_moment(first) + (1 - decay) * A
        assert relative_error(factor.A, A) < 1e-14  # one interpolation
    a = record.view.patches(record.uses[0].x)
    H, s = factor.H.clone(), torch.einsum("uij,uj->ui", factor.H, a.mean((0, 2)))
    y = torch.einsum("uij,uj->ui", damped(A, damping), s)
    factor.update(record, TRUE)
    # Terms as large as cond(M) |H| cancel in the definition.
    condition = torch.linalg.cond(damped(A, damping)).max().item()
    assert relative_error(factor.H, expected_update(H, s, y)) < 1e-13 * condition
    assert (factor.H @ y[..., None] - s[..., None]).norm() < 1e-13 * condition * s.norm()


@properties
@given(sizes, st.integers(1, 3), dampings, scales, decays, seeds)
def test_start_is_the_exact_inverse_and_the_inverse_is_a_fixed_point(d, groups, damping, scale, decay, seed):
    """Of the update with its own pair, at any scale of the inputs."""
    _, record = linear_case(d, 6, seed, scale, groups)
    factor = factor_of(record, damping, decay)
    factor.start(second_moment(record))
    M = damped(second_moment(record), damping)
    inverse, tolerance = torch.linalg.inv(M), 1e-14 * torch.linalg.cond(M).max().item()
    assert factor.started
    assert relative_error(factor.H, inverse) < tolerance
    for _ in range(5):
        factor.update(record, TRUE)
    assert relative_error(factor.H, inverse) < 20 * tolerance


@properties
@given(sizes, dampings, scales, seeds)
def test_curvature_of_the_pair_needs_no_damping(d, damping, scale, seed):
    """lambda |s|^2 <= s'y and |y|^2 <= (Lambda + lambda) s'y, whatever positive definite H_a makes s."""
    _, record = linear_case(d, 6, seed, scale)
    M = damped(second_moment(record), damping)[0]
    s = random_spd(d + 1, seed)[0] @ record.mean_input()[0]
    y = record.activation_action(s[None])[0] + damping * s
    top = torch.linalg.eigvalsh(M)[-1].item()
    ratios = {"r1": (damping * (s @ s) / (s @ y)).item(), "r3": ((y @ y) / (s @ y) / top).item()}
    for name, ratio in ratios.items():
        target(ratio, label=name)
        assert ratio < 1 + 1e-12


@properties
@given(st.integers(1, 6), st.integers(1, 3), dampings, scales, seeds)
def test_spectrum_contracts_monotonically_to_one(d, groups, damping, scale, seed):
    """Fixed A, any probes: the range never widens past 1, and no sorted distance of an eigenvalue from 1 grows."""
    _, record = linear_case(d, 8, seed, scale, groups)
    factor = factor_of(record, damping, 0.0)  # decay 0: A is what `average` was last given
    A = second_moment(record)
    factor.start(A)
    M = damped(A, damping)
    factor.inverse.H.copy_(random_spd(factor.H.shape[-1], seed, groups))
    before = spectrum(factor.H, M)
    # eigvalsh errs relative to the largest eigenvalue; the Cholesky factors and the update add their condition.
    slack = 1e-12 * torch.linalg.cond(M).max() * before[..., -1:].clamp(min=1)
    for step in range(12):
        _, probe = linear_case(d, 3, seed + 1 + step, scale, groups)
        factor.update(probe, TRUE)
        after = spectrum(factor.H, M)
        assert (after[..., 0] >= before[..., 0].clamp(max=1) - slack[..., 0]).all()
        assert (after[..., -1] <= before[..., -1].clamp(min=1) + slack[..., 0]).all()
        # After - I is a compression of before - I: the k-th largest |eigenvalue - 1| cannot grow, for every k.
        distances = [(e - 1).abs().sort(dim=-1).values for e in (before, after)]
        assert (distances[1] <= distances[0] + slack).all()
        before = after


def test_spectrum_reaches_one():
    """Independent probes leave nothing: 600 random mini-batch means on 7 inputs."""
    _, record = linear_case(6, 40, 0)
    factor = factor_of(record, 0.1, 0.0)
    A = second_moment(record)
    factor.start(A)
    factor.inverse.H.copy_(random_spd(7, 3))
    start = spectrum(factor.H, damped(A, 0.1))
    for step in range(600):
        _, probe = linear_case(6, 3, 100 + step)
        factor.update(probe, TRUE)
    end = spectrum(factor.H, damped(A, 0.1))
    assert (start - 1).abs().max() > 1
    assert (end - 1).abs().max() < 1e-10


@properties
@given(sizes, st.integers(1, 3), dampings, scales, seeds)
def test_one_step_bounds_for_any_second_moment(d, groups, damping, scale, seed):
    """H_a unrelated to A. With c = 1 + Lambda/lambda,

    lambda_max(B+) <= lambda_max(B) + Lambda + lambda and lambda_max(H+) <= lambda_max(H) (c + 1)^2/(4 c) + 1/lambda.
    """
    _, record = linear_case(d, 6, seed, scale, groups)
    factor = factor_of(record, damping, None)
    factor.started = True
    H = random_spd(factor.H.shape[-1], seed, groups)
    factor.inverse.H.copy_(H)
    factor.update(record, TRUE)
    top = torch.linalg.eigvalsh(second_moment(record))[:, -1]
    low, high = (torch.linalg.eigvalsh(matrix)[:, index] for matrix, index in ((H, 0), (H, -1)))
    new = torch.linalg.eigvalsh(factor.H)
    c = 1 + top / damping
    bound_B, bound_H = 1 / low + top + damping, high * (c + 1) ** 2 / (4 * c) + 1 / damping
    assert (bound_H <= high * (1 + c.sqrt()) ** 2 + 1 / damping).all()  # the bound for any pair (chapter 7) is weaker
    slack = 1e-13 * (c + 1) * new[:, -1] / new[:, 0]  # new[:, 0] carries an error relative to the largest eigenvalue
    for name, ratio in (("B", 1 / new[:, 0] / bound_B), ("H", new[:, -1] / bound_H)):
        target(ratio.max().item(), label=name)
        assert (ratio <= 1 + slack).all()


def test_one_step_bound_from_above_is_attained_step_after_step():
    """An A that turns against H_a: growth by (c + 1)^2/(4 c) per step, so that no bound holds for all steps."""
    damping, c = 1.0, 10.0
    factor = DenseInverse(2, dtype=F64)
    s = torch.tensor([1.0, 0.0], dtype=F64)
    growth = (c + 1) ** 2 / (4 * c)
    for _ in range(12):
        # The eigenvectors of M for which the angle between s and M s is the largest possible one (Kantorovich).
        cosine, sine = (c / (c + 1)) ** 0.5, (1 / (c + 1)) ** 0.5
        flat = cosine * s + sine * torch.stack([-s[1], s[0]])
        M = damping * (c * torch.eye(2, dtype=F64) - (c - 1) * torch.outer(flat, flat))
        high = torch.linalg.eigvalsh(factor.H[0])[-1]
        append_pairs([Pair(factor, s[None], (M @ s)[None], s[None])], TRUE)
        ratio = torch.linalg.eigvalsh(factor.H[0])[-1] / (growth * high + 1 / damping)
        s = torch.nn.functional.normalize(M @ s, dim=0)
    assert 0.9999 < ratio < 1 + 1e-12
    assert torch.linalg.eigvalsh(factor.H[0])[-1] > growth**11


def test_groups_are_independent_factors():
    _, record = linear_case(3, 6, 1, groups=2)
    x = record.uses[0].x
    factor = factor_of(record, 0.2, None)
    factor.start(second_moment(record))
    factor.update(record, TRUE)
    for group in range(2):
        alone = record_of(nn.Conv2d(3, 1, 1, dtype=F64), x[:, 3 * group : 3 * group + 3])
        single = factor_of(alone, 0.2, None)
        single.start(second_moment(alone))
        single.update(alone, TRUE)
        assert relative_error(factor.H[group], single.H[0]) < 1e-13  # the same numbers, summed in another order


def test_action_and_average_differ_in_the_matrix_they_follow():
    """decay=None follows the mini-batch; an average with decay 0 is the same matrix, one with decay 0.9 is not."""
    _, first = linear_case(4, 6, 2)
    _, record = linear_case(4, 6, 3)
    results = {}
    for decay in (None, 0.0, 0.9):
        factor = factor_of(record, 0.1, decay)
        factor.start(second_moment(first))
        if decay is not None:
            factor.average(second_moment(record), TRUE)
        factor.update(record, TRUE)
        results[decay] = factor.H
        assert set(factor.tensors()) == ({"H_a"} if decay is None else {"A", "H_a"})
    assert relative_error(results[0.0], results[None]) < 1e-13
    assert relative_error(results[0.9], results[None]) > 1e-2
    with pytest.raises(ValueError, match="decay=None"):
        factor_of(record, 0.1, None).average(second_moment(record), TRUE)


def acceptable_pair(**changes):
    vectors = {"s": [1.0, 2.0], "y": [2.0, 1.0], "v": [3.0, 4.0]} | changes
    return acceptable(*(torch.tensor(vectors[name], dtype=F64) for name in ("s", "y", "v")))


@pytest.mark.parametrize(
    ("changes", "accepted"),
    [
        ({}, True),
        ({"y": [-2.0, -1.0]}, False),  # negative curvature
        ({"s": [0.0, 0.0]}, False),  # nothing was probed
        ({"y": [0.0, 0.0]}, False),
        ({"y": [2.0, torch.nan]}, False),
        ({"y": [torch.inf, 1.0]}, False),
        ({"s": [torch.nan, 1.0]}, False),
        ({"s": [torch.inf, 1.0]}, False),
        ({"v": [torch.nan, 1.0]}, False),
        ({"v": [9e3, 0.0]}, False),  # s'y = 4 against 1e-4 |s|^2 |v| = 4.5
        ({"v": [7e3, 0.0]}, True),  # against 3.5
    ],
)
def test_acceptable(changes, accepted):
    assert acceptable_pair(**changes).item() is accepted


def test_acceptable_judges_every_pair_of_a_batch():
    s = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, torch.nan]])
    assert acceptable(s, s, torch.ones(3, 2)).tolist() == [True, False, False]


def test_update_obeys_finite_and_acceptable():
    """Of a sound mini-batch nothing is used where `finite` is false, nor a pair that `acceptable` refuses."""
    _, record = linear_case(3, 5, 10)
    factor = factor_of(record, 0.1, 0.9)
    factor.start(second_moment(record))
    factor.inverse.H.copy_(torch.eye(4, dtype=F64))
    factor.update(record, torch.tensor(False))
    assert torch.equal(factor.H[0], torch.eye(4, dtype=F64))
    _, record = linear_case(3, 5, 10, scale=5)  # s'y = 0.1 |s|^2, where |abar| above 1e3 asks for more
    factor.A.zero_()
    assert record.mean_input().norm() > 1e3
    factor.update(record, TRUE)
    assert torch.equal(factor.H[0], torch.eye(4, dtype=F64))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_non_finite_mini_batch_changes_nothing(poison, decay):
    layer, record = linear_case(3, 5, 4)
    factor = factor_of(record, 0.1, decay)
    factor.start(second_moment(record))
    before = {name: tensor.clone() for name, tensor in factor.tensors().items()}
    x = record.uses[0].x.clone()
    x[2, 1] = poison
    bad = record_of(layer, x)
    if decay is not None:
        factor.average(bad.second_moment(), torch.tensor(False))
    factor.update(bad, torch.tensor(False))  # the optimizer saw it in the loss
    factor.update(bad, TRUE)  # it did not
    for name, tensor in factor.tensors().items():
        assert torch.equal(tensor, before[name])


def test_a_group_without_input_is_left_alone():
    """No bias and a group of zeros: s = 0, and the other group learns."""
    layer = nn.Conv2d(4, 2, 1, groups=2, bias=False, dtype=F64)
    x = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(5), dtype=F64)
    x[:, 2:] = 0
    record = record_of(layer, x)
    factor = factor_of(record, 0.1, None)
    factor.inverse.H.copy_(random_spd(2, 6, groups=2))
    before = factor.H.clone()
    factor.update(record, TRUE)
    assert relative_error(factor.H[0], before[0]) > 1e-2
    assert torch.equal(factor.H[1], before[1])


def test_a_start_with_a_non_finite_second_moment_counts_it_as_zero():
    _, record = linear_case(2, 5, 7)
    factor = factor_of(record, 0.5, 0.9)
    factor.start(torch.full((1, 3, 3), torch.nan, dtype=F64))
    assert torch.equal(factor.A, torch.zeros(1, 3, 3, dtype=F64))
    assert relative_error(factor.H, torch.eye(3, dtype=F64)[None] / 0.5) < 1e-15


def test_a_refused_or_overflowing_pair_leaves_the_inverse():
    inverse = DenseInverse(2, groups=2, dtype=torch.float32)
    s = torch.ones(2, 2)
    append_pairs([Pair(inverse, s, 2 * s, torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]))], TRUE)
    assert relative_error(inverse.dense()[0] @ (2 * s[0]), s[0]) < 1e-6
    assert torch.equal(inverse.dense()[1], torch.eye(2))
    before = inverse.dense().clone()
    append_pairs([Pair(inverse, 1e18 * s, 1e-21 * s, 1e-36 * s)], TRUE)  # acceptable, but H+ overflows float32
    assert torch.equal(inverse.dense(), before)
    V = torch.arange(8.0).reshape(2, 2, 2)
    assert torch.equal(inverse.apply(V), before @ V)


def test_pairs_of_many_layers_enter_as_each_would_alone():
    """Of different sizes, groups, dtypes and kinds; a pair that is refused, or not a number, disturbs nobody else."""
    generator = torch.Generator().manual_seed(0)

    def made(groups, n, dtype, bad=None):
        s, v = (torch.randn(groups, n, generator=generator, dtype=F64) for _ in range(2))
        y = (random_spd(n, n, groups) @ s[..., None])[..., 0]
        if bad is not None:
            y[0] = bad * s[0]
        H = random_spd(n, n + 1, groups).to(dtype)
        inverse = DenseInverse(n, groups=groups, dtype=dtype)
        inverse.H.copy_(H)
        expected = bfgs_inverse_update(H, s.to(dtype), y.to(dtype))
        expected = torch.where(acceptable(s, y, v)[:, None, None], expected, H)
        return Pair(inverse, s.to(dtype), y.to(dtype), v.to(dtype)), expected

    cases = [made(1, 3, F64), made(2, 7, F64), made(3, 2, F64, bad=-1.0), made(1, 5, torch.float32),
             made(2, 4, torch.float32, bad=torch.nan), made(1, 1, F64)]  # fmt: skip
    limited, alone = (LimitedMemoryInverse(4, 3, batch=(1,), dtype=F64) for _ in range(2))
    s = torch.randn(1, 4, generator=generator, dtype=F64)
    alone.append(s, 2 * s)
    pairs = [pair for pair, _ in cases]
    before = [pair.inverse.dense().clone() for pair in pairs]
    append_pairs([*pairs, Pair(limited, s, 2 * s, s)], torch.tensor(False))
    assert all(torch.equal(pair.inverse.dense(), H) for pair, H in zip(pairs, before, strict=True))
    assert torch.equal(limited.S, torch.zeros_like(limited.S))
    append_pairs([*pairs, Pair(limited, s, 2 * s, s)], TRUE)
    for pair, expected in cases:
        precision = 1e-12 if pair.s.dtype == F64 else 1e-3  # condition 1e4 times the rounding of the dtype
        assert relative_error(pair.inverse.dense(), expected) < precision
    assert all(torch.equal(cases[i][0].inverse.dense()[0], before[i][0]) for i in (2, 4))
    assert torch.equal(limited.dense(), alone.dense())


def gradient_factor(d_out, groups, memory, pair_damping="double"):
    return GradientFactor(
        view(nn.Conv1d(groups, d_out, 1, groups=groups)), 0.3, memory, pair_damping=pair_damping, pair_momentum=0.9,
        mu1=0.2, dtype=F64, device=torch.device("cpu"),
    )  # fmt: skip


# outputs, groups, memory
GRADIENT_FACTORS = [(4, 1, None), (3, 1, None), (6, 2, None), (5, 1, 2), (3, 1, 2), (6, 3, 2)]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_changes_of_many_layers_enter_as_each_would_alone(poison):
    """Of different sizes and groups, dense and limited; one that is not finite is dropped and disturbs nobody else."""
    generator = torch.Generator().manual_seed(1)
    together, alone = ([gradient_factor(*kind) for kind in GRADIENT_FACTORS] for _ in range(2))
    for turn in range(3):
        changes = []
        for i, factor in enumerate(together):
            s, y, g_mean = (torch.randn(*factor.s_mean.shape, generator=generator, dtype=F64) for _ in range(3))
            if turn == i == 1:  # a dense one that shares a tensor with the first
                y[0, -1] = poison
            changes.append(Change(factor, s, y, g_mean))
        for factor, change in zip(alone, changes, strict=True):
            factor.update(*change[1:], TRUE)
        append_pairs(damped_pairs(changes, TRUE), TRUE)
    for one, other in zip(together, alone, strict=True):
        for name, tensor in one.tensors().items():
            assert torch.isfinite(tensor).all()
            assert relative_error(tensor, other.tensors()[name]) < 1e-12  # sums of other lengths


def test_float32_factor_stays_symmetric_and_close_to_float64():
    """Two thousand updates: a symmetric H stays so, and rounding has no skew part in which to accumulate."""
    _, record = linear_case(12, 40, 8)
    A = second_moment(record)
    factor = ActivationFactor(record.view, 0.01, 0.0, dtype=torch.float32, device=torch.device("cpu"))
    factor.start(A)
    for step in range(2000):
        _, probe = linear_case(12, 3, 1000 + step)
        factor.update(probe, TRUE)
    assert torch.equal(factor.H, factor.H.mT)
    condition = torch.linalg.cond(damped(A, 0.01)).item()
    assert relative_error(factor.H, torch.linalg.inv(damped(A, 0.01))) < 1e-6 * condition  # float32 rounds at 6e-8


@pytest.mark.parametrize("pair_damping", ["double", "levenberg-marquardt"])
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
    assert (
        relative_error(results[0][0] @ s[0], s[0] / 0.3) < 1e-12
    )  # curvature lambda_G along s, from the damping alone


@pytest.mark.parametrize("memory", [None, 3])
def test_a_pair_that_is_not_finite_does_not_append_the_old_average_again(memory):
    factor = gradient_factor(4, 1, memory)
    s, y = torch.tensor([[[1.0, -2.0, 0.5, 1.0]], [[2.0, -3.0, 1.5, 1.0]]], dtype=F64)
    factor.update(s, y, y, TRUE)
    before = {name: tensor.clone() for name, tensor in factor.tensors().items()}
    factor.update(torch.nan * s, y, y, TRUE)
    factor.update(s, torch.inf * y, y, TRUE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in factor.tensors().items())


def test_groups_share_no_tensor_with_longer_layers(monkeypatch):
    """A depthwise convolution has a row for each channel; none is as long as the widest layer."""
    entries = []
    monkeypatch.setattr(factors, "bfgs_inverse_update_", lambda Hs, s, y, keep: entries.append(s.numel()))
    shapes = [(1, 3), (1, 500), (200, 10), (100, 10)]
    inverses = [DenseInverse(n, groups=groups) for groups, n in shapes]
    append_pairs([Pair(H, *torch.ones(3, *shape)) for H, shape in zip(inverses, shapes, strict=True)], TRUE)
    assert sorted(entries) == [2 * 500, 300 * 10]


@pytest.mark.parametrize("decay", [None, 0.9])
def test_exact_factor_inverts_what_the_action_follows(decay):
    _, first = linear_case(4, 6, 2)
    _, record = linear_case(4, 6, 3)
    factor = ExactActivationFactor(record.view, 0.1, decay, dtype=F64, device=torch.device("cpu"))
    factor.start(second_moment(first))
    A = second_moment(record)
    if decay is not None:
        factor.average(A, TRUE)
        A = 0.9 * second_moment(first) + 0.1 * A
    factor.update(record, torch.tensor(False))
    assert relative_error(factor.H, torch.linalg.inv(damped(second_moment(first), 0.1))) < 1e-12
    factor.update(record, TRUE)
    assert relative_error(factor.H, torch.linalg.inv(damped(A, 0.1))) < 1e-12


def test_no_tensor_is_read_on_the_host():
    layer = nn.Conv2d(4, 2, 3, groups=2)
    with FakeTensorMode(allow_non_fake_inputs=True):  # holds shapes and no values: reading one raises
        record = record_of(layer, torch.randn(3, 4, 6, 6))
        for decay in (None, 0.9):
            factor = ActivationFactor(record.view, 0.1, decay, dtype=torch.float32, device=torch.device("cpu"))
            factor.start(record.second_moment())
            if decay is not None:
                factor.average(record.second_moment(), torch.ones((), dtype=torch.bool))
            factor.update(record, torch.ones((), dtype=torch.bool))
            assert factor.H.shape == (2, 19, 19)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_large_product_with_rows_of_odd_length_is_the_product(groups, dtype):
    X, Y = (torch.randn(groups, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
            for shape in ((300, 40), (40, 301)))  # fmt: skip
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN, in deterministic mode
    torch.use_deterministic_algorithms(True)
    try:
        Z = aligned_bmm(X, Y)
    finally:
        torch.use_deterministic_algorithms(False)
    assert Z.stride(1) % (64 // X.element_size()) == 0
    assert Z.stride(1) > 301
    assert relative_error(Z, torch.bmm(X.double(), Y.double())) < 100 * torch.finfo(dtype).eps


def test_a_very_long_vector_does_not_stretch_the_others():
    """A vocabulary has a hundred thousand outputs: every layer's vectors would be padded to that."""
    short, long = torch.zeros(1, 1024), torch.zeros(1, 1025)
    assert _shared_rows(short) == _shared_rows(torch.zeros(1, 3))
    assert (
        len({_shared_rows(v) for v in (short, long, torch.zeros(1, 2000), torch.zeros(2, 8), torch.zeros(2, 9))}) == 5
    )

"""The forms of `H_a` against the bounds that chapter 6 derives, over sizes, conditioning and groups, in float64.

Every bound is tested as the ratio achieved/bound, which hypothesis drives upwards (`target`): a bound that is violated
is wrong, and one that is never approached says little.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings, target
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kfqn_core import KFQN
from kfqn_core.estimate.activation import (
    ActivationFactor,
    DiagonalActivationFactor,
    ExactActivationFactor,
    towards_diagonal,
)
from kfqn_core.estimate.inverses import DenseInverse, acceptable
from kfqn_core.estimate.statistics import Batch, Record, Use
from kfqn_core.lab.checks import relative_error
from kfqn_core.layers import view
from kfqn_core.maths.columns import Columns
from kfqn_core.maths.secant import bfgs_inverse_update

F64 = torch.float64
LIKE = {"dtype": F64, "device": torch.device("cpu")}
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
    return ActivationFactor(record.view, damping, decay, **LIKE)


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
    factor.start_from(second_moment(first))
    A = second_moment(record)
    if decay is not None:
        factor.average(record, TRUE)
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
    factor.start_from(second_moment(record))
    M = damped(second_moment(record), damping)
    inverse, tolerance = torch.linalg.inv(M), 1e-14 * torch.linalg.cond(M).max().item()
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
    factor.start_from(A)
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
    factor.start_from(A)
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
    inverse = DenseInverse(2, dtype=F64)
    s = torch.tensor([1.0, 0.0], dtype=F64)
    growth = (c + 1) ** 2 / (4 * c)
    for _ in range(12):
        # The eigenvectors of M for which the angle between s and M s is the largest possible one (Kantorovich).
        cosine, sine = (c / (c + 1)) ** 0.5, (1 / (c + 1)) ** 0.5
        flat = cosine * s + sine * torch.stack([-s[1], s[0]])
        M = damping * (c * torch.eye(2, dtype=F64) - (c - 1) * torch.outer(flat, flat))
        high = torch.linalg.eigvalsh(inverse.H[0])[-1]
        y = M @ s
        inverse.append(s[None], y[None], acceptable(s[None], y[None], s[None]))
        ratio = torch.linalg.eigvalsh(inverse.H[0])[-1] / (growth * high + 1 / damping)
        s = torch.nn.functional.normalize(y, dim=0)
    assert 0.9999 < ratio < 1 + 1e-12
    assert torch.linalg.eigvalsh(inverse.H[0])[-1] > growth**11


def test_groups_are_independent_factors():
    _, record = linear_case(3, 6, 1, groups=2)
    x = record.uses[0].x
    factor = factor_of(record, 0.2, None)
    factor.start_from(second_moment(record))
    factor.update(record, TRUE)
    for group in range(2):
        alone = record_of(nn.Conv2d(3, 1, 1, dtype=F64), x[:, 3 * group : 3 * group + 3])
        single = factor_of(alone, 0.2, None)
        single.start_from(second_moment(alone))
        single.update(alone, TRUE)
        assert relative_error(factor.H[group], single.H[0]) < 1e-13  # the same numbers, summed in another order


def test_action_and_average_differ_in_the_matrix_they_follow():
    """decay=None follows the mini-batch; an average with decay 0 is the same matrix, one with decay 0.9 is not."""
    _, first = linear_case(4, 6, 2)
    _, record = linear_case(4, 6, 3)
    results = {}
    for decay in (None, 0.0, 0.9):
        factor = factor_of(record, 0.1, decay)
        factor.start_from(second_moment(first))
        if decay is not None:
            factor.average(record, TRUE)
        factor.update(record, TRUE)
        results[decay] = factor.H
        assert set(factor.tensors()) == ({"H_a"} if decay is None else {"A", "H_a"})
    assert relative_error(results[0.0], results[None]) < 1e-13
    assert relative_error(results[0.9], results[None]) > 1e-2
    with pytest.raises(ValueError, match="decay=None"):
        factor_of(record, 0.1, None).average(record)


def test_update_obeys_finite_and_acceptable():
    """Of a sound mini-batch nothing is used where `finite` is false, nor a pair that `acceptable` refuses."""
    _, record = linear_case(3, 5, 10)
    factor = factor_of(record, 0.1, 0.9)
    factor.start_from(second_moment(record))
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
    factor.start_from(second_moment(record))
    before = {name: tensor.clone() for name, tensor in factor.tensors().items()}
    x = record.uses[0].x.clone()
    x[2, 1] = poison
    bad = record_of(layer, x)
    if decay is not None:
        factor.average(bad, torch.tensor(False))
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


FORMS = {
    "action": lambda record: factor_of(record, 0.1, None),
    "average": lambda record: factor_of(record, 0.1, 0.9),
    "exact": lambda record: ExactActivationFactor(record.view, 0.1, 0.9, **LIKE),
    "diagonal": lambda record: DiagonalActivationFactor(record.view, 0.1, **LIKE),
}


@pytest.mark.parametrize("form", ["action", "average", "exact", "diagonal"])
def test_a_first_mini_batch_that_is_not_finite_starts_only_the_groups_that_are(form):
    """`start` says where there is an estimate now; elsewhere the factor waits for another first mini-batch."""
    layer, record = linear_case(3, 5, 7, groups=2)
    x = record.uses[0].x.clone()
    x[1, 4] = torch.nan  # of the second group
    factor, expected = FORMS[form](record), FORMS[form](record)
    before = {name: tensor.clone() for name, tensor in factor.tensors().items()}
    expected.start(record)
    assert factor.start(record_of(layer, x)).tolist() == [True, False]
    for name, tensor in factor.tensors().items():
        # A product with a matrix that holds NaN may be summed in another order.
        assert relative_error(tensor[0], expected.tensors()[name][0]) < 1e-12
        assert torch.equal(tensor[1], before[name][1])
    assert factor.start(record, torch.tensor([False, True])).tolist() == [False, True]
    assert relative_error(factor.H, expected.H) < 1e-12


def test_float32_factor_stays_symmetric_and_close_to_float64():
    """Two thousand updates: a symmetric H stays so, and rounding has no skew part in which to accumulate."""
    _, record = linear_case(12, 40, 8)
    A = second_moment(record)
    factor = ActivationFactor(record.view, 0.01, 0.0, dtype=torch.float32, device=torch.device("cpu"))
    factor.start_from(A)
    for step in range(2000):
        _, probe = linear_case(12, 3, 1000 + step)
        factor.update(probe, TRUE)
    assert torch.equal(factor.H, factor.H.mT)
    condition = torch.linalg.cond(damped(A, 0.01)).item()
    assert relative_error(factor.H, torch.linalg.inv(damped(A, 0.01))) < 1e-6 * condition  # float32 rounds at 6e-8


@pytest.mark.parametrize("decay", [None, 0.9])
def test_exact_factor_inverts_what_the_action_follows(decay):
    _, first = linear_case(4, 6, 2)
    _, record = linear_case(4, 6, 3)
    factor = ExactActivationFactor(record.view, 0.1, decay, **LIKE)
    factor.start_from(second_moment(first))
    A = second_moment(record)
    if decay is not None:
        factor.average(record, TRUE)
        A = 0.9 * second_moment(first) + 0.1 * A
    factor.update(record, torch.tensor(False))
    assert relative_error(factor.H, torch.linalg.inv(damped(second_moment(first), 0.1))) < 1e-12
    factor.update(record, TRUE)
    assert relative_error(factor.H, torch.linalg.inv(damped(A, 0.1))) < 1e-12


@pytest.mark.parametrize("groups", [1, 3])
def test_diagonal_factor_inverts_the_running_diagonal(groups):
    _, first = linear_case(4, 6, 2, groups=groups)
    _, record = linear_case(4, 6, 3, groups=groups)
    factor = DiagonalActivationFactor(record.view, 0.1, **LIKE)
    factor.start(first)
    diagonals = [second_moment(seen).diagonal(dim1=-2, dim2=-1) for seen in (first, record)]
    assert relative_error(factor.H, torch.diag_embed(1 / (diagonals[0] + 0.1))) < 1e-14  # a few roundings
    factor.average(record)  # nothing: it learns when curvature is updated
    factor.update(record, torch.tensor(False))
    assert relative_error(factor.d, diagonals[0]) < 1e-14
    factor.update(record)
    expected = 0.9 * diagonals[0] + 0.1 * diagonals[1]
    assert relative_error(factor.H, torch.diag_embed(1 / (expected + 0.1))) < 1e-14
    factor.update(record, decay=0.25)
    assert relative_error(factor.d, 0.25 * expected + 0.75 * diagonals[1]) < 1e-14


def test_diagonal_factor_is_the_inverse_where_A_is_diagonal():
    """One entry of every input is not zero, as in an embedding: nothing is lost."""
    x = torch.eye(5, dtype=F64).repeat(3, 1) * torch.linspace(0.2, 2, 15, dtype=F64)[:, None]
    record = record_of(nn.Linear(5, 2, bias=False, dtype=F64), x)
    diagonal, exact = (FORMS[form](record) for form in ("diagonal", "exact"))
    for factor in (diagonal, exact):
        factor.start(record)
    assert relative_error(diagonal.H, exact.H) < 1e-14


@pytest.mark.parametrize("form", ["action", "average", "exact", "diagonal"])
def test_a_warm_start_from_A_is_a_start_from_the_mini_batch(form):
    _, record = linear_case(4, 9, 3, groups=2)
    streamed, formed = FORMS[form](record), FORMS[form](record)
    streamed.start(record)
    formed.start_from(second_moment(record))
    assert relative_error(streamed.H, formed.H) < 1e-12  # condition 1e2 times a few roundings


@pytest.mark.parametrize("form", ["action", "average", "exact", "diagonal"])
def test_preconditioning_is_the_product_with_H(form):
    _, record = linear_case(4, 9, 3, groups=2)
    factor = FORMS[form](record)
    factor.start(record)
    M = torch.randn(2, 3, record.view.d_in, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert relative_error(factor.precondition(Columns.split(M, True)), M @ factor.H) < 1e-14


@pytest.mark.parametrize("form", ["action", "average", "exact", "diagonal"])
def test_rows_side_by_side_with_dampings_of_their_own_are_factors_alone(form):
    """Two layers of one shape that act at different numbers of locations: `damping` is `[B, 1]`."""
    dampings, records = (0.1, 0.7), [[linear_case(3, 6, 10 * i + turn)[1] for i in range(2)] for turn in range(2)]
    views = [record.view for record in records[0]]
    together = FORMS[form](linear_case(3, 6, 0, groups=2)[1])  # two rows of the same sizes
    together.damping = torch.tensor(dampings, dtype=F64)[:, None]
    for turn, method in enumerate(("start", "average", "update")):
        batch = Batch(views, records[min(turn, 1)], torch.empty(0, dtype=F64))
        if method != "average" or together.every_step:
            getattr(together, method)(batch)
    for i, damping in enumerate(dampings):
        alone = FORMS[form](records[0][i])
        alone.damping = damping
        alone.start(records[0][i])
        if alone.every_step:
            alone.average(records[1][i])
        alone.update(records[1][i])
        assert relative_error(together.H[i], alone.H[0]) < 1e-12  # the same numbers, summed in another order


def test_no_tensor_is_read_on_the_host():
    layer = nn.Conv2d(4, 2, 3, groups=2)
    with FakeTensorMode(allow_non_fake_inputs=True):  # holds shapes and no values: reading one raises
        record = record_of(layer, torch.randn(3, 4, 6, 6))
        like = {"dtype": torch.float32, "device": torch.device("cpu")}
        factors = [form(record.view, 0.1, decay, **like) for form in (ActivationFactor, ExactActivationFactor)
                   for decay in (None, 0.9)] + [DiagonalActivationFactor(record.view, 0.1, **like)]  # fmt: skip
        for factor in factors:
            where = factor.start(record)
            if factor.every_step:
                factor.average(record, where)
            factor.update(record, where)
            assert factor.H.shape == (2, 19, 19)


@pytest.mark.parametrize("vectors", [1, 3, 40, 10**6])
def test_a_first_estimate_that_is_shrunk_keeps_the_diagonal_and_part_of_the_rest(vectors):
    """By its formula, entry by entry."""
    x = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    A = torch.stack([x.T @ x, 3 * x[:2].T @ x[:2]])
    shrunk = towards_diagonal(A, vectors)
    by_row = towards_diagonal(A, torch.tensor([vectors, vectors], dtype=torch.float32))
    for i, j in itertools.product(range(4), range(4)):
        share = 0.0 if i == j else 4 / (4 + vectors)
        assert torch.allclose(shrunk[:, i, j], (1 - share) * A[:, i, j], rtol=1e-12)
    assert torch.allclose(by_row, shrunk, rtol=1e-6)  # counts in float32
    assert torch.linalg.eigvalsh(shrunk).min() >= -1e-12
    if vectors == 1:
        assert torch.linalg.eigvalsh(A)[1].min() < 1e-12 < torch.linalg.eigvalsh(shrunk)[1].min()


def after_the_first_step(x, shrinks):
    """H_a by the definitions: from the first A, shrunk or not, and one update with the A of the mini-batch itself."""
    a = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    n, eye = a.shape[1], torch.eye(a.shape[1], dtype=F64)
    A = a.T @ a / len(a)
    start = A * (len(a) / (len(a) + n)) + torch.diag(A.diagonal()) * (n / (len(a) + n)) if shrinks else A
    H = torch.linalg.inv(start + 0.03 * eye)
    s = H @ a.mean(0)
    return bfgs_inverse_update(H, s, (A + 0.03 * eye) @ s)


@pytest.mark.parametrize(("options", "shrinks"), [({}, True), ({"activation_factor": "action"}, False)])
def test_the_default_starts_from_a_shrunk_estimate_and_the_papers_methods_do_not(options, shrinks):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9)).double(), torch.randn(3, 5, 6).double()
    optimizer = KFQN(model, **options)
    model(x).square().mean().backward()
    optimizer.step()
    found = optimizer.layers["0"].activation.H[0]
    assert relative_error(found, after_the_first_step(x.flatten(0, 1), shrinks)) < 1e-10
    assert relative_error(found, after_the_first_step(x.flatten(0, 1), not shrinks)) > 1e-2


def test_a_group_shrinks_every_layer_by_its_own_number_of_vectors():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6)]).double()
    optimizer = KFQN(layers)
    xs = [torch.randn(n, 4, dtype=F64) for n in (3, 20)]
    (layers[0](xs[0]).square().mean() + layers[1](xs[1]).square().mean()).backward()
    optimizer.step()
    for i, x in enumerate(xs):
        found = optimizer.layers[str(i)].activation.H[0]
        assert relative_error(found, after_the_first_step(x, shrinks=True)) < 1e-6  # counts in float32

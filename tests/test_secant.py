"""The secant updates against their definitions, over sizes, conditioning and scales, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kfqn_core.lab.checks import relative_error
from kfqn_core.maths.secant import LimitedMemoryInverse, bfgs_inverse_update, bfgs_inverse_update_

properties = settings(derandomize=True, deadline=None, database=None, max_examples=200)


def spd(n, log10_cond, generator, batch=()):
    """Random positive definite matrices, eigenvalues from 10^(-log10_cond/2) to 10^(log10_cond/2)."""
    Q = torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64)).Q
    exponents = log10_cond * (torch.rand(*batch, n, generator=generator, dtype=torch.float64) - 0.5)
    exponents[..., 0], exponents[..., -1] = -log10_cond / 2, log10_cond / 2
    H = (Q * (10**exponents).unsqueeze(-2)) @ Q.mT
    return (H + H.mT) / 2


def pair(n, cosine, generator, batch=()):
    """A pair with `s^T y = cosine |s| |y|` (1 where n = 1) and lengths between 1/10 and 10."""
    s, other = torch.nn.functional.normalize(
        torch.randn(2, *batch, n, generator=generator, dtype=torch.float64), dim=-1
    ).unbind(0)
    lengths = 10 ** (2 * torch.rand(2, *batch, 1, generator=generator, dtype=torch.float64) - 1)
    if n == 1:
        return s * lengths[0], s.sign() * lengths[1]
    across = torch.nn.functional.normalize(other - (other * s).sum(-1, keepdim=True) * s, dim=-1)
    return s * lengths[0], (cosine * s + (1 - cosine**2) ** 0.5 * across) * lengths[1]


def product_form(H, s, y):
    """The definition, written with whole matrices."""
    rho = 1 / (s @ y)
    left = torch.eye(len(s), dtype=s.dtype) - rho * torch.outer(s, y)
    return left @ H @ left.T + rho * torch.outer(s, s)


sizes = st.integers(1, 24)
seeds = st.integers(0, 10**6)
conditions = st.floats(0, 6)  # log10 of the condition number of H
cosines = st.floats(0.01, 1)


@properties
@given(sizes, conditions, cosines, seeds)
def test_update_satisfies_the_secant_equation(n, condition, cosine, seed):
    generator = torch.Generator().manual_seed(seed)
    H, (s, y) = spd(n, condition, generator), pair(n, cosine, generator)
    H_new = bfgs_inverse_update(H, s, y)
    # H is subtracted along s and y, so the error is rounding of entries as large as H or H+, whichever is larger.
    norms = torch.linalg.matrix_norm(torch.stack([H, H_new]), 2).sum()
    assert (H_new @ y - s).norm() < 1e-14 * norms * y.norm()


@properties
@given(sizes, st.floats(0, 2), st.floats(0.1, 1), seeds)
def test_update_sends_y_to_s_for_tame_pairs(n, condition, cosine, seed):
    generator = torch.Generator().manual_seed(seed)
    H, (s, y) = spd(n, condition, generator), pair(n, cosine, generator)
    y = y * s.norm() / y.norm()
    # The previous bound, with |H| <= 10, |H+| <= 10 / cosine^2 + 1 / cosine and |y| = |s|, and rounding near 1e-16.
    assert relative_error(bfgs_inverse_update(H, s, y) @ y, s) < 1e-12


@properties
@given(sizes, conditions, st.floats(-1, 1).filter(lambda c: abs(c) > 0.01), seeds)
def test_update_is_symmetric_to_the_last_bit(n, condition, cosine, seed):
    generator = torch.Generator().manual_seed(seed)
    H, (s, y) = spd(n, condition, generator), pair(n, cosine, generator)
    skew = 1e-8 * torch.randn(n, n, generator=generator, dtype=torch.float64)
    H_new = bfgs_inverse_update(H + skew, s, y)
    assert torch.equal(H_new, H_new.mT)


@properties
@given(sizes, conditions, cosines, seeds)
def test_update_stays_positive_definite(n, condition, cosine, seed):
    generator = torch.Generator().manual_seed(seed)
    H, (s, y) = spd(n, condition, generator), pair(n, cosine, generator)
    eigenvalues = torch.linalg.eigvalsh(bfgs_inverse_update(H, s, y))
    # B+ = B - (Bs)(Bs)^T / s^T B s + y y^T / s^T y, so the largest eigenvalue of B grows by at most |y|^2 / s^T y.
    bound = 1 / (1 / torch.linalg.eigvalsh(H)[0] + (y @ y) / (s @ y))
    assert eigenvalues[0] > 0
    assert eigenvalues[0] > bound - 1e-14 * n * eigenvalues[-1]  # eigvalsh errs relative to the largest


@properties
@given(sizes, conditions, cosines, seeds)
def test_update_is_indefinite_for_negative_curvature(n, condition, cosine, seed):
    generator = torch.Generator().manual_seed(seed)
    H, (s, y) = spd(n, condition, generator), pair(n, cosine, generator)
    H_new = bfgs_inverse_update(H, s, -y)
    assert y @ H_new @ y < 0  # y^T H+ y = s^T y by the secant equation


@properties
@given(sizes, conditions, cosines, seeds)
def test_update_agrees_with_its_definition(n, condition, cosine, seed):
    generator = torch.Generator().manual_seed(seed)
    H, (s, y) = spd(n, condition, generator), pair(n, cosine, generator)
    expected = product_form(H, s, y)
    # Terms as large as |H| / cosine^2 cancel in either form, and the result may be as small as |s| |s| / s^T y.
    scale = torch.linalg.matrix_norm(H, 2) / cosine**2 + expected.norm()
    assert (bfgs_inverse_update(H, s, y) - expected).norm() < 1e-14 * n * scale


@properties
@given(st.integers(2, 12), st.floats(0, 2), st.floats(0.1, 1), seeds)
def test_update_inverts_the_direct_update(n, condition, cosine, seed):
    generator = torch.Generator().manual_seed(seed)
    H, (s, y) = spd(n, condition, generator), pair(n, cosine, generator)
    B = torch.linalg.inv(H)
    Bs = B @ s
    B_new = B - torch.outer(Bs, Bs) / (s @ Bs) + torch.outer(y, y) / (s @ y)
    H_new = bfgs_inverse_update(H, s, y)
    # An inverse of a matrix of condition c is known to c eps.
    assert relative_error(H_new, torch.linalg.inv(B_new)) < 1e-14 * n * torch.linalg.cond(B_new)


@properties
@given(sizes, conditions, cosines, seeds)
def test_update_does_not_see_the_direction_of_travel(n, condition, cosine, seed):
    generator = torch.Generator().manual_seed(seed)
    H, (s, y) = spd(n, condition, generator), pair(n, cosine, generator)
    assert torch.equal(bfgs_inverse_update(H, s, y), bfgs_inverse_update(H, -s, -y))  # sign flips do not round


def test_update_moves_the_estimate_and_leaves_its_input():
    generator = torch.Generator().manual_seed(0)
    H, (s, y) = spd(5, 1, generator), pair(5, 0.5, generator)
    before = [t.clone() for t in (H, s, y)]
    H_new = bfgs_inverse_update(H, s, y)
    assert all(torch.equal(now, then) for now, then in zip((H, s, y), before, strict=True))
    assert relative_error(H_new, H) > 1e-2
    H_new.zero_()
    assert torch.equal(H, before[0])


def test_batched_update_is_the_loop():
    generator = torch.Generator().manual_seed(1)
    H, (s, y) = spd(6, 2, generator, (2, 3)), pair(6, 0.3, generator, (2, 3))
    H_new = bfgs_inverse_update(H, s, y)
    for i in range(2):
        for j in range(3):
            assert relative_error(H_new[i, j], bfgs_inverse_update(H[i, j], s[i, j], y[i, j])) < 1e-14


def test_update_of_tiny_pairs_does_not_overflow():
    generator = torch.Generator().manual_seed(2)
    H, (s, y) = spd(4, 1, generator), pair(4, 0.5, generator)
    expected = bfgs_inverse_update(H, s, y)
    tiny = bfgs_inverse_update(H.float(), 1e-15 * s.float(), 1e-15 * y.float())  # rho^2 is about 1e60
    assert relative_error(tiny, expected) < 1e-5  # a few float32 roundings


@properties
@given(st.integers(1, 16), st.integers(1, 3), conditions, cosines, seeds)
def test_update_in_place_is_the_update(n, batch, condition, cosine, seed):
    """Where `keep` holds; elsewhere, and where H+ would not be finite, nothing changes."""
    generator = torch.Generator().manual_seed(seed)
    H, (s, y) = spd(n, condition, generator, (batch + 2,)), pair(n, cosine, generator, (batch + 2,))
    y[1] = 0  # s^T y = 0: H+ is not finite
    keep = torch.tensor([False, True] + [True] * batch)
    expected, actual = bfgs_inverse_update(H, s, y), H.clone()
    bfgs_inverse_update_(actual, s, y, keep)
    assert torch.equal(actual[:2], H[:2])
    sizes = torch.linalg.matrix_norm(torch.stack([H, expected])[:, 2:], 2).sum(0)
    assert (torch.linalg.matrix_norm(actual - expected)[2:] < 1e-13 * sizes / cosine).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 100, 257])
def test_update_in_place_is_symmetric_to_the_last_bit(n, dtype):
    """Whether a processor takes an entry alone or with its neighbours: whatever the number of matrices, three times."""
    generator = torch.Generator().manual_seed(n)
    for batch in ((1,), (3,), (2, 2)):
        H = spd(n, 3, generator, batch).to(dtype)
        before = H.clone()
        for _ in range(3):
            s, y = (v.to(dtype) for v in pair(n, 0.3, generator, batch))
            bfgs_inverse_update_(H, s, y, torch.ones(batch, dtype=torch.bool))
        assert torch.equal(H, H.mT)
        assert not any(torch.equal(now, then) for now, then in zip(H, before, strict=True))


@pytest.mark.parametrize("batch", [(1,), (7,), (2, 3), ()])
def test_update_in_place_of_several_is_the_loop(batch):
    """Of any leading dimensions, also where the matrices lie in memory with others between them."""
    generator = torch.Generator().manual_seed(len(batch))
    everything = spd(5, 3, generator, (2, *batch))
    H, (s, y) = everything[1], pair(5, 0.3, generator, batch)
    keep = torch.arange(s[..., 0].numel()).reshape(batch) % 3 != 1
    before, other = H.clone(), everything[0].clone()
    bfgs_inverse_update_(H, s, y, keep)
    assert torch.equal(everything[0], other)
    rows = zip(*(t.reshape(-1, *t.shape[len(batch) :]) for t in (H, before, s, y)), keep.reshape(-1), strict=True)
    for now, then, s_one, y_one, kept in rows:
        alone = then[None].clone()
        bfgs_inverse_update_(alone, s_one[None], y_one[None], kept[None])
        assert relative_error(now, alone[0]) < 1e-14  # the same sums, perhaps in another order
        assert torch.equal(now, then) != kept.item()


@pytest.mark.parametrize("ratio", [1e-12, 1.0, 1e12])
def test_update_in_place_keeps_its_digits_whatever_the_scale_of_the_pair(ratio):
    """The vectors of the correction differ in length by the square of `ratio`: plain squares would cancel."""
    generator = torch.Generator().manual_seed(3)
    H, (s, y) = spd(20, 1, generator), pair(20, 0.5, generator)
    actual = H[None].float().clone()
    bfgs_inverse_update_(actual, ratio * s[None].float(), ratio * y[None].float(), torch.tensor([True]))
    assert relative_error(actual[0], bfgs_inverse_update(H, s, y)) < 1e-5  # a few float32 roundings


def test_update_in_place_of_an_estimate_that_knows_the_pair_changes_nothing():
    """But for rounding: of two squares that cancel."""
    H, y = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)), torch.tensor([1.0, 1.0, 0.5]).double()
    actual = H[None].clone()
    bfgs_inverse_update_(actual, (H @ y)[None], y[None], torch.tensor([True]))  # s = H y, exactly: l = 0
    assert relative_error(actual[0], H) < 1e-15


@pytest.mark.parametrize(("size_H", "size_y"), [(1e8, 1e13), (1e6, 1e-21), (10**-8.6, 10**21.9), (1e-15, 1e3)])
def test_update_in_place_where_squares_leave_the_range_of_float32(size_H, size_y):
    """H y beyond 1.8e19, a y below 1e-20: H+ is an ordinary matrix and has to be found."""
    generator = torch.Generator().manual_seed(5)
    H, (s, y) = size_H * spd(10, 1, generator), pair(10, 0.5, generator)
    y, s = y * size_y / y.norm(), s * size_H * size_y / s.norm()
    actual = H[None].float().clone()
    bfgs_inverse_update_(actual, s[None].float(), y[None].float(), torch.tensor([True]))
    assert relative_error(actual[0].double() / size_H, bfgs_inverse_update(H, s, y) / size_H) < 1e-5


def test_update_in_place_refuses_what_would_overflow():
    """Both halves of the guard: a change that is too large, and an H so large that any change may be. Others move."""
    generator = torch.Generator().manual_seed(6)
    H, (s, y) = spd(4, 0, generator).float(), [v.float() for v in pair(4, 1.0, generator)]
    first = torch.eye(4)[0]
    a_tenth_less = (torch.diag(torch.tensor([3e38, 1.0, 1.0, 1.0])), 2.7e19 * first, 1e-19 * first)
    for large, step, change in ((H, 1e38 * s, y / 10), (1e38 * H, s, y / 10), a_tenth_less):
        for place in (0, 1):
            Hs, S, Y = torch.eye(4).repeat(2, 1, 1), torch.ones(2, 4), torch.ones(2, 4)
            Hs[place], S[place], Y[place] = large, step, change
            Y[1 - place, 0] = 2.0
            bfgs_inverse_update_(Hs, S, Y, torch.tensor([True, True]))
            assert torch.equal(Hs[place], large)
            assert relative_error(Hs[1 - place] @ Y[1 - place], S[1 - place]) < 1e-6  # float32 roundings


def test_update_in_place_follows_the_inverse_in_float32():
    """Over a thousand updates."""
    generator = torch.Generator().manual_seed(0)
    M, H = spd(20, 2, generator).float(), torch.eye(20)
    for _ in range(1000):
        s = H @ torch.randn(20, generator=generator)
        bfgs_inverse_update_(H[None], s[None], (M @ s)[None], torch.tensor([True]))
    assert torch.equal(H, H.mT)
    assert relative_error(H @ M, torch.eye(20)) < 1e-3


def random_pairs(count, n, generator, batch=()):
    """Pairs of a slowly varying positive definite Hessian, consecutive steps correlated as under momentum."""
    B = spd(n, 2, generator, batch)
    s = torch.zeros(*batch, n, dtype=torch.float64)
    for _ in range(count):
        s = 0.5 * s + torch.randn(*batch, n, generator=generator, dtype=torch.float64)
        drift = spd(n, 1, generator, batch)
        yield s, ((B + 0.3 * drift) @ s.unsqueeze(-1)).squeeze(-1)


@properties
@given(st.integers(1, 16), st.integers(1, 10), st.integers(0, 30), st.floats(0.1, 10), seeds)
def test_compact_form_is_the_dense_recursion(n, memory, count, gamma, seed):
    """Whatever was rejected in between, and after the window has slid."""
    generator = torch.Generator().manual_seed(seed)
    inverse = LimitedMemoryInverse(n, memory, gamma, dtype=torch.float64)
    kept = []
    for s, y in random_pairs(count, n, generator):
        if torch.rand((), generator=generator) < 0.3:
            inverse.append(s / 0, -y, keep=torch.tensor(False))
        else:
            inverse.append(s, y, keep=torch.tensor(True))
            kept.append((s, y))
    expected = gamma * torch.eye(n, dtype=torch.float64)
    for s, y in kept[-memory:]:
        expected = product_form(expected, s, y)
    assert relative_error(inverse.dense(), expected) < 1e-12
    V = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    assert relative_error(inverse.apply(V), expected @ V) < 1e-12 * torch.linalg.cond(expected)


def test_compact_form_does_not_drift():
    """Thousands of updates of the running inverse leave it as accurate as the first ones."""
    n, memory = 12, 8
    generator = torch.Generator().manual_seed(3)
    inverse = LimitedMemoryInverse(n, memory, dtype=torch.float64)
    pairs = list(random_pairs(3000, n, generator))
    for s, y in pairs:
        inverse.append(s, y)
    R = torch.triu(inverse.S @ inverse.Y.mT)
    assert relative_error(inverse.R_inv @ R, torch.eye(memory, dtype=torch.float64)) < 1e-13
    expected = torch.eye(n, dtype=torch.float64)
    for s, y in pairs[-memory:]:
        expected = bfgs_inverse_update(expected, s, y)
    assert relative_error(inverse.dense(), expected) < 1e-13


def test_rejected_pair_changes_nothing():
    generator = torch.Generator().manual_seed(4)
    inverse = LimitedMemoryInverse(5, 3, dtype=torch.float64)
    for s, y in random_pairs(4, 5, generator):
        inverse.append(s, y)
    before = [t.clone() for t in (inverse.S, inverse.Y, inverse.R_inv)]
    nan = torch.full((5,), torch.nan, dtype=torch.float64)
    inverse.append(nan, nan, keep=torch.tensor(False))
    assert all(torch.equal(now, then) for now, then in zip((inverse.S, inverse.Y, inverse.R_inv), before, strict=True))


def test_batched_compact_form_is_the_loop():
    """Each entry of a batch keeps and rejects its own pairs."""
    generator = torch.Generator().manual_seed(5)
    inverse = LimitedMemoryInverse(6, 4, 0.5, batch=(3,), dtype=torch.float64)
    alone = [LimitedMemoryInverse(6, 4, 0.5, dtype=torch.float64) for _ in range(3)]
    for s, y in random_pairs(12, 6, generator, (3,)):
        keep = torch.rand(3, generator=generator) < 0.6
        inverse.append(s, y, keep)
        for i in range(3):
            alone[i].append(s[i], y[i], keep[i])
    V = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    for i in range(3):
        assert relative_error(inverse.dense()[i], alone[i].dense()) < 1e-14
        assert relative_error(inverse.apply(V)[i], alone[i].apply(V[i])) < 1e-13


def test_compact_form_starts_at_gamma_and_keeps_its_storage():
    inverse = LimitedMemoryInverse(4, 3, 2.5, batch=(2,), dtype=torch.float64)
    assert torch.equal(inverse.dense(), 2.5 * torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    storage = [t.data_ptr() for t in (inverse.S, inverse.Y, inverse.R_inv)]
    s = torch.ones(2, 4, dtype=torch.float64)
    inverse.append(s, 2 * s)
    assert storage == [t.data_ptr() for t in (inverse.S, inverse.Y, inverse.R_inv)]
    assert torch.equal(inverse.S[:, :-1], torch.zeros(2, 2, 4, dtype=torch.float64))  # newest last, empty slots first


def test_no_tensor_is_read_on_the_host():
    with FakeTensorMode():  # holds shapes and no values: reading one raises
        s, y = torch.randn(2, 5), torch.randn(2, 5)
        assert bfgs_inverse_update(torch.eye(5).expand(2, 5, 5), s, y).shape == (2, 5, 5)
        bfgs_inverse_update_(torch.randn(2, 5, 5), s, y, (s * y).sum(-1) > 0)
        inverse = LimitedMemoryInverse(5, 3, batch=(2,))
        inverse.append(s, y, keep=(s * y).sum(-1) > 0)
        assert inverse.apply(torch.randn(2, 5, 7)).shape == (2, 5, 7)


V3, V4 = torch.ones(3), torch.ones(4)
INVERSE = LimitedMemoryInverse(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bfgs_inverse_update(torch.eye(4), V3, V3), ValueError, r"\[4, 4\] and s \[3\]"),
        (lambda: bfgs_inverse_update([[1.0]], V3, V3), TypeError, r"H is a list; expected a tensor \[..., n, n\]"),
        (lambda: bfgs_inverse_update(torch.eye(3), [1.0], V3), TypeError, "s is a list"),
        (lambda: bfgs_inverse_update(torch.eye(3).to("meta"), V3, V3), TypeError, "meta and cpu; convert the pair"),
        (lambda: bfgs_inverse_update(torch.eye(3), V3, V3.to("meta")), TypeError, "s .* on cpu, y .* on meta"),
        (lambda: bfgs_inverse_update(torch.eye(3), V3, V4), ValueError, r"'s': \[3\], 'y': \[4\]"),
        (lambda: bfgs_inverse_update(torch.eye(3), V3.expand(2, 3), V3.expand(2, 3)), ValueError, "leading batch"),
        (lambda: bfgs_inverse_update(torch.eye(3), V3.double(), V3.double()), TypeError, "float32 and torch.float64"),
        (lambda: bfgs_inverse_update(torch.eye(3), V3.long(), V3.long()), TypeError, "int64"),
        (lambda: bfgs_inverse_update_(torch.eye(3), V4, V4, torch.tensor(True)), ValueError, r"H \[3, 3\] and s \[4\]"),
        (lambda: LimitedMemoryInverse(3, 0), ValueError, "memory .* got 0"),
        (lambda: LimitedMemoryInverse(2.5, 1), ValueError, "size .* got 2.5"),
        (lambda: LimitedMemoryInverse(3, 2, -1.0), ValueError, "gamma .* got -1.0"),
        (lambda: INVERSE.append(V4, V4), ValueError, r"\[3\], got \[4\]"),
        (lambda: INVERSE.append(V3.double(), V3.double()), TypeError, "float64"),
        (lambda: INVERSE.append(V3, V3, keep=torch.tensor([True])), ValueError, r"keep .* \[\], got torch.bool \[1\]"),
        (lambda: INVERSE.append(V3, V3, keep=torch.tensor(1.0)), ValueError, "keep .* torch.float32"),
        (lambda: INVERSE.apply(V3), ValueError, r"\[3, 'k'\], got \[3\]"),
        (lambda: INVERSE.apply(torch.eye(3).double()), TypeError, "float64"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()

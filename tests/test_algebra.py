"""algebra: every function against the dense Kronecker product, entry by entry or by torch.kron."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kfqn_core.maths.algebra import kron_matvec, kron_solve, nearest_kronecker, rearrange, unvec, vec

sizes = st.integers(1, 6)
batches = st.lists(st.integers(1, 3), max_size=2).map(tuple)
seeds = st.integers(0, 2**31 - 1)
# Sums of at most 36 products of numbers of order one: some hundred roundings of the largest entry.
tolerance = {torch.float64: 1e-13, torch.float32: 1e-4}
dtypes = st.sampled_from(sorted(tolerance, key=str))
# The first call into a kernel is slow, so no deadline; the same examples on every run.
reproducible = settings(deadline=None, derandomize=True)


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def symmetric_pd(n, seed, rank=None):
    root = randn(n, rank or 2 * n, seed=seed)
    return root @ root.mT


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def dense_kron(A, G):
    """A (x) G by its definition, batched: block (i, j) is A[i, j] G."""
    return torch.einsum("...ij,...kl->...ikjl", A, G).flatten(-4, -3).flatten(-2)


@reproducible
@given(d_out=sizes, d_in=sizes, batch=batches, dtype=dtypes, seed=seeds)
def test_vec_stacks_columns_and_unvec_undoes_it(d_out, d_in, batch, dtype, seed):
    W = randn(*batch, d_out, d_in, seed=seed, dtype=dtype)
    v = vec(W)
    assert v.shape == (*batch, d_out * d_in)
    for i in range(d_in):
        assert torch.equal(v[..., i * d_out : (i + 1) * d_out], W[..., :, i])
    assert torch.equal(unvec(v, d_out), W)


@reproducible
@given(d_out=sizes, d_in=sizes, batch=batches, dtype=dtypes, seed=seeds)
def test_kron_matvec_is_the_dense_product(d_out, d_in, batch, dtype, seed):
    A = randn(*batch, d_in, d_in, seed=seed, dtype=dtype)
    G = randn(*batch, d_out, d_out, seed=seed + 1, dtype=dtype)
    V = randn(*batch, d_out, d_in, seed=seed + 2, dtype=dtype)
    dense = dense_kron(A, G)
    if not batch:
        assert torch.equal(dense, torch.kron(A, G))
    expected = unvec((dense @ vec(V)[..., None])[..., 0], d_out)
    # Against the largest value the sum can take, because the sum itself may cancel.
    scale = A.norm() * G.norm() * V.norm()
    assert (kron_matvec(A, G, V) - expected).norm() <= tolerance[dtype] * scale


@reproducible
@given(d_out=sizes, d_in=sizes, batch=batches, seed=seeds)
def test_kron_solve_is_the_dense_solve(d_out, d_in, batch, seed):
    # Far from singular, so that the tolerance can be a number of roundings.
    A = randn(*batch, d_in, d_in, seed=seed) / d_in**0.5 + 5 * torch.eye(d_in, dtype=torch.float64)
    G = randn(*batch, d_out, d_out, seed=seed + 1) / d_out**0.5 + 5 * torch.eye(d_out, dtype=torch.float64)
    V = randn(*batch, d_out, d_in, seed=seed + 2)
    X = kron_solve(A, G, V)
    expected = unvec(torch.linalg.solve(dense_kron(A, G), vec(V)[..., None])[..., 0], d_out)
    assert relative(X, expected) < 1e-12
    assert relative(kron_matvec(A, G, X), V) < 1e-12


def test_batches_broadcast_and_a_bare_matrix_is_not_taken_for_vectors():
    # Three groups of 3 x 3 factors and one 3 x 3 matrix: torch.linalg.solve alone would read V as three vectors.
    A, G, V = symmetric_pd(3, 0) + randn(3, 3, 3, seed=1) * 0.1, symmetric_pd(3, 2), randn(3, 3, seed=3)
    for function in (kron_matvec, kron_solve):
        together = function(A, G.expand(3, 3, 3), V)
        for group in range(3):
            assert relative(together[group], function(A[group], G, V)) < 1e-12
    many = randn(5, 1, 3, 3, seed=4)
    assert kron_solve(A, G, many).shape == kron_matvec(A, G, many).shape == (5, 3, 3, 3)


def test_a_singular_factor_gives_non_finite_entries():
    A = torch.diag(torch.tensor([1.0, 0.0]))
    assert not torch.isfinite(kron_solve(A, torch.eye(2), torch.ones(2, 2))).all()


@reproducible
@given(d_out=sizes, d_in=sizes, batch=batches, seed=seeds)
def test_rearrange_makes_a_kronecker_product_rank_one(d_out, d_in, batch, seed):
    A, G = randn(*batch, d_in, d_in, seed=seed), randn(*batch, d_out, d_out, seed=seed + 1)
    assert torch.equal(rearrange(dense_kron(A, G), d_in, d_out), vec(A)[..., :, None] * vec(G)[..., None, :])
    H = randn(*batch, d_in * d_out, d_in * d_out, seed=seed + 2)
    R = rearrange(H, d_in, d_out)
    assert torch.equal(R.flatten().sort().values, H.flatten().sort().values)  # entries are moved, none changed


@reproducible
@given(d_out=sizes, d_in=sizes, batch=batches, dtype=dtypes, seed=seeds)
def test_nearest_kronecker_recovers_a_kronecker_product(d_out, d_in, batch, dtype, seed):
    A, G = randn(*batch, d_in, d_in, seed=seed, dtype=dtype), randn(*batch, d_out, d_out, seed=seed + 1, dtype=dtype)
    H = dense_kron(A, G)
    A1, G1 = nearest_kronecker(H, d_in, d_out)
    assert A1.dtype == G1.dtype == dtype
    assert relative(dense_kron(A1, G1), H) < tolerance[dtype]
    assert relative(A1.norm(dim=(-2, -1)), G1.norm(dim=(-2, -1))) < tolerance[dtype]
    assert (A1.diagonal(dim1=-2, dim2=-1).sum(-1) >= 0).all()


def test_factors_can_be_multiplied_with_other_matrices():
    """torch.kron raises for a matrix beside a view with other strides."""
    A, G = nearest_kronecker(torch.randn(12, 12, dtype=torch.float64), 4, 3)
    assert torch.kron(A, torch.eye(3, dtype=torch.float64)).shape == (12, 12)
    assert torch.kron(torch.eye(4, dtype=torch.float64), G).shape == (12, 12)
    assert torch.kron(torch.eye(4), unvec(torch.randn(12), 4)).shape == (16, 12)


@reproducible
@given(d_out=st.integers(2, 5), d_in=st.integers(2, 5), seed=seeds)
def test_nearest_kronecker_is_optimal(d_out, d_in, seed):
    H = randn(d_in * d_out, d_in * d_out, seed=seed)
    A, G = nearest_kronecker(H, d_in, d_out)
    error = (H - torch.kron(A, G)).norm()
    # The tail is computed without this room: R by loops over blocks, its singular values by the symmetric eigenproblem.
    rows = [vec(H[i * d_out :, j * d_out :][:d_out, :d_out]) for j in range(d_in) for i in range(d_in)]
    R = torch.stack(rows)
    squared = torch.linalg.eigvalsh(R @ R.mT if d_in <= d_out else R.mT @ R)
    tail = squared[:-1].sum().sqrt()
    assert relative(error, tail) < 1e-12
    # The optimum is a least-squares solution in each factor while the other is held: the two normal equations.
    blocks = H.unflatten(-1, (d_in, d_out)).unflatten(-3, (d_in, d_out))
    assert relative(torch.einsum("ikjl,kl->ij", blocks, G), A * G.square().sum()) < 1e-12
    assert relative(torch.einsum("ikjl,ij->kl", blocks, A), G * A.square().sum()) < 1e-12
    for k in range(20):  # nothing nearby, and nothing far away, does better
        size = 10.0 ** -(k % 5)
        other = torch.kron(A + size * randn(d_in, d_in, seed=seed + k), G + size * randn(d_out, d_out, seed=seed - k))
        assert (H - other).norm() >= error * (1 - 1e-12)


@reproducible
@given(d_out=st.integers(1, 5), d_in=st.integers(1, 5), rank=st.integers(1, 8), seed=seeds)
def test_nearest_kronecker_inherits_positive_semidefiniteness(d_out, d_in, rank, seed):
    H = symmetric_pd(d_in * d_out, seed, rank)
    singular_values = torch.linalg.svdvals(rearrange(H, d_in, d_out))
    for factor in nearest_kronecker(H, d_in, d_out):
        # Roundings of the size eps * sigma_1 turn the leading pair by eps * sigma_1 / gap.
        gap = 1 - (singular_values[1] / singular_values[0]).item() if len(singular_values) > 1 else 1.0
        slack = 1e-13 * factor.norm() / gap
        assert (factor - factor.mT).norm() <= slack
        assert torch.linalg.eigvalsh(factor).min() >= -slack


def test_a_symmetric_indefinite_matrix_may_have_skew_factors():
    J = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    H = torch.kron(J, J)
    A, G = nearest_kronecker(H, 2, 2)
    assert torch.equal(H, H.mT)
    assert relative(torch.kron(A, G), H) < 1e-14
    assert torch.allclose(A, -A.mT, atol=1e-14)
    assert torch.allclose(G, -G.mT, atol=1e-14)


def test_nearest_kronecker_of_zero_is_zero():
    A, G = nearest_kronecker(torch.zeros(6, 6), 2, 3)
    assert not A.any()
    assert not G.any()


def test_inputs_stay_and_nothing_is_read_on_the_host():
    A, G, V, H = symmetric_pd(2, 0), symmetric_pd(3, 1), randn(3, 2, seed=2), symmetric_pd(6, 3)
    before = [tensor.clone() for tensor in (A, G, V, H)]
    kron_matvec(A, G, V), kron_solve(A, G, V), nearest_kronecker(H, 2, 3)
    assert all(torch.equal(new, old) for new, old in zip((A, G, V, H), before, strict=True))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:  # a fake tensor has no values: any read raises
        A, G, V, H = (mode.from_tensor(tensor) for tensor in (A, G, V, H))
        assert kron_matvec(A, G, V).shape == kron_solve(A, G, V).shape == unvec(vec(V), 3).shape == (3, 2)
        assert [factor.shape for factor in nearest_kronecker(H, 2, 3)] == [(2, 2), (3, 3)]


I2, I3, V32 = torch.eye(2), torch.eye(3), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: vec(torch.ones(3)), ValueError, r"W has shape \[3\]; expected a matrix"),
        (lambda: vec([[1.0]]), TypeError, "W is a list; expected a tensor"),
        (lambda: unvec(torch.ones(7), 3), ValueError, r"v has shape \[7\].* d_out = 3 divides"),
        (lambda: unvec(torch.tensor(1.0), 1), ValueError, r"v has shape \[\]"),
        (lambda: unvec([1.0], 1), TypeError, "v is a list"),
        (lambda: unvec(torch.ones(6), 0), ValueError, "d_out is 0; expected a positive integer"),
        (lambda: unvec(torch.ones(6), 2.0), TypeError, "d_out is 2.0; expected a positive integer"),
        (lambda: kron_matvec(I3, I2, V32), ValueError, r"V has shape \[3, 2\]; expected \[..., 2, 3\].*exchange"),
        (lambda: kron_solve(V32, I3, V32), ValueError, r"A has shape \[3, 2\]; expected a square factor"),
        (lambda: kron_matvec(I2.double(), I3, V32), TypeError, "A is torch.float64 on cpu, V is torch.float32 on cpu"),
        (lambda: kron_matvec(I2.to("meta"), I3, V32), TypeError, "A is torch.float32 on meta, V is .* one device"),
        (lambda: kron_matvec(I2.int(), I3.int(), V32.int()), TypeError, "A is torch.int32; expected a real floating"),
        (
            lambda: kron_solve(I2.expand(2, 2, 2), I3.expand(4, 3, 3), V32),
            ValueError,
            r"batch dimensions \{'A': \[2\], 'G': \[4\], 'V': \[\]\} do not broadcast",
        ),
        (lambda: rearrange(torch.eye(6), 2, 2), ValueError, r"H has shape \[6, 6\]; expected \[..., 4, 4\]"),
        (lambda: rearrange(torch.eye(6), -2, -3), ValueError, "d_in is -2"),
        (lambda: nearest_kronecker(torch.eye(6).half(), 2, 3), TypeError, "H is torch.float16; expected torch.float32"),
    ],
)
def test_bad_input_is_named_at_the_door(call, error, words):
    with pytest.raises(error, match=words):
        call()

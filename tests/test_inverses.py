"""What may enter an inverse estimate, what enters it, and what it begins with."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kfqn_core.estimate.inverses import DenseInverse, acceptable, append_together, positive_inverse
from kfqn_core.lab.checks import relative_error
from kfqn_core.maths.secant import LimitedMemoryInverse, bfgs_inverse_update
from tests.test_activation import F64, TRUE, random_spd


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


def test_a_refused_or_overflowing_pair_leaves_the_inverse():
    inverse = DenseInverse(2, groups=2, dtype=torch.float32)
    s = torch.ones(2, 2)
    inverse.append(s, 2 * s, acceptable(s, 2 * s, torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])))
    assert relative_error(inverse.dense()[0] @ (2 * s[0]), s[0]) < 1e-6
    assert torch.equal(inverse.dense()[1], torch.eye(2))
    before = inverse.dense().clone()
    s, y = 1e18 * s, 1e-21 * s
    assert acceptable(s, y, 1e-54 * s).all()
    inverse.append(s, y, TRUE.expand(2))  # but H+ overflows float32
    assert torch.equal(inverse.dense(), before)
    V = torch.arange(8.0).reshape(2, 2, 2)
    assert torch.equal(inverse.apply(V), before @ V)


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_pairs_side_by_side_enter_as_each_would_alone(bad):
    """A pair that is refused, or not a number, disturbs nobody else; addresses do not move."""
    generator = torch.Generator().manual_seed(0)
    n, B = 7, 5
    s, v = torch.randn(2, B, n, generator=generator, dtype=F64)
    y = (random_spd(n, 1, B) @ s[..., None])[..., 0]
    y[2] = bad * s[2]
    H = random_spd(n, 2, B)
    inverse, memory = DenseInverse(n, groups=B, dtype=F64), LimitedMemoryInverse(n, 3, batch=(B,), dtype=F64)
    inverse.H.copy_(H)
    address = inverse.dense().data_ptr()
    keep = acceptable(s, y, v)
    assert keep.tolist() == [i != 2 for i in range(B)]
    for estimate in (inverse, memory):
        estimate.append(s, y, torch.zeros(B, dtype=torch.bool))
    assert torch.equal(inverse.dense(), H)
    assert not memory.S.any()
    for estimate in (inverse, memory):
        estimate.append(s, y, keep)
    for i in range(B):
        alone = LimitedMemoryInverse(n, 3, dtype=F64)
        expected = H[i]
        if i != 2:
            expected = bfgs_inverse_update(H[i], s[i], y[i])
            alone.append(s[i], y[i])
        assert relative_error(inverse.dense()[i], expected) < 1e-12  # condition 1e4 times the rounding
        assert relative_error(memory.dense()[i], alone.dense()) < 1e-14
    assert torch.equal(inverse.dense()[2], H[2])
    assert inverse.dense().data_ptr() == address


def second_moments(n, samples, scale, seed, batch=2):
    """`A` as float32 computes it, of inputs between 0 and `scale` (so that their mean is one large direction)."""
    generator = torch.Generator().manual_seed(seed)
    a = scale * torch.rand(batch, samples, n, generator=generator)
    return a.mT @ a / samples


@pytest.mark.parametrize("scale", [1.0, 255.0, 1e4, 1e6])
@pytest.mark.parametrize(("n", "samples"), [(10, 3), (60, 8), (60, 59), (300, 40), (300, 1)])
@pytest.mark.parametrize("damping", [0.03, 0.5])
def test_positive_inverse_is_positive_in_float32_whatever_the_scale_of_the_inputs(n, samples, scale, damping):
    """With fewer samples than inputs A is singular, and its rounding errors exceed the damping by far."""
    for seed in range(3):
        A = second_moments(n, samples, scale, seed)
        H = positive_inverse(A, damping)
        assert torch.equal(H, H.mT)
        eigenvalues = torch.linalg.eigvalsh(H.double())
        assert (eigenvalues > 0).all()
        assert (H.diagonal(dim1=-2, dim2=-1) <= (1 + 1e-3) / damping).all()
        # What is judged is the diagonal. Of one sample, rounding errors stand alone: all of them in one direction.
        assert (eigenvalues <= (1 + 1e-3 if samples > 1 else 5) / damping).all()


@pytest.mark.parametrize("damping", [0.03, 2.0, torch.tensor([0.03, 0.1, 1.0], dtype=F64)])
def test_positive_inverse_is_the_inverse(damping):
    A = random_spd(8, 3, groups=3)
    M = A + torch.as_tensor(damping, dtype=F64).reshape(-1, 1, 1) * torch.eye(8, dtype=F64)
    H = positive_inverse(A, damping)
    assert relative_error(H, torch.linalg.inv(M)) < 1e-15 * torch.linalg.cond(M).max() * 8
    assert torch.equal(H, H.mT)


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_positive_inverse_in_float32_is_that_of_float64_up_to_what_float32_resolves(scale):
    """As many samples as there are directions worth resolving; the shift is 1e-7 of the trace."""
    A = second_moments(20, 500, scale, 0).double()
    damping = 1e-3 * A.diagonal(dim1=-2, dim2=-1).sum(-1).mean().item()
    expected = torch.linalg.inv(A + damping * torch.eye(20, dtype=F64))
    assert relative_error(positive_inverse(A.float(), damping), expected) < 1e-3  # eps times the condition, 1e3


def test_the_inverse_of_the_diagonal_stands_for_one_that_there_is_not():
    """Of a matrix that is not positive semidefinite, which no exact second moment is; its neighbours are inverted."""
    good, indefinite = random_spd(3, 0), torch.tensor([[[1.0, 5, 0], [5, 1, 0], [0, 0, 1]]], dtype=F64)
    # A factor exists, but its inverse is longer than that of any positive semidefinite matrix: 1 / damping.
    below = torch.diag(torch.tensor([-0.4, 1.0, 1.0], dtype=F64))[None]
    H = positive_inverse(torch.cat([good, indefinite, below]), 0.5)
    assert relative_error(H[0], torch.linalg.inv(good[0] + 0.5 * torch.eye(3, dtype=F64))) < 1e-12
    assert relative_error(H[1], torch.eye(3, dtype=F64) / 1.5) < 1e-14
    assert relative_error(H[2], torch.diag(1 / torch.tensor([0.1, 1.5, 1.5], dtype=F64))) < 1e-14


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_where_it_is(poison):
    A = random_spd(3, 0, groups=3)
    expected = positive_inverse(A, 0.5)
    A[1, 0, 2] = A[1, 2, 0] = poison
    H = positive_inverse(A, 0.5)
    assert torch.equal(H[[0, 2]], expected[[0, 2]])


def test_no_tensor_is_read_on_the_host():
    with FakeTensorMode():  # holds shapes and no values: reading one raises
        inverse = DenseInverse(4, groups=3)
        s = torch.randn(3, 4)
        inverse.append(s, s, acceptable(s, s, s))
        assert positive_inverse(inverse.apply(torch.randn(3, 4, 4)), 0.1).shape == (3, 4, 4)
        assert positive_inverse(inverse.dense(), torch.ones(3)).shape == (3, 4, 4)


def test_pairs_of_several_sizes_enter_together_as_each_would_alone():
    """Where they are acceptable, asked for, and where H+ is finite."""
    generator = torch.Generator().manual_seed(7)
    inverses, pairs, keep, alone = [], [], [], []
    for n, B in ((3, 2), (5, 4), (1, 1)):
        H = random_spd(n, n, B)
        s, v = torch.randn(2, B, n, generator=generator, dtype=F64)
        y = (random_spd(n, n + 1, B) @ s[..., None])[..., 0]
        y[-1] *= -1 if B > 1 else 1  # a pair that is not acceptable
        wanted = torch.arange(B) != 0 if B > 2 else torch.ones(B, dtype=torch.bool)
        for estimates in (inverses, alone):
            estimates.append(DenseInverse(n, groups=B, dtype=F64))
            estimates[-1].H.copy_(H)
        pairs.append((s, y, v))
        keep.append(wanted)
        alone[-1].append(s, y, acceptable(s, y, v) & wanted)
    append_together(inverses, pairs, keep)
    for together, one in zip(inverses, alone, strict=True):
        assert relative_error(together.H, one.H) < 1e-13  # the same sums, in another order


def test_of_pairs_that_enter_together_one_that_would_overflow_is_refused():
    inverse, s = DenseInverse(2, groups=2, dtype=torch.float32), torch.ones(2, 2)
    s[0] *= 1e18
    y = torch.stack([1e-21 * torch.ones(2), 2 * s[1]])  # H+ would hold 5e38
    append_together([inverse], [(s, y, 1e-6 * torch.ones(2, 2) * torch.tensor([[0.0], [1.0]]))], [TRUE.expand(2)])
    assert torch.equal(inverse.H[0], torch.eye(2))
    assert relative_error(inverse.H[1] @ y[1], s[1]) < 1e-6

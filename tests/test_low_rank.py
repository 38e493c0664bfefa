"""The low-rank `H_a`: Nystroem's formula, Woodbury's inverse, the subspace it finds, and what it never forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kfqn_core.estimate.low_rank import SHIFT, LowRankActivationFactor, nystroem
from kfqn_core.lab.checks import relative_error
from kfqn_core.maths.columns import Columns
from tests.test_activation import F64, LIKE, TRUE, damped, linear_case, properties, record_of, second_moment

LAYERS = {
    "linear": (nn.Linear(9, 3), (40, 9)),
    "no bias": (nn.Linear(9, 3, bias=False), (40, 9)),
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (12, 4, 7, 6)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding="same", dilation=2), (12, 4, 7, 6)),
    "circular": (nn.Conv1d(3, 2, 4, padding=2, padding_mode="circular"), (12, 3, 9)),
}


def case(name, seed=0):
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return record_of(layer.double(), x * torch.linspace(0.2, 2, shape[-1], dtype=F64))


def factor_of(record, rank, damping=0.1):
    return LowRankActivationFactor(record.view, damping, rank, **LIKE)


def orthonormal(n, rank, seed):
    return torch.linalg.qr(torch.randn(2, n, rank, generator=torch.Generator().manual_seed(seed), dtype=F64)).Q


@properties
@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 2**16))
def test_nystroem_is_its_formula(n, rank, seed):
    rank = min(rank, n)
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(2, n, n, generator=generator, dtype=F64)
    A, Q = root @ root.mT, orthonormal(n, rank, seed)
    Y = A @ Q
    F, core = nystroem(Q, Y), Q.mT @ Y
    shift = SHIFT * core.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] * torch.eye(rank, dtype=F64)
    expected = Y @ torch.linalg.inv(core + shift) @ Y.mT
    assert relative_error(F @ F.mT, expected) < 1e-15 / SHIFT  # the small matrix has condition at most rank / SHIFT


def test_nystroem_is_exact_up_to_its_rank():
    root = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    A, Q = root @ root.mT, orthonormal(10, 5, 1)
    F = nystroem(Q, A @ Q)
    assert relative_error(F @ F.mT, A) < 100 * SHIFT  # relative to the smallest eigenvalue of Q^T A Q that is not zero
    Q = Q[..., :2]  # too few: exact on Q alone
    F = nystroem(Q, A @ Q)
    assert relative_error(F @ F.mT @ Q, A @ Q) < 100 * SHIFT
    assert relative_error(F @ F.mT, A) > 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_is_that_of_the_matrix_it_stands_for(name):
    record = case(name)
    factor = factor_of(record, 3)
    factor.start(record)
    factor.update(case(name, 1), TRUE)
    F = factor.F
    rest = (factor.d - F.square().sum(-1)).clamp_min(0)
    matrix = damped(F @ F.mT + torch.diag_embed(rest), 0.1)
    assert relative_error(factor.H, torch.linalg.inv(matrix)) < 1e-11  # conditions up to 1e4
    M = torch.randn(record.view.groups, record.view.d_out, record.view.d_in, dtype=F64)
    product = factor.precondition(Columns.split(M, record.view.has_bias))
    assert relative_error(product, M @ factor.H) < 1e-13


@pytest.mark.parametrize("name", LAYERS)
def test_diagonal_is_exact(name):
    record = case(name)
    assert relative_error(record.diagonal(), second_moment(record).diagonal(dim1=-2, dim2=-1)) < 1e-13
    factor = factor_of(record, 2)
    factor.start(record)
    factor.update(case(name, 1), TRUE)
    diagonals = [second_moment(case(name, seed)).diagonal(dim1=-2, dim2=-1) for seed in (0, 1)]
    assert relative_error(factor.d, 0.9 * diagonals[0] + 0.1 * diagonals[1]) < 1e-13


def test_inputs_in_a_small_space_give_the_exact_inverse():
    basis = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=F64) @ basis
    record = record_of(nn.Linear(9, 3, dtype=F64), x)
    factor = factor_of(record, 4)  # three directions and the bias
    factor.start(record)
    exact = torch.linalg.inv(damped(second_moment(record), 0.1))
    assert relative_error(factor.H, exact) < 1e-3  # SHIFT times the condition of A + lambda I
    few = factor_of(record, 2)
    few.start(record)
    assert relative_error(few.H, exact) > 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_updates_find_the_leading_eigenspace(name):
    record = case(name)
    factor = factor_of(record, 3)
    A = second_moment(record)
    values, vectors = torch.linalg.eigh(A)
    top = vectors[..., -3:]

    def kept(F):  # of the trace of A, against the most that three directions can hold
        Q = torch.linalg.qr(F).Q
        return ((Q * (A @ Q)).sum((-1, -2)) / values[..., -3:].sum(-1)).min().item()

    factor.start(record)
    start = kept(factor.F)
    for _ in range(500):
        factor.update(record, TRUE)
    assert start < kept(factor.F) < 1 + 1e-12
    assert kept(factor.F) > 0.999  # some of these spectra have hardly a gap behind the third eigenvalue
    if name == "linear":
        Q = torch.linalg.qr(factor.F).Q
        sine = torch.linalg.matrix_norm(top - Q @ (Q.mT @ top), 2).max()
        assert sine < 1e-4  # the shift turns the subspace by about SHIFT over the gap
        assert relative_error(torch.linalg.svdvals(factor.F).square().flip(-1), values[..., -3:]) < 100 * SHIFT


def test_warm_start_and_first_mini_batch_agree():
    record = case("groups")
    streamed, formed = factor_of(record, 3), factor_of(record, 3)
    streamed.start(record)
    formed.start_from(second_moment(record))
    assert relative_error(streamed.H, formed.H) < 1e-9  # power iterations multiply rounding by the gaps


def test_a_factor_that_starts_from_nothing_finds_its_directions():
    """Also where the first inputs are dead, as at the border of images: unit vectors would see nothing there."""
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=F64)
    x[:, :4] = 0
    layer = nn.Linear(12, 3, bias=False, dtype=F64)
    good, bad = record_of(layer, x), record_of(layer, torch.full_like(x, torch.nan))
    factor = factor_of(good, 3)
    factor.start(bad)
    for _ in range(60):
        factor.update(good, TRUE)
    leading = torch.linalg.eigvalsh(second_moment(good)[0])[-3:]
    assert relative_error(torch.linalg.svdvals(factor.F[0]).square().flip(0), leading) < 0.02  # 0.9^60 is missing


def test_lost_directions_come_back():
    """Equal samples have one direction; with different ones the others are found again."""
    record = case("linear")
    x = record.uses[0].x
    factor = factor_of(record, 3)
    factor.start(record_of(nn.Linear(9, 3, dtype=F64), x[:1].expand(40, -1)))
    for _ in range(200):
        factor.update(record, TRUE)
    top = torch.linalg.eigvalsh(second_moment(record))[..., -3:]
    assert relative_error(torch.linalg.svdvals(factor.F).square().flip(-1), top) < 1e-3


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_non_finite_mini_batch_changes_nothing(poison):
    record = case("conv")
    factor = factor_of(record, 3)
    factor.start(record)
    before = {name: tensor.clone() for name, tensor in factor.tensors().items()}
    x = record.uses[0].x.clone()
    x[2, 1] = poison
    factor.update(record_of(LAYERS["conv"][0], x), torch.tensor(False))  # the optimizer saw it in the loss
    factor.update(record_of(LAYERS["conv"][0], x), TRUE)  # it did not
    for name, tensor in factor.tensors().items():
        assert torch.equal(tensor, before[name])
    factor.update(record, torch.tensor(False))
    assert torch.equal(factor.F, before["F"])


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_useless_first_mini_batch_is_no_start(value):
    """The factor is the identity as before, says so, and learns afterwards all the same."""
    record = case("no bias")
    factor = factor_of(record, 3, damping=0.5)
    assert factor.start(record_of(LAYERS["no bias"][0], torch.full((4, 9), value, dtype=F64))).tolist() == [False]
    assert torch.equal(factor.H, torch.eye(9, dtype=F64)[None])
    for _ in range(200):
        factor.update(record, TRUE)
    top = torch.linalg.eigvalsh(second_moment(record))[..., -3:]
    assert relative_error(torch.linalg.svdvals(factor.F).square().flip(-1), top) < 1e-3


def test_a_first_mini_batch_that_is_not_finite_starts_only_the_groups_that_are():
    record = case("groups")
    x = record.uses[0].x.clone()
    x[3, 3] = torch.nan  # of the second group
    factor, expected = factor_of(record, 3), factor_of(record, 3)
    expected.start(record)
    assert factor.start(record_of(LAYERS["groups"][0], x)).tolist() == [True, False]
    assert relative_error(factor.H[0], expected.H[0]) < 1e-9  # power iterations multiply rounding by the gaps
    assert torch.equal(factor.H[1], torch.eye(record.view.d_in, dtype=F64))
    assert factor.start(record, torch.tensor([False, True])).tolist() == [False, True]
    assert relative_error(factor.H, expected.H) < 1e-9


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(500, 3), (60, 500)), (nn.Conv2d(32, 4, 5, padding=2), (2, 32, 8, 8))]
)
def test_no_matrix_of_the_inputs_and_no_patches(layer, shape):
    record = record_of(layer, torch.randn(shape))
    factor = LowRankActivationFactor(record.view, 0.1, 4, dtype=torch.float32, device=torch.device("cpu"))
    d, T = record.view.d_in, record.T
    with Largest() as largest:
        factor.start(record)
        factor.update(record, TRUE)
        factor.precondition(Columns.split(torch.randn(1, record.view.d_out, d), True))
    assert largest.entries < d * d / 3
    assert largest.entries < shape[0] * T * d / 3 or T == 1  # patches; of a linear layer they are the input itself
    assert sum(t.numel() for t in factor.tensors().values()) == (2 * 4 + 2) * d


def test_groups_are_independent_factors():
    """Also in their start, which is from the same directions in each, and with a damping for each of them."""
    _, record = linear_case(6, 12, 1, groups=2)
    x = record.uses[0].x
    factor = factor_of(record, 2)
    factor.damping = torch.tensor([[0.1], [0.7]], dtype=F64)
    factor.start(record)
    factor.update(record)
    for group, damping in enumerate((0.1, 0.7)):
        alone = record_of(nn.Conv2d(6, 1, 1, dtype=F64), x[:, 6 * group : 6 * group + 6])
        single = factor_of(alone, 2, damping)
        single.start(alone)
        single.update(alone)
        assert relative_error(factor.H[group], single.H[0]) < 1e-9  # power iterations multiply rounding by the gaps


def test_decay_weighs_the_past():
    """As a running mean over mini-batches asks for: 1/2 at the second, 2/3 at the third."""
    records = [case("conv", seed) for seed in range(3)]
    factor = factor_of(records[0], 3)
    factor.start(records[0])
    for k, record in enumerate(records[1:], 1):
        Q, decay = factor.probe(record), k / (k + 1)
        running = decay * factor.F @ factor.F.mT + (1 - decay) * second_moment(record)
        factor.update(record, decay=decay)
        F = nystroem(Q, running @ Q)
        assert relative_error(factor.F @ factor.F.mT, F @ F.mT) < 1e-15 / SHIFT  # the condition of the small matrix
    mean = torch.stack([second_moment(record).diagonal(dim1=-2, dim2=-1) for record in records]).mean(0)
    assert relative_error(factor.d, mean) < 1e-13


def test_no_tensor_is_read_on_the_host():
    with FakeTensorMode(allow_non_fake_inputs=True):  # holds shapes and no values: reading one raises
        record = record_of(nn.Conv2d(4, 2, 3, groups=2), torch.randn(3, 4, 6, 6))
        factor = LowRankActivationFactor(record.view, 0.1, 4, dtype=torch.float32, device=torch.device("cpu"))
        where = factor.start(record)
        factor.update(record, where)
        assert factor.H.shape == (2, 19, 19)

"""The matrix with its bias column apart, against the joined matrix, in float64."""

import pytest
import torch

from kfqn_core.lab.checks import relative_error
from kfqn_core.maths.columns import Columns

F64 = torch.float64


def matrix(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (1, 1, 2), (2, 3, 4, 5)])
def test_split_and_joined_are_opposites_and_split_copies_nothing(shape, has_bias):
    W = matrix(*shape)
    parts = Columns.split(W, has_bias)
    assert parts.W.shape == (*shape[:-1], shape[-1] - has_bias)
    assert (parts.b is not None) == has_bias
    assert torch.equal(parts.joined(), W)
    for part in filter(lambda part: part is not None, parts):
        part.fill_(7.0)
    assert torch.equal(W, torch.full_like(W, 7.0))
    assert not has_bias or torch.equal(parts.b[..., 0], W[..., -1])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("d_in", [2, 5, 8, 9, 40])
def test_product_with_a_matrix_is_that_of_the_joined_matrix(d_in, dtype, has_bias):
    W = matrix(3, 4, d_in, dtype=dtype)
    parts = Columns.split(W, has_bias)
    tolerance = 10 * torch.finfo(dtype).eps  # sums of up to 40 products
    for H in (matrix(3, d_in, d_in, seed=1, dtype=dtype), matrix(3, d_in, 2, seed=2, dtype=dtype)):
        product = parts.times(H)
        assert product.dtype == dtype
        assert relative_error(product, W.double() @ H.double()) < tolerance
    assert torch.equal(parts.joined(), W)  # which is only read


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("d_in", [2, 5, 8, 9, 40])
def test_product_with_a_diagonal_is_that_of_the_joined_matrix(d_in, dtype, has_bias):
    W, e = matrix(3, 4, d_in, dtype=dtype), matrix(3, d_in, seed=1, dtype=dtype)
    parts = Columns.split(W, has_bias)
    assert torch.equal(parts.scaled(e), W * e[:, None])  # one rounding each, the same
    assert torch.equal(parts.joined(), W)


@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_written_where_they_are_wanted(has_bias):
    """Also into a part of something larger, of which nothing else changes."""
    W, H, e = matrix(2, 3, 5), matrix(2, 5, 5, seed=1), matrix(2, 5, seed=2)
    parts = Columns.split(W, has_bias)
    for write, expected in (
        (lambda out: parts.times(H, out=out), W @ H),
        (lambda out: parts.scaled(e, out=out), W * e[:, None]),
    ):
        whole = torch.full((40,), 7.0, dtype=F64)
        out = whole[4:34].view(2, 3, 5)
        assert write(out).data_ptr() == out.data_ptr()
        assert relative_error(out, expected) < 1e-14  # sums of five products
        assert torch.equal(whole[[*range(4), *range(34, 40)]], torch.full((10,), 7.0, dtype=F64))

"""The matrix with its bias column apart, against the joined matrix, in float64."""

import pytest
import torch

from kfqn_core.lab.checks import relative_error
from kfqn_core.maths import columns
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


# Rows of even and odd length, shorter and longer than the 64 bytes to which they are laid out.
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


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_rows_of_a_large_product_begin_at_multiples_of_64_bytes_and_gaps_are_not_read(dtype):
    """Gaps hold anything; here NaN. Also for a matrix with fewer columns, as the basis of a low-rank factor has."""
    d_out = columns.LARGE // 301 + 1
    parts = Columns.split(matrix(2, d_out, 301, dtype=dtype), True)
    H, e = matrix(2, 301, 301, seed=1, dtype=dtype), matrix(2, 301, seed=2, dtype=dtype)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN, in deterministic mode
    torch.use_deterministic_algorithms(True)
    try:
        product, scaled, thin = parts.times(H), parts.scaled(e), parts.times(H[..., :9])
    finally:
        torch.use_deterministic_algorithms(False)
    for found, expected in (
        (product, parts.joined().double() @ H.double()),
        (scaled, parts.joined().double() * e.double()[:, None]),
        (thin, parts.joined().double() @ H[..., :9].double()),
    ):
        assert relative_error(found, expected) < 100 * torch.finfo(dtype).eps  # sums of 301 products
    assert product.stride(1) % (64 // product.element_size()) == 0

"""lab.checks: the error every chapter prints."""

import math

import numpy as np
import pytest
import torch

from kfqn_core.lab.checks import relative_error


def test_relative_error_is_the_quotient_of_frobenius_norms():
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    actual = expected + torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    assert relative_error(actual, expected) == pytest.approx(0.1, rel=1e-15)
    assert relative_error(actual.numpy(), expected) == relative_error(actual, expected)


def test_relative_error_of_zero_and_of_nonfinite_values():
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert math.isinf(relative_error(torch.ones(2), torch.zeros(2)))
    assert not relative_error(torch.tensor([math.nan, 1.0]), torch.ones(2)) < 1e-3
    assert not relative_error(torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.0])) < 1e-3


def test_relative_error_is_computed_in_float64_and_keeps_imaginary_parts():
    one = torch.ones(1, dtype=torch.float64)
    assert relative_error(one + 1e-12, one) == pytest.approx(1e-12, rel=1e-3)
    assert relative_error(np.array([1 + 1j]), np.array([1 + 0j])) == pytest.approx(1.0)
    assert relative_error(1 + 1e-12, 1.0) == pytest.approx(1e-12, rel=1e-3)  # Python numbers are float64, too
    assert relative_error([1 + 1e-12], one) == pytest.approx(1e-12, rel=1e-3)


def test_relative_error_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(3,\)"):
        relative_error(torch.ones(3, 1), torch.ones(3))

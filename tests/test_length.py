"""Lengths of all directions at once against the plain forms, which say what is meant, layer by layer in float64."""

import pytest
import torch

from kfqn_core.lab.checks import relative_error
from kfqn_core.training import length
from kfqn_core.training.length import Lengths

F64 = torch.float64
PLAIN = {"raw": length.raw, "normalised": length.normalised, "normalised_rows": length.normalised_rows}
# Groups of layers of one shape: how many layers, groups of each, d_out, d_in.
SIZES = [(1, 1, 4, 5), (3, 1, 2, 7), (2, 3, 4, 2), (1, 1, 1, 1), (1, 2, 1, 6)]


def directions(sizes=SIZES, dtype=F64):
    """Of lengths between 1e-3 and 1e3, and with rows that differ as much."""
    generator = torch.Generator().manual_seed(0)

    def spread(*shape):
        return 10 ** (6 * torch.rand(*shape, generator=generator, dtype=F64) - 3)

    return [
        (torch.randn(B, d_out, d_in, generator=generator, dtype=F64) * spread(B, d_out, 1) * spread(B, 1, 1)).to(dtype)
        for B, d_out, d_in in ((L * groups, d_out, d_in) for L, groups, d_out, d_in in sizes)
    ]


def steps(Ds, step_length, sizes=SIZES):
    """Every direction over what it is divided by, layer by layer."""
    lengths = Lengths(sizes, Ds[0])
    norms = torch.cat([D.norm(dim=-1).view(-1) for D in Ds])
    divisors = lengths.by_group(lengths.divisors(norms, step_length))
    return [
        part for D, divisor, (L, *_) in zip(Ds, divisors, sizes, strict=True) for part in (D / divisor).chunk(L)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("step_length", PLAIN)
def test_lengths_of_all_layers_are_those_of_each_by_its_plain_form(step_length, dtype):
    Ds = directions(dtype=dtype)
    layers = [layer for D, (L, *_) in zip(Ds, SIZES, strict=True) for layer in D.double().chunk(L)]
    for step, layer in zip(steps(Ds, step_length), layers, strict=True):
        assert relative_error(step, PLAIN[step_length](layer)) < 10 * torch.finfo(dtype).eps  # a few roundings


@pytest.mark.parametrize("step_length", PLAIN)
def test_groups_of_other_shapes_do_not_matter(step_length):
    """Nor how large they are: each alone is bitwise what it is beside the others."""
    Ds = directions()
    together = steps(Ds, step_length)
    alone = [step for D, size in zip(Ds, SIZES, strict=True) for step in steps([D], step_length, [size])]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


def test_plain_forms_have_the_lengths_that_they_promise():
    for D in directions():
        assert length.raw(D) is D
        root_mean_square = length.normalised(D).square().mean().sqrt().item()
        assert root_mean_square == pytest.approx(0.2, rel=1e-14)
        rows = length.normalised_rows(D).norm(dim=-1)
        norms = D.norm(dim=-1)
        expected = length.ROW * norms / (norms + 1e-3 * norms.mean())
        assert relative_error(rows, expected) < 1e-14


@pytest.mark.parametrize("step_length", ["normalised", "normalised_rows"])
def test_a_direction_of_zeros_is_no_step_and_disturbs_nobody(step_length):
    Ds = directions()
    expected = steps(Ds, step_length)
    Ds[1][1] = 0.0  # the second of three layers
    found = steps(Ds, step_length)
    assert torch.equal(found[2], torch.zeros(1, 2, 7, dtype=F64))
    assert all(torch.equal(found[i], expected[i]) for i in range(len(found)) if i != 2)
    assert torch.equal(PLAIN[step_length](Ds[1][1:2]), found[2])


def test_rows_of_few_units_with_many_inputs_are_shorter_and_no_others_for_any_width():
    assert length.row_length(10, 8 * 10) == length.row_length(4096, 4096) == length.row_length(2, 3) == length.ROW
    assert length.row_length(10, 4 * 80) == pytest.approx(length.ROW / 2, rel=1e-15)
    sizes = [(2, 1, 2, 64), (1, 1, 64, 64)]
    Ds = directions(sizes)
    layers = [layer for D, (L, *_) in zip(Ds, sizes, strict=True) for layer in D.chunk(L)]
    for step, layer in zip(steps(Ds, "normalised_rows", sizes), layers, strict=True):
        assert relative_error(step, length.normalised_rows(layer)) < 1e-14
    assert length.normalised_rows(layers[0]).norm(dim=-1).max() < 0.51 * length.ROW

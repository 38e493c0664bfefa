"""`ladder`: the structure of a layer's Hessian against the Hessian itself, which knows nothing of the structure."""

import pytest
import torch
from torch import nn

from kfqn_core import exact, layers
from kfqn_core.ladder import backward_step, structured_hessian

F64 = torch.float64
TOLERANCE = 1e-10  # observed 1e-15; the contract of the book


def square(z, y):
    return 0.5 * (z - y).square().flatten(1).sum(1).mean()


def wave(z, y):
    return (z * y).sin().flatten(1).sum(1).mean()


class MeanOverSequence(nn.Module):
    def forward(self, h):
        return h.tanh().mean(1).exp()


PROBLEMS = {"square": (square, False), "cross-entropy": (nn.CrossEntropyLoss(), True), "non-convex": (wave, False)}


def data(*shape, labels=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=F64)
    y = torch.randn(shape[0], 3, generator=generator, dtype=F64)
    return x, (y.argmax(1) if labels else y)


def mlp(bias=True, activation=nn.Tanh):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4, bias=bias), activation(), nn.Linear(4, 4, bias=bias), activation()]
    return nn.Sequential(*layers, nn.Linear(4, 3, bias=bias)).double()


def sequence_model(bias=True):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 3, bias=bias), nn.Tanh(), nn.Linear(3, 3, bias=bias), MeanOverSequence()]
    return nn.Sequential(*layers, nn.Linear(3, 3, bias=bias)).double()


def relative(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def error(model, loss_fn, x, y, name):
    expected = exact.layer_hessian(model, loss_fn, x, y, name)
    return relative(structured_hessian(model, loss_fn, x, y, name), expected)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_structure_is_the_exact_block_of_an_mlp(problem, bias, activation):
    loss_fn, labels = PROBLEMS[problem]
    x, y = data(6, 5, labels=labels)
    for name in ("0", "2", "4"):
        assert error(mlp(bias, activation), loss_fn, x, y, name) < TOLERANCE


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 3, 5)])
def test_structure_is_the_exact_block_on_sequences(problem, bias, shape):
    loss_fn, labels = PROBLEMS[problem]
    x, y = data(*shape, labels=labels)
    for name in ("0", "2", "4"):
        assert error(sequence_model(bias), loss_fn, x, y, name) < TOLERANCE


def test_locations_that_interact_need_the_terms_between_them():
    """Dropping t != t' is no rounding: the test above is not passed by a sum over single locations."""
    model, (x, y) = sequence_model(), data(4, 3, 5)
    G = exact.preactivation_hessians(model, square, x, y, "0")
    a = layers.view(model[0]).patches(x)[:, 0]
    diagonal = torch.einsum("nti,notpt,ntj->iojp", a, G, a).reshape(18, 18) / 4
    assert relative(diagonal, exact.layer_hessian(model, square, x, y, "0")) > 0.1


def test_two_location_dimensions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3), nn.Tanh()).double()
    assert error(model, wave, *data(4, 2, 3, 5), "0") < TOLERANCE


def test_a_lost_bias_column_is_seen(monkeypatch):
    """Without the trailing 1 of a, or with the bias in another place, the structure is not the Hessian."""
    model, (x, y) = mlp(), data(6, 5)
    patches = layers.LinearView.patches
    zeros, ones = torch.zeros(6, 1, 1, 1, dtype=F64), torch.ones(6, 1, 1, 1, dtype=F64)
    for broken in (
        lambda view, x: torch.cat([patches(view, x)[..., :-1], zeros], -1),
        lambda view, x: torch.cat([ones, patches(view, x)[..., :-1]], -1),
    ):
        monkeypatch.setattr(layers.LinearView, "patches", broken)
        assert error(model, square, x, y, "0") > 0.05
    monkeypatch.undo()
    assert error(model, square, x, y, "0") < TOLERANCE


@pytest.mark.parametrize("problem", PROBLEMS)
def test_backward_step_gives_every_preactivation_hessian(problem):
    loss_fn, labels = PROBLEMS[problem]
    model, (x, y) = mlp(), data(6, 5, labels=labels)
    z = model(x).detach().requires_grad_()
    g = torch.autograd.grad(6 * loss_fn(z, y), z)[0]
    G = exact.preactivation_hessians(model, loss_fn, x, y, "4")[:, :, 0, :, 0]
    gauss_newton = G
    for layer in (2, 0):
        h = exact.layer_call(model, x, str(layer)).output
        slope = 1 - h.tanh().square()
        curvature = -2 * h.tanh() * slope
        W = model[layer + 2].weight.detach()
        _, gauss_newton = backward_step(W, g, gauss_newton, slope, torch.zeros_like(slope))
        g, G = backward_step(W, g, G, slope, curvature)
        expected = exact.preactivation_hessians(model, loss_fn, x, y, str(layer))[:, :, 0, :, 0]
        assert relative(G, expected) < TOLERANCE
        a = layers.view(model[layer]).patches(exact.layer_call(model, x, str(layer)).input)[:, 0, 0]
        block = torch.stack([torch.kron(torch.outer(u, u), M) for u, M in zip(a, gauss_newton, strict=True)]).mean(0)
        assert relative(block, exact.layer_gauss_newton(model, loss_fn, x, y, str(layer))) < TOLERANCE


def test_layers_that_share_parameters_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[0].weight = model[2].weight
    with pytest.raises(ValueError, match="this Linear shares a parameter with '2'"):
        structured_hessian(model, square, *data(6, 3), "0")


def test_backward_step_refuses_shapes_that_do_not_fit():
    W, g, G = torch.zeros(3, 5), torch.zeros(6, 3), torch.zeros(6, 3, 3)
    slope = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"W \(3, 5\).*do not fit.*without its bias column"):
        backward_step(W, g, G, slope, slope)
    with pytest.raises(ValueError, match=r"W \(3,\)"):
        backward_step(W[:, 0], g, G, slope, slope)

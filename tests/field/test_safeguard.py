"""A step that raised the loss of its mini-batch is taken back: the second evaluation knows it for nothing."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from kfqn_core import KFQN, presets
from tests.field.programs import values


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()


X, Y = (torch.randn(40, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)) for d in (6, 3))


def closure_of(model, optimizer, target=Y):
    def closure():
        optimizer.zero_grad()
        loss = (model(X) - target).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("lr", [0.3, 1e3, 1e200])
def test_no_step_raises_the_loss(lr):
    """Whatever the rate, infinite losses included; and a pair was learnt from every step that was finite."""
    model = network()
    optimizer = KFQN(model, lr, **presets.KBFGS_2020, safeguard=True)
    closure = closure_of(model, optimizer)
    losses = [optimizer.step(closure).item() for _ in range(12)]
    assert all(later <= before for before, later in pairwise(losses))
    if lr == 1e3:  # by far too long: at first everything stays
        assert losses[1] == losses[0]
        assert optimizer.layers["0"].gradient.s_mean.norm() > 0


def test_weights_are_as_before_a_step_that_is_taken_back():
    model = network()
    optimizer = KFQN(model, 1e3, **presets.KBFGS_2020, safeguard=True)
    before = values(model)
    optimizer.step(closure_of(model, optimizer))
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_steps_that_lower_the_loss_are_as_without():
    model = network()
    twin = copy.deepcopy(model)
    for network_, options in ((model, {}), (twin, {"safeguard": True})):
        optimizer = KFQN(network_, 0.05, **presets.KBFGS_2020, **options)
        losses = [optimizer.step(closure_of(network_, optimizer)).item() for _ in range(10)]
        assert losses == sorted(losses, reverse=True)  # or this test says nothing
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_loss_is_needed_and_a_second_pass():
    model = network()
    optimizer = KFQN(model, **presets.KBFGS_2020, safeguard=True)
    with pytest.raises(RuntimeError, match="the closure must return the loss"):
        optimizer.step(lambda: closure_of(model, optimizer)() and None)
    with pytest.raises(ValueError, match=r'pairs must be "second_pass" with safeguard, got None'):
        KFQN(model, safeguard=True)


def test_a_number_is_a_loss():
    model = network()
    optimizer = KFQN(model, 1e3, **presets.KBFGS_2020, safeguard=True)
    before = values(model)
    optimizer.step(lambda: closure_of(model, optimizer)().item())
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_steps_are_shortened_until_one_helps_and_grow_again():
    model = network()
    optimizer = KFQN(model, 1e3, **presets.KBFGS_2020, safeguard=True)
    closure = closure_of(model, optimizer)
    losses = [optimizer.step(closure).item() for _ in range(60)]
    shares = [2.0]  # one step that is taken back does not yet shorten the next
    for before, after in pairwise(losses):
        shares.append(shares[-1] / 2 if after == before else min(2.0, 2 * shares[-1]))
    assert min(shares) < 1e-2
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.state_dict()["param_groups"][0]["step_share"] in (shares[-1] / 2, min(2.0, 2 * shares[-1]))


def test_a_shortened_step_is_resumed():
    model = network()
    optimizer = KFQN(model, 1e3, **presets.KBFGS_2020, safeguard=True)
    for _ in range(5):
        optimizer.step(closure_of(model, optimizer))
    twin = copy.deepcopy(model)
    again = KFQN(twin, 1e3, **presets.KBFGS_2020, safeguard=True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(8):
        optimizer.step(closure_of(model, optimizer))
        again.step(closure_of(twin, again))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))

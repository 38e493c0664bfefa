"""Layers that a step does not use, and steps without gradients."""

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from tests.field.programs import (
    difference,
    error,
    mlp,
    randn,
    silence,
    still,
    train,
    values,
)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x, head):
        return getattr(self, head)(torch.tanh(self.body(x) + self.bias))


@pytest.mark.parametrize("pairs", [None, "next_batch", "second_pass"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_heads_that_take_turns(pairs, set_to_none, first):
    model, x = Heads(), randn(16, 5)
    optimizer = KFQN(model, pairs=pairs, lr=0.01)
    with silence():
        for step in range(12):
            head = ("one", "two")[(step + first) % 2]
            before = values(model)

            def closure(head=head):
                optimizer.zero_grad(set_to_none=set_to_none)
                loss = (model(x, head) - 1).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            resting = {"one": {"two.weight", "two.bias"}, "two": {"one.weight", "one.bias"}}[head]
            if set_to_none:
                assert still(model, before) == resting
            else:
                assert still(model, before) <= resting  # momentum decays, as Adam's does
    assert all(layer.started for layer in optimizer.layers.values())


def test_a_gradient_of_zeros_lets_momentum_decay():
    model, x = Heads(), randn(16, 5)
    optimizer = KFQN(model, step_length="raw", lr=0.1)
    with silence():
        train(optimizer, lambda: model(x, "one").square().mean() + model(x, "two").square().mean(), 3)
        M = optimizer.layers["two"].M.clone()
        optimizer.zero_grad(set_to_none=False)
        model(x, "one").square().mean().backward()
        optimizer.step()
    assert error(optimizer.layers["two"].M, 0.9 * M) < 1e-5


@pytest.mark.parametrize("step", [0, 1, 27])
def test_a_step_in_which_only_others_have_gradients_or_none_has(step):
    model, x = Heads(), randn(16, 5)
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model(x, "one").square().mean(), step)
        before = values(model)
        optimizer.zero_grad()
        optimizer.step()  # nothing has a gradient
        assert len(still(model, before)) == 7
        optimizer.zero_grad()
        model.bias.grad = torch.ones(8)
        optimizer.step()
        assert still(model, before) == set(before) - {"bias"}
        losses = train(optimizer, lambda: (model(x, "two") - 1).square().mean(), 20)
    assert losses[-1] < losses[0]
    assert optimizer.skipped_steps == 0


def test_stepping_twice_on_one_gradient():
    model, twin, x = mlp(5, 8, 3), mlp(5, 8, 3), randn(16, 5)
    for net in (model, twin):
        optimizer = KFQN(net)
        with silence():
            for _ in range(30):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
                before = values(net)
                optimizer.step()
                assert not still(net, before)
    assert difference(model, twin) == 0

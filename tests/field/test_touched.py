"""What becomes of a gradient between backward and step: zeroed in place it teaches nothing, clipped it does."""

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from tests.field.programs import (
    FORMED,
    H_of,
    error,
    mlp,
    randn,
    silence,
    train,
)

x, far = randn(16, 5), 3 * randn(16, 5, seed=9)


def squares(model):
    return lambda: model(x).square().mean()


def by_model(model, optimizer):
    model.zero_grad(set_to_none=False)


def by_hand(model, optimizer):
    for p in model.parameters():
        p.grad.zero_()


def together(model, optimizer):
    torch._foreach_zero_([p.grad for p in model.parameters()])


def by_optimizer(model, optimizer):
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("clear", [by_model, by_hand, together, by_optimizer])
@pytest.mark.parametrize(
    "options", [{}, {"pairs": "next_batch"}, {"activation_decay": 0.9}, {"activation_factor": "diagonal"}]
)
@pytest.mark.parametrize("start", [0, 2])
def test_a_gradient_that_is_zeroed_in_place_teaches_nothing(clear, options, start):
    model = mlp(5, 8, 3)
    optimizer = KFQN(model, lr=0.0, **{**FORMED, **options})
    train(optimizer, squares(model), start)
    before = {name: {k: v.clone() for k, v in layer.tensors().items()} for name, layer in optimizer.layers.items()}
    optimizer.zero_grad()
    model(far).square().mean().backward()
    clear(model, optimizer)
    with silence():
        optimizer.step()
    for name, layer in optimizer.layers.items():
        for key, value in layer.tensors().items():  # what is not known yet is not a number
            assert key == "M" or torch.equal(value.nan_to_num(), before[name][key].nan_to_num())
        assert layer.started == (start > 0)


@pytest.mark.parametrize("change", [lambda p: p.grad.mul_(0.01), lambda p: setattr(p, "grad", 2 * p.grad)])
def test_a_gradient_that_is_clipped_or_replaced_teaches(change):
    model = mlp(5, 8, 3)
    optimizer = KFQN(model, lr=0.0, **FORMED)
    model(x).square().mean().backward()
    for p in model.parameters():
        change(p)
    optimizer.step()
    one = KFQN(twin := mlp(5, 8, 3), lr=0.0, **FORMED)
    train(one, squares(twin), 1)
    assert torch.equal(H_of(optimizer, "0"), H_of(one, "0"))


def clipped(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def halved(model):
    for p in model.parameters():
        p.grad.mul_(0.5)


def set_aside(model):
    for p in model.parameters():
        p.grad = p.grad.clone()


@pytest.mark.parametrize(
    ("between", "last"), [(clipped, True), (halved, True), (set_aside, True), (lambda m: None, False)]
)
def test_of_micro_batches_whose_gradients_were_changed_in_between_the_last_counts(between, last):
    """As README says; nobody can tell a gradient that was clipped in place from one that was cleared."""
    model = mlp(5, 8, 3)
    optimizer = KFQN(model, lr=0.0, **FORMED)
    for batch in (x, far):
        model(batch).square().mean().backward()
        between(model)
    with silence():
        optimizer.step()
    one = KFQN(twin := mlp(5, 8, 3), lr=0.0, **FORMED)
    train(one, lambda: twin(far if last else torch.cat([x, far])).square().mean(), 1)
    assert error(H_of(optimizer, "0"), H_of(one, "0")) < 1e-4

"""Parameter groups as in torch.optim: rates, decay, schedules of their own."""

import copy

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from tests.field.programs import (
    Shadow,
    error,
    mlp,
    randn,
    silence,
    still,
    train,
    values,
)


def test_layers_in_groups_have_rates_of_their_own():
    model, plain, x = mlp(5, 8, 3), mlp(5, 8, 3), randn(16, 5)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.05}]
    optimizer = KFQN(model, params=groups)
    before = values(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 1)
        assert still(model, before) == {"0.weight", "0.bias"}
        of_plain = KFQN(plain, lr=0.05)
        train(of_plain, lambda: plain(x).square().mean(), 1)
    assert error(model[2].weight, plain[2].weight) < 1e-6
    optimizer.param_groups[0]["lr"] = 0.05
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 1)
    assert not still(model, before)


def test_weight_and_bias_of_one_layer_in_different_groups():
    """The usual recipe: no decay of biases and norms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() == 1]
    plain, x, began = copy.deepcopy(model), randn(16, 5), list(values(model).values())
    optimizer = KFQN(model, 0.01, [{"params": decayed, "weight_decay": 0.5}, {"params": free}])
    with silence():
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        train(KFQN(plain, 0.01), lambda: plain(x).square().mean(), 1)
    for p, q, w in zip(model.parameters(), plain.parameters(), began, strict=True):
        if w.dim() > 1:
            assert error(p - q, -0.01 * 0.5 * w) < 1e-3
        else:
            assert error(p, q) < 1e-6


@pytest.mark.parametrize("door", ["at construction", "later"])
def test_a_group_without_curvature_moves_by_adam_at_its_own_rate(door):
    model, x = mlp(5, 8, 8, 3), randn(16, 5)
    plain_group = {"params": list(model[2].parameters()), "curvature": False, "lr": 0.007, "betas": (0.8, 0.9)}
    rest = [p for i in (0, 4) for p in model[i].parameters()]
    if door == "later":
        optimizer = KFQN(model, params=rest)
        optimizer.add_param_group(plain_group)
    else:
        optimizer = KFQN(model, params=[{"params": rest}, plain_group])
    shadow = Shadow(*model[2].parameters(), lr=0.007, betas=(0.8, 0.9))
    with silence():
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            shadow.step()
            optimizer.step()
    assert set(optimizer.layers) == {"0", "4"}
    assert shadow.error < 1e-6


def test_an_added_group_of_parameters_outside_of_the_model():
    """A loss with weights of its own (uncertainty weighting, ArcFace)."""
    model, x = mlp(5, 8, 3), randn(16, 5)
    center = nn.Parameter(torch.zeros(3))
    optimizer = KFQN(model)
    optimizer.add_param_group({"params": [center], "lr": 0.01})
    before = values(model)
    with silence():
        train(optimizer, lambda: (model(x) - center - 1).square().mean(), 5)
    assert not still(model, before)
    assert center.abs().min() > 0
    assert center.grad is not None


def test_named_parameters_and_decay_of_the_fallback():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = KFQN(model, 0.03, model.named_parameters(), weight_decay=0.1, fallback_lr=0.002)
    copies = [nn.Parameter(p.detach().clone()) for p in model[1].parameters()]
    adamw, x = torch.optim.AdamW(copies, lr=0.002, betas=(0.9, 0.99), weight_decay=0.1), randn(16, 5)
    with silence():
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            for p, q in zip(model[1].parameters(), copies, strict=True):
                q.grad = p.grad.clone()
            adamw.step()
            optimizer.step()
    assert max(map(error, model[1].parameters(), copies)) < 1e-5


def test_a_schedule_moves_both_rates():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = KFQN(model, lr=torch.tensor(0.04))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    with silence():
        for step in range(4):
            before = values(model)
            optimizer.zero_grad()
            model(randn(16, 5)).square().mean().backward()
            optimizer.step()
            schedule.step()
            assert len(still(model, before)) == (0 if step < 2 else 6)


@pytest.mark.parametrize("empty", [0, 1])
def test_a_group_without_parameters(empty):
    """As recipes give one that sort parameters by their names, where no name is of that kind."""
    model, x = mlp(5, 8, 3), randn(16, 5)
    groups = [{"params": list(model.parameters())}]
    groups.insert(empty, {"params": [], "weight_decay": 0.1})
    optimizer, before = KFQN(model, params=groups), values(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 3)
        optimizer.load_state_dict(optimizer.state_dict())
    assert not still(model, before)
    with pytest.raises(ValueError, match="nothing for KFQN to do"):
        KFQN(model, params=groups[empty : empty + 1])

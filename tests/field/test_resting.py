"""Frozen in turn: what was learnt of a layer is kept while it rests, and every layer gets its curvature."""

import copy

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from tests.field.programs import silence, train


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("every", [1, 3])
def test_layers_that_are_trained_in_turn_all_start(every):
    model = network()
    optimizer, x = KFQN(model), torch.randn(16, 4)
    layers = [model[0], model[3], model[5]]
    with silence():
        for k in range(18):
            for i, layer in enumerate(layers):
                layer.requires_grad_(k // every % 3 == i)
            train(optimizer, lambda: (model(x) - 1).square().mean(), 1)
    assert {name: layer.started for name, layer in optimizer.layers.items()} == {"0": True, "3": True, "5": True}
    assert all(layer.M.norm() > 0 for layer in optimizer.layers.values())


@pytest.mark.parametrize("options", [{}, {"pairs": "next_batch"}, {"activation_factor": "low_rank", "rank": 1}])
def test_what_was_learnt_of_a_layer_is_kept_while_it_rests(options):
    model = network()
    optimizer, x = KFQN(model, **options), torch.randn(16, 4)

    def learnt():
        return {name: value.clone() for name, value in optimizer.layers["3"].tensors().items()}

    train(optimizer, lambda: (model(x) - 1).square().mean(), 4)
    before, weight = learnt(), model[3].weight.clone()
    model[3].requires_grad_(False)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    assert all(torch.equal(before[name], value) for name, value in learnt().items())
    assert torch.equal(model[3].weight, weight)
    saved = copy.deepcopy(optimizer.state_dict())
    model[3].requires_grad_(True)
    assert all(torch.equal(before[name], value) for name, value in learnt().items())
    train(optimizer, lambda: (model(x) - 1).square().mean(), 1)
    assert not torch.equal(model[3].weight, weight)
    other = KFQN(network(), **options)
    other.load_state_dict(saved)
    assert all(torch.equal(before[name], value) for name, value in other.layers["3"].tensors().items())


def test_rest_of_adams_parameters_keeps_its_moments():
    model = network()
    optimizer, x = KFQN(model), torch.randn(16, 4)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    moments = optimizer.state[model[2].weight]["exp_avg"].clone()
    model[2].requires_grad_(False)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 2)
    assert torch.equal(optimizer.state[model[2].weight]["exp_avg"], moments)
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))


def test_a_head_whose_gradient_is_zero_is_not_given_up():
    heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    optimizer = KFQN(heads)
    for p in heads.parameters():
        p.grad = torch.zeros_like(p)
    with silence():
        for k in (0, 0, 1):
            optimizer.zero_grad(set_to_none=False)
            heads[k](torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    assert {name: layer.started for name, layer in optimizer.layers.items()} == {"0": True, "1": True}

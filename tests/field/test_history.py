"""States of optimizers with a history: layers left to Adam, or unfrozen later, resume as they were."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from kfqn_core import KFQN
from tests.field.programs import heard, train


class Functional(nn.Module):
    """Uses a weight past its layer, as Mamba and Wav2Vec2 do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return nn.functional.linear(torch.tanh(self.a(x)), self.b.weight, self.b.bias)


def deep():
    return nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))


def resumed_equals_going_on(model, optimizer, x):
    twin = copy.deepcopy(model)
    other = KFQN(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, its in ((model, optimizer), (twin, other)):
        train(its, lambda network=network: (network(x) - 1).square().mean(), 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert set(other.layers) == set(optimizer.layers)


def test_a_layer_that_was_left_to_adam_resumes_there():
    torch.manual_seed(0)
    model, x = Functional(), torch.randn(16, 4)
    optimizer = KFQN(model)
    with heard():
        train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    assert list(optimizer.layers) == ["a"]
    resumed_equals_going_on(model, optimizer, x)


def test_layers_unfrozen_later_resume_in_their_form():
    """The forms of H_a that are chosen one layer after the other are others than those chosen for all at once."""
    torch.manual_seed(0)
    model, x = deep(), torch.randn(16, 40)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    optimizer = KFQN(model)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 1)
    model.requires_grad_(True)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    assert optimizer.plan.kinds != KFQN(deep()).plan.kinds
    resumed_equals_going_on(model, optimizer, x)


def test_a_layer_that_was_frozen_when_saved_starts_anew():
    torch.manual_seed(0)
    model, x = deep(), torch.randn(16, 40)
    model[0].requires_grad_(False)
    optimizer = KFQN(model)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    saved = copy.deepcopy(optimizer.state_dict())
    model.requires_grad_(True)
    loaded = KFQN(model)
    loaded.load_state_dict(saved)
    assert {name: layer.started for name, layer in loaded.layers.items()} == {"0": False, "2": True, "4": True}
    train(loaded, lambda: (model(x) - 1).square().mean(), 1)
    assert loaded.layers["0"].started


@pytest.mark.parametrize("other", [{"pairs": "next_batch"}, {"activation_decay": 0.9}])
def test_a_state_that_does_not_fit_changes_nothing(other):
    torch.manual_seed(0)
    model, x = Functional(), torch.randn(16, 4)
    optimizer = KFQN(model)
    with heard():
        train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.load_state_dict(KFQN(Functional(), **other).state_dict())
    now = optimizer.state_dict()
    assert all(torch.equal(now["state"][i][k], v) for i, of in kept["state"].items() for k, v in of.items())
    assert list(optimizer.layers) == ["a"]


def test_a_state_of_other_groups_changes_nothing():
    """Not even which layers are left to Adam, which the state says as well."""
    torch.manual_seed(0)
    model, other, x = deep(), deep(), torch.randn(16, 40)
    optimizer = KFQN(model)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    first, *others = other.parameters()
    grouped = KFQN(other, params=[{"params": [first], "curvature": False}, {"params": others}])
    train(grouped, lambda: (other(x) - 1).square().mean(), 3)
    plan = optimizer.plan
    with pytest.raises(ValueError, match="groups of"):
        optimizer.load_state_dict(grouped.state_dict())
    assert optimizer.plan is plan


@pytest.mark.parametrize("key", ["peak_lr", "fallback_lr", "eps", "betas", "curvature", "decoupled_weight_decay"])
def test_a_setting_that_a_saved_group_does_not_know_is_the_optimizers(key):
    """It was saved before there was such a setting; torch's optimizers fill in their defaults."""
    torch.manual_seed(0)
    model, x = Functional(), torch.randn(16, 4)
    optimizer = KFQN(model, lr=0.02)
    with heard():
        train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group[key]
    twin = copy.deepcopy(model)
    other = KFQN(twin, lr=0.02)
    other.load_state_dict(saved)
    for network, its in ((model, optimizer), (twin, other)):
        train(its, lambda network=network: (network(x) - 1).square().mean(), 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_hooks_before_loading_change_what_is_loaded():
    """`register_load_state_dict_pre_hook`: one unpacks a file of its own form, the next begins the momentum anew."""
    torch.manual_seed(0)
    model, x = deep(), torch.randn(16, 40)
    optimizer = KFQN(model)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    saved = {"wrapped": copy.deepcopy(optimizer.state_dict())}

    def without_momentum(_, state_dict):
        for of_parameter in state_dict["state"].values():
            of_parameter["M"].zero_()
        state_dict["param_groups"][0]["lr"] = 0.5

    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict["wrapped"])
    optimizer.register_load_state_dict_pre_hook(without_momentum)
    H = optimizer.layers["0"].activation.H.clone()
    optimizer.load_state_dict(saved)
    assert all(layer.M.abs().max() == 0 for layer in optimizer.layers.values())
    assert torch.equal(optimizer.layers["0"].activation.H, H)
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.load_state_dict({"wrapped": optimizer.state_dict()})  # the hooks are still there


@pytest.mark.parametrize("frozen", ["0.weight 0.bias", "2.weight 2.bias", "1.weight"])
def test_what_rests_when_a_run_is_resumed_has_what_it_had(frozen):
    """Frozen after it was trained, then saved, resumed, and unfrozen: layers with curvature, and Adam's parameters."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 40), nn.LayerNorm(40), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))

    def freeze(model, now):
        for name in frozen.split():
            model.get_parameter(name).requires_grad_(not now)

    x, model, twin = torch.randn(16, 40), network(), network()
    optimizer = KFQN(model)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    freeze(model, True)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    freeze(twin, True)
    other = KFQN(twin)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not any(twin.get_parameter(name).requires_grad for name in frozen.split())
    for rests in (True, False):
        for its_model, its in ((model, optimizer), (twin, other)):
            freeze(its_model, rests)
            train(its, lambda m=its_model: (m(x) - 1).square().mean(), 3)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}])
def test_what_was_unfrozen_since_is_loaded_through_distributed_checkpoint(options):
    settings, x = dcp.StateDictOptions(**options), torch.linspace(-1, 1, 640).view(16, 40)

    def make():
        torch.manual_seed(0)
        model = deep()
        model[2].requires_grad_(False)
        optimizer = KFQN(model)
        model[2].requires_grad_(True)
        return model, optimizer

    (model, optimizer), (twin, other) = make(), make()
    train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    optimizer.zero_grad()
    of_model, of_optimizer = copy.deepcopy(dcp.get_state_dict(model, optimizer, options=settings))
    dcp.set_state_dict(twin, other, model_state_dict=of_model, optim_state_dict=of_optimizer, options=settings)
    for network, its in ((model, optimizer), (twin, other)):
        train(its, lambda network=network: (network(x) - 1).square().mean(), 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))

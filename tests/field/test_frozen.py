"""Frozen, unfrozen, added, reparametrized, replaced: what has a gradient moves, whenever it came to have one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from kfqn_core import KFQN, describe
from tests.field.programs import (
    H_of,
    Shadow,
    difference,
    error,
    heard,
    inverse_of,
    mlp,
    randn,
    silence,
    still,
    train,
    values,
)


@pytest.mark.parametrize("pairs", [None, "second_pass"])
def test_staged_unfreezing(pairs):
    """One block more of a network in every stage, from the head downwards."""
    model = mlp(5, 8, 8, 3)
    model.requires_grad_(False)
    model[4].requires_grad_(True)
    optimizer, x = KFQN(model, pairs=pairs), randn(16, 5)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    for stage, i in enumerate((4, 2, 0)):
        model[i].requires_grad_(True)
        before = values(model)
        with silence():
            for _ in range(4):
                optimizer.step(closure)
        assert len(still(model, before)) == 4 - 2 * stage
        assert set(optimizer.layers) == {"4", "2", "0"} if stage == 2 else len(optimizer.layers) == stage + 1
        assert all(layer.started for layer in optimizer.layers.values())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_frozen_again_keeps_what_was_learnt_of_the_others():
    model, x = mlp(5, 8, 8, 3), randn(16, 5)
    twin = copy.deepcopy(model)
    optimizer, of_twin = KFQN(model), KFQN(twin)
    with silence():
        for net, steps in ((model, optimizer), (twin, of_twin)):
            train(steps, lambda net=net: net(x).square().mean(), 6)
        model[2].requires_grad_(False)
        before = values(model)
        for _ in range(3):
            for net, steps in ((model, optimizer), (twin, of_twin)):
                steps.zero_grad()
                net(x).square().mean().backward()
                if net is twin:
                    twin[2].weight.grad = twin[2].bias.grad = None
                steps.step()
    assert still(model, before) == {"2.weight", "2.bias"}
    assert difference(model, twin) < 1e-5


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.MultiheadAttention(8, 2), lambda: nn.Linear(8, 8)]
)
@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("step", [0, 2])
def test_one_parameter_of_a_layer_frozen_and_unfrozen(make, which, step):
    torch.manual_seed(0)
    layer = make()
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(8, 2)})
    head = lambda h: model["head"](h.reshape(-1, 8))  # noqa: E731

    def loss():
        if isinstance(layer, nn.Conv2d):
            return head(layer(randn(4, 3, 6, 6))).square().mean()
        x = randn(5, 4, 8)
        return head(layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)).square().mean()

    name = f"in_proj_{which}" if isinstance(layer, nn.MultiheadAttention) else which
    other = name.replace(which, "bias" if which == "weight" else "weight")
    optimizer = KFQN(model)
    with silence():
        train(optimizer, loss, step)
        getattr(layer, name).requires_grad_(False)
        before = values(model)
        train(optimizer, loss, 3)
        assert f"layer.{name}" in still(model, before)
        assert f"layer.{other}" not in still(model, before)
        getattr(layer, name).requires_grad_(True)
        before = values(model)
        train(optimizer, loss, 3)
        assert not still(model, before)


def test_a_frozen_bias_leaves_the_matrix_of_the_layer_without_bias():
    model, x = mlp(5, 8, 3), randn(16, 5)
    optimizer = KFQN(model, activation_factor="action")
    model[0].bias.requires_grad_(False)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 2)
    fresh = mlp(5, 8, 3)
    fresh[0].bias.requires_grad_(False)
    with silence():
        train(KFQN(fresh, activation_factor="action"), lambda: fresh(x).square().mean(), 2)
    assert optimizer.layers["0"].M.shape[-1] == 5
    assert optimizer.layers["0"].started
    assert error(H_of(optimizer, "0"), inverse_of(x, bias=False)) < 1e-3


class Scaled(nn.Linear):
    """A layer with parameters of its own beside weight and bias."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale, self.log_temperature = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(3))


def test_further_parameters_of_a_subclass_move_as_adams():
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc": Scaled(5, 3), "out": nn.Linear(3, 2)})
    optimizer, x, before = KFQN(model), randn(16, 5), values(model)
    fc = model["fc"]
    shadow = Shadow(fc.scale, fc.log_temperature)
    with silence():
        for _ in range(5):
            optimizer.zero_grad()
            h = fc.scale * fc(x) * fc.log_temperature.exp()
            model["out"](h).square().mean().backward()
            shadow.step()
            optimizer.step()
    assert not still(model, before)
    assert shadow.error < 1e-6
    assert {row.name for row in describe(model).rows} >= {"fc.scale", "fc.log_temperature"}


class Gate(nn.Conv1d):
    """Another: a convolution whose own parameter is used inside a wrapper's forward."""

    def __init__(self):
        super().__init__(2, 4, 3)
        self.gate = nn.Parameter(torch.zeros(4, 1))


def test_further_parameters_of_a_convolution_move():
    torch.manual_seed(0)
    model = nn.Sequential(Gate(), nn.Flatten(), nn.Linear(16, 2))
    x, before = randn(6, 2, 6), values(model)
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model[2](model[1](model[0](x) * model[0].gate.sigmoid())).square().mean(), 3)
    assert not still(model, before)


RENAMED = {
    "a mask": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), lambda layer: prune.remove(layer, "weight")),
    "old spectral_norm": (torch.nn.utils.spectral_norm, torch.nn.utils.remove_spectral_norm),
}


@pytest.mark.parametrize(("apply", "remove"), RENAMED.values(), ids=RENAMED)
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_that_gets_another_name_and_its_own_again(apply, remove, bias):
    """The parameter stays the same; what the layer computes with it does not."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3)), randn(16, 5)
    optimizer = KFQN(model)
    with heard() as messages:
        for change, layers in ((None, {"0", "2"}), (apply, {"2"}), (remove, {"0", "2"})):
            if change:
                change(model[0])
            before = values(model)
            train(optimizer, lambda: (model(x) - 1).square().mean(), 4)
            assert not still(model, before)
            assert set(optimizer.layers) == layers
    assert len(messages) == 1  # less than half of the weights have curvature in between


APPLIED_LATER = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "old weight_norm": lambda layer: torch.nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "a mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "of the bias": lambda layer: parametrize.register_parametrization(layer, "bias", Softplus()),
}


class Softplus(nn.Module):
    def forward(self, x):
        return functional.softplus(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("apply", APPLIED_LATER.values(), ids=APPLIED_LATER)
@pytest.mark.parametrize("start", [0, 3])
def test_what_is_reparametrized_later_still_trains(apply, start):
    model, x = mlp(5, 8, 8, 3), randn(16, 5)
    optimizer = KFQN(model)
    with heard() as messages:
        train(optimizer, lambda: (model(x) - 1).square().mean(), start)
        apply(model[2])
        before, computed = values(model), model[2].weight.detach().clone()
        losses = train(optimizer, lambda: (model(x) - 1).square().mean(), 20)
    assert not still(model, before)
    assert error(model[2].weight, computed) > 1e-3
    assert losses[-1] < losses[0]
    assert len(messages) <= 1
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))


class LoRA(nn.Module):
    """An adapter around a frozen layer."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("start", [0, 4])
def test_adapters_added_later_train_with_curvature(start):
    model, x = mlp(12, 16, 16, 3), randn(16, 12)
    optimizer = KFQN(model)
    with heard() as messages:
        train(optimizer, lambda: (model(x) - 1).square().mean(), start)
        for i in (0, 2):
            model[i] = LoRA(model[i])
        before = values(model)
        losses = train(optimizer, lambda: (model(x) - 1).square().mean(), 15)
    assert still(model, before) == {f"{i}.base.{p}" for i in (0, 2) for p in ("weight", "bias")}
    assert {"0.down", "0.up", "2.down", "2.up", "4"} == set(optimizer.layers)
    assert losses[-1] < losses[0]
    assert not messages


def test_a_head_replaced_later_trains_and_the_old_one_is_let_go():
    model, x = mlp(5, 8, 3), randn(16, 5)
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 3)
        old, model[2] = model[2], nn.Linear(8, 7)
        before, of_old = values(model), values(old)
        train(optimizer, lambda: (model(x) - 1).square().mean(), 4)
    assert not still(model, before)
    assert len(still(old, of_old)) == 2
    assert error(H_of(optimizer, "0"), inverse_of(x)) < 1
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))


@pytest.mark.parametrize(
    "look", [lambda o: o.state_dict(), lambda o: o.state, lambda o: o.load_state_dict(o.state_dict())]
)
@pytest.mark.parametrize("when", ["before the forward", "before the step"])
def test_a_state_that_is_saved_before_a_change_was_stepped_on(look, when):
    """A checkpoint right after the head was replaced, or between its first backward and its first step."""
    model, x = mlp(5, 8, 3), randn(16, 5)
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 3)
        model[0], model[2] = nn.Linear(5, 8), nn.Linear(8, 7)
        if when == "before the forward":
            look(optimizer)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        look(optimizer)
        before = values(model)
        optimizer.step()
        assert not still(model, before)
        assert set(optimizer.state_dict()["state"]) == {0, 1, 2, 3}
        train(optimizer, lambda: (model(x) - 1).square().mean(), 2)
    assert all(layer.started for layer in optimizer.layers.values())


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("change", ["taken out", "put in"])
def test_layers_that_get_other_names_keep_what_is_theirs(change, given):
    """A layer less, or more, before them in an `nn.Sequential`: what was learnt stays with the weight, as in Adam."""
    x, runs = randn(16, 5), []
    for renamed in (True, False):
        torch.manual_seed(0)
        first, more = [nn.Linear(5, 8), nn.LayerNorm(8)], [nn.Linear(8, 8), nn.LayerNorm(8)]
        rest, other = [nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)], [nn.Identity(), nn.Identity()]
        begin, end = (more, other) if change == "taken out" else (other, more)
        if renamed:
            begin, end = ([layer for layer in layers if layer not in other] for layers in (begin, end))
        model = nn.Sequential(*first, *begin, *rest)
        optimizer = KFQN(model, params=list(model.parameters()) if given else None)
        with silence():
            train(optimizer, lambda: (model(x) - 1).square().mean(), 5)  # noqa: B023 - called at once
            for i in reversed(range(2, 2 + len(begin))):
                del model[i]
            for i, layer in enumerate(end):
                model.insert(2 + i, layer)
            if given and change == "put in":
                optimizer.add_param_group({"params": [p for layer in more for p in layer.parameters()]})
            train(optimizer, lambda: (model(x) - 1).square().mean(), 5)  # noqa: B023
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        runs.append(model)
    assert difference(*runs) < 1e-6

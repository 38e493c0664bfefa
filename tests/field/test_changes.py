"""Programs that change the model or its forwards while it trains: what is unchanged goes on."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfqn_core import KFQN
from tests.field.programs import (
    FORMED,
    H_of,
    Shadow,
    difference,
    error,
    heard,
    mlp,
    randn,
    silence,
    still,
    train,
    values,
)

x, far = randn(16, 5), 3 * randn(16, 5, seed=9)


def squares(model):
    return lambda: model(x).square().mean()


# -- what changes between two steps


def unfrozen(model):
    model[0].requires_grad_(True)
    return {"0"}


def head_replaced(model):
    torch.manual_seed(3)
    model[4] = nn.Linear(8, 3)
    return {"4"}


def layer_put_before(model):
    torch.manual_seed(3)
    model[0] = nn.Sequential(nn.Linear(5, 5), model[0])
    return {"0.0"}


CHANGES = [unfrozen, head_replaced, layer_put_before]


def changing(change):
    model = mlp(5, 8, 8, 3)
    model[0].requires_grad_(change is not unfrozen)
    return model


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("zero", ["first", "before the backward", "last"])
@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_the_first_step_after_a_change_has_curvature(change, zero, pairs):
    """Of what is new that of its first mini-batch; the rest goes on with what it has learnt, and learns."""
    model = changing(change)
    optimizer = KFQN(model, pairs=pairs, **FORMED)
    with silence():
        train(optimizer, squares(model), 4)
        if zero == "last":
            optimizer.zero_grad()
        new = change(model)
        kept = {name: H_of(optimizer, name).clone() for name in optimizer.layers if name == "2"}
        if zero == "first":
            optimizer.zero_grad()
        loss = model(x).square().mean()
        if zero == "before the backward":
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert new < set(optimizer.layers)
    assert all(optimizer.layers[name].started for name in optimizer.layers)
    assert not torch.equal(H_of(optimizer, "2"), kept["2"])
    if change is not head_replaced:  # as after the first step of a layer that gets these inputs
        (name,) = new
        first = KFQN(once := nn.Sequential(nn.Linear(5, 4)), lr=0.0, pairs=pairs, **FORMED)
        train(first, lambda: once(x).square().mean(), 1)
        assert error(H_of(optimizer, name), H_of(first, "0")) < 1e-4


@pytest.mark.parametrize("scaler", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("pairs", [None, "next_batch"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("change", [head_replaced, layer_put_before])
def test_a_layer_that_is_added_under_a_scaler_is_as_without(change, whole, pairs, unscale, scaler):
    """Also where the optimizer was given more than what is called, and finds the layer in the step only."""
    runs = []
    for enabled in (scaler, False):
        model = mlp(5, 8, 8, 3)
        optimizer = KFQN(model if whole else nn.ModuleDict({"net": model}), pairs=pairs, lr=0.02)
        scale = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for step in range(6):
            if step == 3:
                change(model)
            scale.scale((model(x + 0.1 * step) - 1).square().mean()).backward()
            if unscale:
                scale.unscale_(optimizer)
            with silence():
                scale.step(optimizer)
            scale.update()
            optimizer.zero_grad()
        runs.append((model, optimizer))
    (one, its), (two, of_two) = runs
    assert difference(one, two) < 1e-5
    assert all(error(its.layers[name].M, layer.M) < 1e-4 for name, layer in of_two.layers.items())
    assert all(layer.started for layer in its.layers.values())


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("frozen", [["0.weight", "0.bias"], ["0.weight"], ["2.bias"], ["1.weight"]])
def test_what_is_frozen_between_backward_and_step_moves_with_its_gradient(start, frozen):
    """As with Adam, which asks for a gradient and for nothing else; then it rests."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = KFQN(model)
    with silence():
        train(optimizer, squares(model), start)
        optimizer.zero_grad()
        squares(model)().backward()
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        before = values(model)
        optimizer.step()
        assert not still(model, before)
        before = values(model)
        train(optimizer, squares(model), 2)
        assert still(model, before) == set(frozen)
        model.requires_grad_(True)
        train(optimizer, squares(model), 1)
        assert not still(model, before)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_a_module_of_the_same_shape_in_the_place_of_another_begins_anew(which, whole):
    """A layer, and one of Adam's, whether the optimizer was given the model or its parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = KFQN(model, params=None if whole else model.parameters())
    train(optimizer, squares(model), 5)
    model[which] = nn.Linear(5, 8) if which == 0 else nn.LayerNorm(8)
    optimizer.zero_grad()
    state = optimizer.state[model[which].weight]
    assert all(not state[key].any() for key in (("M", "started") if which == 0 else ("exp_avg", "exp_avg_sq", "step")))
    assert optimizer.state[model[2].weight]["M"].any()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))


@pytest.mark.parametrize(
    "look", [lambda o: o.state_dict(), lambda o: o.state, lambda o: o.load_state_dict(o.state_dict())]
)
def test_what_was_seen_before_a_look_at_the_state_counts(look):
    """Of a model that was changed as well, between forward and backward: another layer was frozen."""
    runs = []
    for looked in (True, False):
        model = mlp(5, 8, 3)
        optimizer = KFQN(model, **FORMED)
        train(optimizer, squares(model), 2)
        optimizer.zero_grad()
        loss = model(far).square().mean()
        model[0].requires_grad_(False)
        if looked:
            look(optimizer)
        loss.backward()
        with silence():
            optimizer.step()
        runs.append(H_of(optimizer, "2"))
    assert torch.equal(*runs)


def test_another_model_in_the_place_of_the_parameters_for_one_forward_changes_no_plan():
    """A teacher by `functional_call`, whose parameters are there while it runs."""
    model, teacher = mlp(5, 8, 3), mlp(5, 8, 3, seed=7)
    optimizer = KFQN(model)
    train(optimizer, squares(model), 2)
    plan = optimizer.plan
    torch.func.functional_call(model, dict(teacher.named_parameters()), x)
    assert optimizer.plan is plan


def test_a_critic_that_is_frozen_for_the_generator_changes_no_plan():
    model = mlp(5, 8, 3)
    optimizer = KFQN(model)
    plan = optimizer.plan
    for step in range(6):
        model.requires_grad_(step % 2 == 0)
        model(x.clone().requires_grad_()).square().mean().backward()
        if step % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.plan is plan


@pytest.mark.parametrize("made", ["in turn", "at once"])
def test_two_optimizers_that_freeze_each_others_part_of_one_model_keep_their_plans(made):
    """Both look before every forward of the whole, of which the other trains a part."""
    model = mlp(5, 8, 8, 3)
    parts, optimizers = (model[:2], model[2:]), []
    for i, part in enumerate(parts):
        for j, other in enumerate(parts):
            other.requires_grad_(made == "at once" or i == j)
        optimizers.append(KFQN(model, params=part.parameters()))
    plans = []
    with silence():
        for step in range(8):
            for i, part in enumerate(parts):
                part.requires_grad_(step % 2 == i)
            squares(model)().backward()
            optimizers[step % 2].step()
            model.zero_grad()
            plans.append([optimizer.plan for optimizer in optimizers])
    assert all(plan is last for now in plans[2:] for plan, last in zip(now, plans[1], strict=True))
    assert all(layer.started for optimizer in optimizers for layer in optimizer.layers.values())


@pytest.mark.parametrize("zero", ["first", "last"])
def test_what_is_unfrozen_and_given_in_a_group_of_its_own_is_seen_at_once(zero):
    model = mlp(5, 8, 3)
    model[0].requires_grad_(False)
    optimizer = KFQN(model, params=model[2].parameters())
    for step in range(3):
        if step == 2:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters())})
        if zero == "first":
            optimizer.zero_grad()
        squares(model)().backward()
        optimizer.step()
        if zero == "last":
            optimizer.zero_grad()
    assert optimizer.layers["0"].started


@pytest.mark.parametrize("change", CHANGES)
def test_hooks_that_were_removed_do_not_come_back(change):
    """Whatever the optimizer is still asked: a model to be exported has none."""
    model = changing(change)
    optimizer = KFQN(model)
    train(optimizer, squares(model), 2)
    optimizer.remove_hooks()
    change(model)
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


# -- what becomes of forwards


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_a_layer_whose_forward_is_replaced_moves_by_adam(start, whole):
    model = mlp(5, 8, 3)
    optimizer = KFQN(model if whole else nn.ModuleDict({"net": model}))
    train(optimizer, squares(model), start)
    layer = model[2]
    layer.forward = lambda a: nn.functional.linear(a**3, layer.weight, layer.bias)
    shadow = Shadow(layer.weight, layer.bias)
    for _ in range(3):
        optimizer.zero_grad()
        squares(model)().backward()
        shadow.step()
        with silence():
            optimizer.step()
    assert shadow.error < 1e-6
    assert [name[-1] for name in optimizer.layers] == ["0"]


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 does not tell that a forward is checkpointed")
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("change", ["the optimizer is made", "a layer is added"])
def test_hooks_made_between_a_checkpointed_forward_and_its_repetition(change, before):
    """By an optimizer, the only one or another one, or because the model has changed: the gradients are the same."""
    model, twin = mlp(5, 8, 8, 3), mlp(5, 8, 8, 3)
    whole = nn.ModuleList([model])
    others = [KFQN(whole) for _ in range(before)]  # which look as well
    optimizer = None if change == "the optimizer is made" else KFQN(whole)
    loss = checkpoint(model, x, use_reentrant=False).square().mean()
    if optimizer is None:
        optimizer = KFQN(whole)
    else:
        whole.append(nn.Linear(3, 3))
    optimizer.zero_grad()
    loss.backward()
    squares(twin)().backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert error(one.grad, two.grad) < 1e-6
    with heard():
        train(optimizer, squares(model), 2)
    assert all("0.2" in other.layers for other in others)
    assert optimizer.layers["0.2"].started

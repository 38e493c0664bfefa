"""Programs that change the model, the gradients or the forwards while it trains: what is unchanged goes on."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfqn_core import KFQN
from kfqn_core.lab.ranks import alike
from kfqn_core.training.groups import Group
from tests.field.programs import (
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
FORMED = {"activation_factor": "action", "refresh": 1}  # H_a is a matrix, and every step teaches it


def squares(model):
    return lambda: model(x).square().mean()


# -- tasks that take turns


class Tasks(nn.Module):
    """As many heads as there are tasks, of which a step reaches one; the head `0` is wider."""

    def __init__(self, number, alike):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Linear(5, 3 + (i == 0 and not alike)) for i in range(number))


def updates_in_turn(number, *, alike=True, set_to_none=True, steps=120, **options):
    """How often every head has learnt of H_a, if each has its turn."""
    model = Tasks(number, alike)
    optimizer = KFQN(model, lr=0.01, activation_factor="action", **options)
    learnt = [0] * number
    for step in range(steps):

        def closure(head=step % number, step=step):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = (model.heads[head](x + 0.1 * step) - 1).square().mean()
            loss.backward()
            return loss

        before = [H_of(optimizer, f"heads.{i}").clone() for i in range(number)]
        with silence():
            optimizer.step(closure)
        for i, H in enumerate(before):
            learnt[i] += not torch.equal(H, H_of(optimizer, f"heads.{i}"))
    return learnt, optimizer


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(("number", "refresh"), [(2, 2), (2, 4), (3, 3), (5, 10), (4, 2), (2, None)])
def test_tasks_that_take_turns_all_learn_curvature(number, refresh, alike, set_to_none):
    """In a period that divides the interval between updates: each task as often as one alone would."""
    learnt, optimizer = updates_in_turn(number, alike=alike, set_to_none=set_to_none, refresh=refresh)
    assert max(learnt) - min(learnt) <= 1
    if refresh is not None:
        assert min(learnt) >= 120 // max(refresh, number) - 1
    if number == 2:
        assert len(optimizer.plan.late) <= 1


@pytest.mark.parametrize("options", [{}, {"pairs": "next_batch"}, {"activation_decay": 0.9}])
def test_ranks_that_see_the_same_tasks_in_turn_do_as_one(options):
    """They go by the gradients, which all of them have: a step for whom an update has missed sends what it needs."""
    runs = []
    for number in (1, 4):
        with alike(number) if number > 1 else nullcontext():
            learnt, optimizer = updates_in_turn(2, refresh=4, steps=24, **options)
        runs.append([H_of(optimizer, f"heads.{i}") for i in range(2)])
        if "activation_decay" not in options:
            assert learnt == [6, 6]
    assert max(error(one, two) for one, two in zip(*runs, strict=True)) < 1e-3


@pytest.mark.parametrize("pairs", ["next_batch", "second_pass"])
def test_their_pairs_follow_too(pairs):
    _, optimizer = updates_in_turn(2, refresh=4, pairs=pairs)
    first, second = (layer.gradient.inverse.dense()[0] for layer in optimizer.layers.values())
    begun = KFQN(Tasks(2, True), pairs=pairs).layers["heads.0"].gradient.inverse.dense()[0]
    assert all(error(H, begun) > 1e-2 for H in (first, second))


def test_while_a_layer_waits_nothing_is_looked_at_twice_nor_kept(monkeypatch):
    """One that no step reaches: the steps between updates cost as much as without it."""
    model, calls, kept = Tasks(2, False), [], []
    optimizer = KFQN(model, pairs="second_pass", safeguard=True, refresh=4)
    monkeypatch.setattr("kfqn_core.training.pairs.local", lambda p: kept.append(p) or p)

    def closure():
        calls.append(None)
        optimizer.zero_grad()
        loss = model.heads[1](x).square().mean()
        loss.backward()
        return loss

    counts = []
    for _ in range(9):
        before = len(calls), len(kept)
        optimizer.step(closure)
        counts.append((len(calls) - before[0], len(kept) - before[1]))
    assert optimizer.plan.late == {"heads.0"}
    assert counts == [(2, 4), (1, 0), (1, 0), (1, 0)] * 2 + [(2, 4)]


def test_between_updates_a_mini_batch_is_remembered_once(monkeypatch):
    model, learnt = mlp(5, 8, 3), []
    optimizer = KFQN(model, pairs="next_batch", refresh=3)
    monkeypatch.setattr(Group, "learn_from_next", lambda self, batch, refresh, finite: learnt.append(refresh))
    train(optimizer, squares(model), 4)
    assert learnt == [True, True, False, False, False, False, True, True]


def test_a_run_of_tasks_that_take_turns_is_resumed_as_it_was():
    """Saved between an update and the step that follows for whom it has missed."""
    runs = []
    for resumed in (False, True):
        model = Tasks(2, True)
        optimizer = KFQN(model, lr=0.01, activation_factor="action", refresh=4)
        for step in range(16):
            if resumed and step == 9:
                assert optimizer.plan.late == {"heads.1"}
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = KFQN(model, lr=0.01, activation_factor="action", refresh=4)
                optimizer.load_state_dict(saved)
            train(optimizer, lambda m=model, k=step: (m.heads[k % 2](x + 0.1 * k) - 1).square().mean(), 1)
        runs.append((model, optimizer))
    assert difference(runs[0][0], runs[1][0]) == 0
    assert torch.equal(H_of(runs[0][1], "heads.1"), H_of(runs[1][1], "heads.1"))


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


# -- what becomes of gradients


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
    others = [KFQN(whole) for _ in range(before)]
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
    assert len(others) == before
    assert optimizer.layers["0.2"].started

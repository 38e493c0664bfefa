"""Tasks that take turns, of which a step reaches one: each learns its curvature, and waiting costs nothing."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from kfqn_core.lab.ranks import alike
from kfqn_core.training.groups import Group
from tests.field.programs import (
    H_of,
    difference,
    error,
    mlp,
    randn,
    silence,
    train,
)

x = randn(16, 5)


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
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))  # a quarter of four times the same


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
    train(optimizer, lambda: model(x).square().mean(), 4)
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

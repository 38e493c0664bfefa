"""Backwards that cross on their way to a weight: of two threads, of a checkpoint within, of gradients with a graph."""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfqn_core import KFQN
from tests.field.programs import H_of, error, inverse_of, mlp, randn, silence

x, far = randn(24, 5).double(), 5 + randn(16, 5, seed=2).double()


def run(*targets):
    """Each in a thread of its own, named "0", "1" and so on."""
    threads = [threading.Thread(target=target, name=str(i)) for i, target in enumerate(targets)]
    [t.start() for t in threads]
    [t.join() for t in threads]


def here(number):
    return threading.current_thread().name == str(number)


def make():
    model = mlp(5, 8, 3).double()
    return model, KFQN(model, lr=0.0, activation_factor="action")


def backward(model, batch):
    (model(batch).square().mean() / 2).backward()


def test_two_threads_through_one_model():
    """Hogwild: the forwards and backwards of two threads through the same layers. So few that nothing is thinned."""
    model, optimizer = make()
    go = threading.Barrier(2)

    def work(batch):
        for _ in range(6):
            go.wait()
            (model(batch).square().mean() / 12).backward()

    run(lambda: work(x), lambda: work(far))
    with silence():
        optimizer.step()
    assert error(H_of(optimizer, "0"), inverse_of(torch.cat([x, far]))) < 1e-9


def test_a_backward_that_is_overtaken_on_its_way_to_the_weight():
    """Thread 0 has reached the layer, and its gradient comes to the weight after that of thread 1."""
    model, optimizer = make()
    arrived, done = threading.Event(), threading.Event()

    def wait(gradient):
        if here(0):
            arrived.set()
            assert done.wait(60)

    model[0].weight.register_hook(wait)

    def overtake():
        assert arrived.wait(60)
        backward(model, far)
        done.set()

    run(lambda: backward(model, x), overtake)
    with silence():
        optimizer.step()
    assert error(H_of(optimizer, "0"), inverse_of(torch.cat([x, far]))) < 1e-9


def test_a_gradient_that_is_being_added_to_is_not_one_that_was_cleared():
    """Thread 0 reaches the layer when thread 1 has added to the gradient, and not yet said so."""
    model = mlp(5, 8, 3).double()
    added, reached = threading.Event(), threading.Event()

    def wait(weight):
        if here(1):
            added.set()
            assert reached.wait(60)

    model[0].weight.register_post_accumulate_grad_hook(wait)  # before that of the optimizer
    optimizer = KFQN(model, lr=0.0, activation_factor="action")
    model[0].weight.register_hook(lambda gradient: reached.set() if here(0) else None)
    backward(model, x)

    def late():
        assert added.wait(60)
        backward(model, x)

    run(late, lambda: backward(model, far))
    with silence():
        optimizer.step()
    assert error(H_of(optimizer, "0"), inverse_of(torch.cat([x, x, far]))) < 1e-9


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_used_before_inside_and_after_a_checkpoint(reentrant):
    """The backward of the checkpoint comes to the weight while the one around it is on its way."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"shared": nn.Linear(5, 5), "out": nn.Linear(5, 2)}).double()
    optimizer = KFQN(model, lr=0.0, activation_factor="action")
    shared, seen = model["shared"], [x]
    for inside in (False, True, False):
        block = lambda h: torch.tanh(shared(h))  # noqa: E731
        seen.append(checkpoint(block, seen[-1], use_reentrant=reentrant) if inside else block(seen[-1]))
    with silence():
        model["out"](seen[-1]).square().mean().backward()
        optimizer.step()
    assert error(H_of(optimizer, "shared"), inverse_of(torch.cat(seen[:3]))) < 1e-9


@pytest.mark.parametrize("cleared", [False, True])
def test_micro_batches_whose_gradients_have_a_graph(cleared):
    """`backward(create_graph=True)` adds to a gradient by putting a new tensor in its place."""
    model, optimizer = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward")
        for batch in (x, far):
            if cleared:
                model.zero_grad()
            (model(batch).square().mean() / 2).backward(create_graph=True)
    with silence():
        optimizer.step()
    assert error(H_of(optimizer, "0"), inverse_of(far if cleared else torch.cat([x, far]))) < 1e-9
    model.zero_grad()  # or the gradients and their graphs would keep each other

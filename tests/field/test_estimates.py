"""The first estimate, layouts of a batch, and numbers at the edge of what float32 holds."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfqn_core import KFQN
from tests.field.programs import H_of, difference, mlp, randn, silence, still, train, values


def factor(program, make=lambda: mlp(5, 8, 1), layer="0", **options):
    """`H_a` of a layer after the first step of a program."""
    model = make()
    optimizer = KFQN(model, lr=0.0, activation_factor="action", **options)
    with silence():
        program(model, optimizer)
        optimizer.step()
    return H_of(optimizer, layer)


x, far = randn(24, 5), 5 + randn(16, 5, seed=2)

# -- the first estimate


@pytest.mark.parametrize("scale", [255.0, 1e4])
@pytest.mark.parametrize("factors", ["action", "inverse", "auto"])
@pytest.mark.parametrize("kind", ["constant columns", "counts", "images"])
def test_the_first_estimate_is_positive_definite(scale, factors, kind):
    torch.manual_seed(0)
    if kind == "images":
        model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 200))
        inputs = scale * torch.rand(3, 8, 4, 4)
    else:
        model = nn.Sequential(nn.Linear(150, 200))
        inputs = scale * torch.rand(20, 150) if kind == "counts" else scale * torch.ones(7, 150)
    optimizer = KFQN(model, lr=1e-3, activation_factor=factors)  # the inputs of a layer hardly change
    with silence():
        train(optimizer, lambda: functional.cross_entropy(model(inputs), torch.arange(len(inputs))), 4)
    for layer in optimizer.layers.values():
        eigenvalues = torch.linalg.eigvalsh(layer.activation.H.double())
        assert eigenvalues.min() > 0
        assert eigenvalues.max() < 1.02 / 0.03
    assert all(p.isfinite().all() for p in model.parameters())


BAD = {
    "loss": lambda model: model(x).square().mean() * torch.nan,
    "input": lambda model: model(x * torch.tensor([1.0, 1.0, torch.inf, 1.0, 1.0])).square().mean(),
    "one gradient": lambda model: (model(x) + torch.sqrt(0.0 * model[2].bias)).square().mean(),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("factors", ["action", "inverse", "low_rank", "diagonal"])
@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_the_first_good_batch_is_the_first(bad, factors, pairs):
    model, plain = mlp(5, 40, 40), mlp(5, 40, 40)
    options = {"activation_factor": factors, "pairs": pairs, "rank": 2, "refresh": 1, "lr": 0.01}
    optimizer, of_plain = KFQN(model, **options), KFQN(plain, **options)
    before = values(model)
    with silence():
        for _ in range(2):
            train(optimizer, lambda: bad(model), 1)
        assert len(still(model, before)) == 4
        assert not any(layer.started for layer in optimizer.layers.values())
        assert optimizer.skipped_steps == 2
        train(optimizer, lambda: (model(x) - 1).square().mean(), 6)
        train(of_plain, lambda: (plain(x) - 1).square().mean(), 6)
    assert difference(model, plain) < 1e-5


# -- layouts


LAYOUTS = {
    "batch first": lambda x: x,
    "time first": lambda x: x.transpose(0, 1),
    "flat": lambda x: x.flatten(0, 1),
    "four axes": lambda x: x.unflatten(1, (3, -1)),
    "not contiguous": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "options", [{}, {"pairs": "next_batch"}, {"pairs": "next_batch", "damping_split": "locations"}]
)
def test_the_same_network_and_data_in_every_layout_is_the_same_run(layout, options):
    sequences, runs = randn(4, 6, 5), []
    for arrange in (layout, LAYOUTS["flat"]):
        model = mlp(5, 8, 8, 3)
        optimizer = KFQN(model, **options)
        with silence():
            train(optimizer, lambda: (model(arrange(sequences)) - 1).square().mean(), 8)  # noqa: B023
        runs.append(model)
    assert difference(*runs) < 1e-4


def test_recurrent_and_attention_in_both_layouts():
    sequences, runs = randn(4, 6, 8), []
    for batch_first in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleDict({
            "in": nn.Linear(8, 8), "mix": nn.MultiheadAttention(8, 2, batch_first=batch_first), "out": nn.Linear(8, 3),
        })  # fmt: skip
        optimizer = KFQN(model, activation_factor="action")
        inputs = sequences if batch_first else sequences.transpose(0, 1)
        with silence():
            for _ in range(5):
                optimizer.zero_grad()
                h = model["in"](inputs)
                model["out"](model["mix"](h, h, h)[0]).square().mean().backward()
                optimizer.step()
        runs.append(model)
    assert difference(*runs) < 1e-4


def test_a_cell_called_step_by_step_is_the_layer_called_once():
    """A recurrence written as a loop, and the same positions in one call."""
    sequences, runs = randn(4, 6, 5), []
    for loop in (True, False):
        model = mlp(5, 8, 3)
        optimizer = KFQN(model)
        run = lambda model=model, loop=loop: (  # noqa: E731
            torch.stack([model(sequences[:, t]) for t in range(6)], 1) if loop else model(sequences)
        )
        with silence():
            train(optimizer, lambda run=run: (run() - 1).square().mean(), 6)
        runs.append(model)
    assert difference(*runs) < 1e-4


# -- numbers at the edge


def test_a_norm_beyond_float16():
    """Every gradient is finite, the sum of their squares is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    optimizer, before = KFQN(model), values(model)
    with silence():
        for _ in range(3):
            optimizer.zero_grad()
            (model(randn(16, 64).half()).float() * 5e2).sum().backward()
            assert model[1].weight.grad.float().norm() > 65504
            assert all(p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not still(model, before)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [1e18, 1e21, 1e30])
@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_gradients_whose_squares_overflow_move_or_are_counted(size, pairs):
    model = mlp(5, 8, 3)
    optimizer, before = KFQN(model, pairs=pairs), values(model)
    with silence():
        train(optimizer, lambda: size * model(x).square().mean(), 3)
    assert optimizer.skipped_steps or not still(model, before)
    assert all(p.isfinite().all() for p in model.parameters())


def test_two_threads_train_two_halves_of_a_model():
    """Each thread runs its own branch; what one sees is nothing to the other."""
    torch.manual_seed(0)
    model = nn.ModuleList([mlp(5, 8, 3), mlp(5, 8, 3)])
    plain = copy.deepcopy(model)
    optimizer, of_plain = KFQN(model), KFQN(plain)
    for step in range(5):
        optimizer.zero_grad()
        threads = [threading.Thread(target=lambda n=n: n(x + step).square().mean().backward()) for n in model]  # noqa: B023
        [t.start() for t in threads]
        [t.join() for t in threads]
        of_plain.zero_grad()
        sum(net(x + step).square().mean() for net in plain).backward()
        with silence():
            optimizer.step()
            of_plain.step()
    assert difference(model, plain) < 1e-5

"""Inputs that are gone by the step, and activation checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kfqn_core import KFQN
from tests.field.programs import H_of, difference, error, inverse_of, mlp, randn, silence


def factor(program, make=lambda: mlp(5, 8, 1), layer="0", **options):
    """`H_a` of a layer after the first step of a program."""
    model = make()
    optimizer = KFQN(model, lr=0.0, activation_factor="action", **options)
    with silence():
        program(model, optimizer)
        optimizer.step()
    return H_of(optimizer, layer)


x, far = randn(24, 5), 5 + randn(16, 5, seed=2)

# -- inputs that are gone by the step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("where", ["input", "column", "hidden"])
def test_a_buffer_that_is_filled_again_before_the_step(accumulate, where):
    def program(model, optimizer):
        buffer = torch.empty(24 // accumulate, 5)
        for part in x.chunk(accumulate):
            buffer.copy_(part)
            (model(buffer[:, :] if where == "column" else buffer).square().mean() / accumulate).backward()
        buffer.fill_(77.0)

    assert error(factor(program), inverse_of(x)) < 1e-4


def test_a_static_input_written_by_an_out_argument():
    def program(model, optimizer):
        buffer = torch.empty(24, 5)
        torch.mul(x, 1.0, out=buffer)
        model(buffer).square().mean().backward()
        torch.mul(x, 99.0, out=buffer)

    assert error(factor(program), inverse_of(x)) < 1e-4


def test_a_large_buffer_that_is_filled_again_is_never_taken_for_what_it_was():
    big = randn(2**13, 600, seed=4)

    def program(model, optimizer):
        buffer = big.clone()
        model(buffer).square().mean().backward()
        buffer.fill_(1e3)

    make = lambda: nn.Sequential(nn.Linear(600, 4))  # noqa: E731
    H = factor(program, make)
    sure = error(H, inverse_of(big))
    untouched = error(H, torch.eye(601))
    assert min(sure, untouched) < 1e-3  # the truth, or nothing


@pytest.mark.parametrize("inplace", [False, True])
def test_micro_batches_behind_an_operation_in_place(inplace):
    """An input that was written over before its layer has seen it is the input, also where it is thinned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 3))
    optimizer = KFQN(model, lr=0.0, activation_factor="action")
    batches = [randn(600, 5, seed=seed) * scale for seed, scale in enumerate((4.0, 4.0, 4.0, 1.0))]
    with silence():
        for batch in batches:
            (model(batch).square().mean() / 4).backward()
        optimizer.step()
    assert error(H_of(optimizer, "2"), inverse_of(model[1](model[0](torch.cat(batches))))) < 0.3  # of some, all


# -- checkpointing


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def middle(self, h):
        return torch.tanh(self.shared(torch.tanh(self.shared(h))))

    def forward(self, x, run):
        return self.last(run(self.middle, torch.tanh(self.first(x))))


CHECKPOINTS = {
    "reentrant": lambda f, h: checkpoint(f, h, use_reentrant=True),
    "not reentrant": lambda f, h: checkpoint(f, h, use_reentrant=False),
    "within another": lambda f, h: checkpoint(lambda h: checkpoint(f, h, use_reentrant=False), h, use_reentrant=False),
    "reentrant within another": lambda f, h: checkpoint(
        lambda h: checkpoint(f, h, use_reentrant=True), h, use_reentrant=False
    ),
}


@pytest.mark.parametrize("run", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("pairs", [None, "next_batch", "second_pass"])
def test_a_layer_used_twice_inside_a_checkpoint(run, pairs):
    runs = []
    for how in (run, lambda f, h: f(h)):
        model = Blocks()
        optimizer = KFQN(model, pairs=pairs, lr=0.02)

        def closure(optimizer=optimizer, model=model, how=how):
            optimizer.zero_grad()
            loss = (model(x, how) - 1).square().mean()
            loss.backward()
            return loss

        with silence():
            for _ in range(6):
                optimizer.step(closure)
        runs.append((model, optimizer))
    (one, of_one), (two, of_two) = runs
    assert error(H_of(of_one, "shared"), H_of(of_two, "shared")) < 1e-4
    assert difference(one, two) < 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_begins_with_the_first_layer(reentrant):
    runs = []
    for checkpointed in (True, False):
        model = mlp(5, 8, 8, 1)
        optimizer, inputs = KFQN(model, pairs="second_pass", lr=0.02), x.clone().requires_grad_()

        def closure(model=model, optimizer=optimizer, inputs=inputs, checkpointed=checkpointed):
            optimizer.zero_grad()
            out = checkpoint_sequential(model, 2, inputs, use_reentrant=reentrant) if checkpointed else model(inputs)
            loss = (out - 1).square().mean()
            loss.backward()
            return loss

        with silence():
            for _ in range(6):
                optimizer.step(closure)
        runs.append(model)
    assert difference(*runs) < 1e-4


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 does not tell that a forward is checkpointed")
@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_a_step_between_a_checkpointed_forward_and_its_repetition(pairs):
    """The forward is a step ahead. Which inputs are looked at changes with the step, and the gradients do not."""
    model, twin = mlp(5, 8, 8, 8, 3), mlp(5, 8, 8, 8, 3)
    optimizer = KFQN(model, pairs=pairs)
    for step in range(45):
        batch = randn(24, 5, seed=step)
        ahead = checkpoint(model, batch, use_reentrant=False).square().mean()
        twin.load_state_dict(model.state_dict())
        of_twin = checkpoint(twin, batch, use_reentrant=False).square().mean()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        with silence():
            optimizer.step()
        twin.load_state_dict(model.state_dict())
        model.zero_grad(), twin.zero_grad()
        ahead.backward(), of_twin.backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))

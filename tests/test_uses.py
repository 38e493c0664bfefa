"""Which uses of a layer count: those that have entered the gradient which the step will take."""

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from tests.test_optimizer import error

F64 = torch.float64


def drawn(seed):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, KFQN(model, lr=0.1, **options)


def loss_of(model, x):
    return model(x).square().mean()


def nobody_differentiates(model, x):
    loss_of(model, x)


def gradient_by_the_inputs(model, x):
    torch.autograd.grad(loss_of(model, x.requires_grad_()), x)


def backward_into_the_inputs(model, x):
    loss_of(model, x.requires_grad_()).backward(inputs=[x])


def set_to_none(model, x):
    loss_of(model, x).backward()
    model.zero_grad()


def zeroed_in_place(model, x):
    loss_of(model, x).backward()
    model.zero_grad(set_to_none=False)


def replaced(model, x):
    loss_of(model, x).backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def without_gradients(model, x):
    with torch.no_grad():
        model(x)


LEAVE_NO_TRACE = (nobody_differentiates, gradient_by_the_inputs, backward_into_the_inputs, without_gradients)
CLEAR = (set_to_none, zeroed_in_place, replaced)
WHEN = [("before", foreign) for foreign in (*LEAVE_NO_TRACE, *CLEAR)] + [
    ("after", foreign) for foreign in LEAVE_NO_TRACE
]


@pytest.mark.parametrize("pairs", [None, "next_batch"])
@pytest.mark.parametrize(("when", "foreign"), WHEN)
def test_what_is_not_in_the_gradient_does_not_count(when, foreign, pairs):
    """Nor does it change anything of what does."""
    model, optimizer = network(pairs=pairs)
    twin, expected = network(pairs=pairs)
    loss_of(twin, drawn(1)).backward()
    if when == "before":
        foreign(model, drawn(0))
    loss_of(model, drawn(1)).backward()
    if when == "after":
        foreign(model, drawn(0))
    seen, alone = optimizer.plan.hooks.pop(), expected.plan.hooks.pop()
    assert seen.keys() == alone.keys() == {"0", "2"}
    for name, record in seen.items():
        assert [use.samples for use in record.uses] == [6]
        assert torch.equal(record.uses[0].x, alone[name].uses[0].x)
        if pairs:
            assert torch.equal(record.mean_gradient(), alone[name].mean_gradient())
            assert torch.equal(record.mean_output(), alone[name].mean_output())


def test_micro_batches_count_together():
    """And none of them twice, however often backward comes by: here for two losses of the same forward."""
    model, optimizer = network(pairs="next_batch")
    twin, expected = network(pairs="next_batch")
    for x in (drawn(0), drawn(1)):
        h = model(x)
        (h[:, 0].square().mean() / 4).backward(retain_graph=True)
        (h[:, 1].square().mean() / 4).backward()
    loss_of(twin, torch.cat([drawn(0), drawn(1)])).backward()
    for name, record in optimizer.plan.hooks.pop().items():
        alone = expected.plan.hooks[name].pop()
        assert [use.samples for use in record.uses] == [6, 6]
        for statistic in ("mean_input", "second_moment", "mean_output", "mean_gradient"):
            assert error(getattr(record, statistic)(), getattr(alone, statistic)()) < 1e-13


def test_an_inner_derivative_is_no_use_of_its_own():
    """A penalty on the gradient by the inputs: backward goes through the layer twice, for one use."""
    model, optimizer = network()
    x = drawn(0).requires_grad_()
    loss = loss_of(model, x)
    (inner,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + inner.square().sum()).backward()
    for record in optimizer.plan.hooks.pop().values():
        assert [use.samples for use in record.uses] == [6]


def test_gradients_that_are_taken_and_assigned_count_as_accumulated_ones():
    steps = []
    for assign in (False, True):
        model, optimizer = network(pairs="next_batch")
        for seed in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, drawn(seed))
            if assign:
                for p, gradient in zip(
                    model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
                ):
                    p.grad = gradient
            else:
                loss.backward()
            optimizer.step()
        steps.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*steps)

"""What a second evaluation, and a look at a model, put back: gradients of others, buffers that are assigned."""

import inspect
import warnings

import pytest
import torch
from torch import nn

from kfqn_core import KFQN, describe
from tests.field.programs import error, heard, mlp, randn, silence, twins

F64 = torch.float64
# PyTorch's own: it compiles a derivative with a deprecated tool.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def blocks(kind=nn.TransformerEncoderLayer, **options):
    torch.manual_seed(0)
    return nn.ModuleList(kind(8, 2, 16, **{"batch_first": True, "dropout": 0.0} | options) for _ in range(2))


# -- gradients of others, which a second evaluation must not add to

RETURNS = {
    "float": lambda loss: loss.item(),
    "detached": lambda loss: loss.detach(),
    "nothing": lambda loss: None,
    "loss": lambda loss: loss,
}


class Before:
    """What a closure may do to the gradients of a head before backward."""

    @staticmethod
    def nothing(p):
        pass

    @staticmethod
    def none(p):
        p.grad = None

    @staticmethod
    def deletes(p):
        del p.grad

    @staticmethod
    def zeroes(p):
        if p.grad is not None:
            p.grad.zero_()

    @staticmethod
    def optimizer(p):
        torch.optim.SGD([p], 0.1).zero_grad()

    @staticmethod
    def optimizer_in_place(p):
        torch.optim.SGD([p], 0.1).zero_grad(set_to_none=False)


@pytest.mark.parametrize("returns", RETURNS.values(), ids=RETURNS)
@pytest.mark.parametrize("before", [name for name in vars(Before) if not name.startswith("_")])
@pytest.mark.parametrize("kind", ["module", "parameter", "tensor"])
def test_gradients_of_parameters_outside_of_the_model_are_those_of_the_first_evaluation(returns, before, kind):
    model, module, x = mlp(4, 3), nn.Linear(3, 3), randn(6, 4)
    head = {
        "module": module.weight,
        "parameter": nn.Parameter(randn(3, 3)),
        "tensor": randn(3, 3).requires_grad_(),
    }[kind]
    before, seen = getattr(Before, before), []
    head.grad = torch.ones(3, 3)
    optimizer = KFQN(model, lr=0.5, pairs="second_pass")

    def closure():
        optimizer.zero_grad()
        before(head)
        h = model(x)
        loss = (module(h) if kind == "module" else h @ head).square().mean()
        loss.backward()
        seen.append((head.grad, None if head.grad is None else head.grad.clone()))
        if head.grad is not None:  # it is, where the head is frozen for the second evaluation
            nn.utils.clip_grad_norm_([head], 1e-3)
        return returns(loss)

    with silence():
        optimizer.step(closure)
    assert len(seen) == 2
    (left, first), (_, second) = seen
    assert head.grad is left
    assert error(head.grad, first * (1e-3 / first.norm())) < 1e-3  # clipped once; torch adds 1e-6 to the norm
    assert second is None or error(second, first) > 1e-3  # the weights have moved between: it would be noticed
    assert head.requires_grad


OVERRIDABLE = "has_torch_function" in inspect.getsource(torch.autograd.backward)


@pytest.mark.parametrize("way", ["one after the other", "autograd.backward"])
def test_of_several_losses_a_closure_returns_one(way):
    if way == "autograd.backward" and not OVERRIDABLE:
        pytest.skip("in this torch nobody can know of a call of torch.autograd.backward: use a newer one")
    model, heads, x = mlp(4, 3), [nn.Linear(3, 3), nn.Linear(3, 2)], randn(6, 4)
    plain = twins(nn.ModuleList([model, *heads]))[1]
    optimizer = KFQN(model, lr=0.0, pairs="second_pass")

    def gradients(model, heads):
        losses = [head(model(x)).square().mean() for head in heads]
        if way == "autograd.backward":
            torch.autograd.backward(losses)
        else:
            for loss in losses:
                loss.backward()
        return losses[-1]

    gradients(plain[0], plain[1:])

    def closure():
        optimizer.zero_grad()
        return gradients(model, heads)

    with silence():
        optimizer.step(closure)
    for head, truth in zip(heads, plain[1:], strict=True):
        assert error(head.weight.grad, truth.weight.grad) < 1e-6
        assert error(head.bias.grad, truth.bias.grad) < 1e-6


def test_gradients_are_put_back_if_the_second_evaluation_fails():
    model, head, x, calls = mlp(4, 3), nn.Linear(3, 3), randn(6, 4), []
    optimizer = KFQN(model, pairs="second_pass")

    def closure():
        optimizer.zero_grad()
        head.zero_grad()
        loss = head(model(x)).square().mean()
        loss.backward()
        calls.append(head.weight.grad)
        if len(calls) == 2:
            raise ArithmeticError
        return loss.item()

    with heard() as messages:
        optimizer.step(closure)
    assert len(messages) == 1
    assert "ArithmeticError" in messages[0]
    assert head.weight.grad is calls[0]
    with silence():
        optimizer.step(closure)
    assert head.weight.grad is calls[2]


# -- buffers that a forward assigns


class Remembers(nn.Module):
    """A forward that puts new tensors in the place of its buffers, and registers one."""

    def __init__(self, d=5, e=3):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(d, e)
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("last", None)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(d), persistent=False)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.last = x.detach().clone()
        self.count += 1
        self.scale = self.scale * 2
        if not hasattr(self, "first"):
            self.register_buffer("first", x.detach().clone())
        return self.fc(x - self.mean)


def buffers(module):
    """Every buffer with its value, by name: those that are None, too."""
    return {name: (b, None if b is None else b.clone()) for name, b in module._buffers.items()}


def check_buffers(module, before):
    assert list(module._buffers) == list(before)
    for name, (tensor, value) in before.items():
        assert module._buffers[name] is tensor
        assert tensor is None or torch.equal(tensor, value)


@pytest.mark.parametrize("look", ["describe", "warm start"])
def test_a_look_at_a_model_leaves_no_trace_in_buffers(look):
    model, x = Remembers(), randn(6, 5)
    optimizer = KFQN(model)
    for _ in range(2):  # before the first forward, and after one
        before, saved = buffers(model), set(model.state_dict())
        if look == "describe":
            describe(model, x)
        else:
            optimizer.warm_start([x, 2 * x])
        check_buffers(model, before)
        assert set(model.state_dict()) == saved
        model(x)


@pytest.mark.parametrize("which", ["model", "head", "shared"])
def test_the_second_evaluation_leaves_no_trace_in_buffers(which):
    x = randn(6, 5)
    model, other = (Remembers(), nn.Linear(3, 3)) if which == "model" else (mlp(5, 5), Remembers())
    body, noted = (model, model) if which == "model" else (model, other)
    first = Remembers() if which == "shared" else None
    if first is not None:
        first.count = other.count  # one tensor, two modules
    optimizer, seen = KFQN(body, lr=0.1, pairs="second_pass"), []

    def closure():
        optimizer.zero_grad()
        h = x if first is None else first.mean + x + 0 * first(x).sum()
        loss = other(model(h)).square().mean()
        loss.backward()
        seen.append([buffers(each) for each in (noted, *([first] if first else []))])
        return loss

    for _ in range(3):
        with silence():
            optimizer.step(closure)
        for module, before in zip((noted, first), seen[-2], strict=False):
            check_buffers(module, before)
    assert noted.count == (6 if first else 3)


def test_a_scripted_module_in_the_closure():
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(5))

        def forward(self, x):
            self.mean = 0.5 * self.mean + x.mean(0)
            return x - self.mean

    model, x = mlp(5, 3), randn(6, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripts are of yesterday
        first = torch.jit.script(Scripted())
    optimizer = KFQN(model, lr=0.1, pairs="second_pass")

    def closure():
        optimizer.zero_grad()
        loss = model(first(x)).square().mean()
        loss.backward()
        return loss

    with silence():
        optimizer.step(closure)
    assert error(first.mean, x.mean(0)) < 1e-6

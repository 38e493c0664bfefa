"""Closures: what they may return, and a second evaluation that nothing else notices."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kfqn_core import KFQN, presets
from tests.field.programs import difference, error, heard, mlp, randn, silence, still, values

x, y = randn(16, 5), torch.arange(16) % 3

# -- what a closure returns

RETURNS = {
    "float": lambda loss, h: loss.item(),
    "tuple": lambda loss, h: (loss, h),
    "vector": lambda loss, h: h.detach(),
    "one number in a vector": lambda loss, h: loss.view(1),
    "dict": lambda loss, h: {"loss": loss, "h": h},
    "nothing": lambda loss, h: None,
    "detached": lambda loss, h: loss.detach(),
    "numpy": lambda loss, h: loss.detach().numpy(),
}


@pytest.mark.parametrize("pairs", [None, "next_batch", "second_pass"])
@pytest.mark.parametrize("returns", RETURNS.values(), ids=RETURNS)
def test_a_closure_may_return_what_it_likes(returns, pairs):
    model, plain = mlp(5, 8, 3), mlp(5, 8, 3)
    optimizer, of_plain = KFQN(model, pairs=pairs, lr=0.01), KFQN(plain, pairs=pairs, lr=0.01)

    def closure(net, steps, gives):
        steps.zero_grad()
        h = net(x)
        loss = functional.cross_entropy(h, y)
        loss.backward()
        return gives(loss, h)

    with silence():
        for _ in range(4):
            got = optimizer.step(lambda: closure(model, optimizer, returns))
            of_plain.step(lambda: closure(plain, of_plain, lambda loss, h: loss))
    assert difference(model, plain) == 0
    assert type(got) is type(returns(torch.zeros(()), torch.zeros(2)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", ["float", "tensor"])
def test_a_loss_that_is_not_finite_skips_the_step_whatever_its_form(value, form):
    model = mlp(5, 8, 3)
    optimizer, before = KFQN(model), values(model)

    def closure():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        return value if form == "float" else torch.tensor([value])

    with silence():
        optimizer.step(closure)
    assert optimizer.skipped_steps == 1
    assert len(still(model, before)) == 4


# -- what the second evaluation leaves alone


class Noisy(nn.Module):
    """Draws from torch, Python and NumPy, counts its calls in a buffer, and has dropout and batch norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.drop, self.b = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        x = x[:, np.random.permutation(5)] + random.random()
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


@pytest.mark.parametrize("whole", [True, False])
def test_randomness_of_every_kind_is_the_same_twice(whole):
    """At the rate zero both evaluations are the same, so that s and y are zero."""
    torch.manual_seed(0)
    model = Noisy()
    optimizer = KFQN(
        model if whole else nn.ModuleList([model.a, model.b]), lr=0.0, pairs="second_pass", pair_momentum=0.0
    )

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with silence():
        for _ in range(3):
            optimizer.step(closure)
    assert model.calls == 3
    assert model.norm.num_batches_tracked == 3
    for layer in optimizer.layers.values():
        assert layer.gradient.s_mean.abs().max() == 0
        assert layer.gradient.y_mean.abs().max() == 0


def test_the_streams_of_random_numbers_go_on_as_if_there_were_no_second_evaluation():
    streams = []
    for pairs in (None, "second_pass"):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        model = Noisy()
        optimizer = KFQN(model, lr=0.0, pairs=pairs)

        def closure(optimizer=optimizer, model=model):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        with silence():
            losses = [optimizer.step(closure).item() for _ in range(3)]
        streams.append((losses, torch.rand(3).tolist(), random.random(), np.random.rand()))
    assert streams[0] == streams[1]


@pytest.mark.parametrize("zeroes", ["all", "own"])
@pytest.mark.parametrize("which", ["head", "body"])
def test_the_part_of_another_optimizer_is_left_alone(which, zeroes):
    """KFQN over one part, SGD over the other: gradients, buffers and weights of the other part are plain SGD's."""
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, 3)
    plain = copy.deepcopy((body, head))
    runs = []
    for (one, two), pairs in (((body, head), "second_pass"), (plain, None)):
        own, others = (two, one) if which == "head" else (one, two)
        optimizer = KFQN(own, lr=0.0, pairs=pairs, pair_momentum=0.0)
        sgd = torch.optim.SGD(others.parameters(), 0.1, momentum=0.9)

        def closure(one=one, two=two, optimizer=optimizer, sgd=sgd):
            optimizer.zero_grad()
            if zeroes == "all":
                sgd.zero_grad()
            loss = functional.cross_entropy(two(one(x)), y)
            loss.backward()
            return loss

        with silence():
            for _ in range(4):
                if zeroes == "own":
                    sgd.zero_grad()
                optimizer.step(closure)
                sgd.step()
        runs.append((one, two))
    for ours, theirs in zip(*runs, strict=True):
        for key, value in ours.state_dict().items():
            assert error(value, theirs.state_dict()[key]) < 1e-6, key
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert error(p.grad, q.grad) < 1e-6
            assert p.requires_grad


def test_gradients_that_were_clipped_in_the_closure_move_the_weights():
    model, plain = mlp(5, 8, 3), mlp(5, 8, 3)
    optimizer, of_plain = (
        KFQN(model, lr=0.1, step_length="raw", pairs="second_pass"),
        KFQN(plain, lr=0.1, step_length="raw"),
    )
    norms = []

    def closure(net, steps):
        steps.zero_grad()
        loss = functional.cross_entropy(net(x), y)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 1e-3).item())
        return loss

    with silence():
        optimizer.step(lambda: closure(model, optimizer))
    seen = [p.grad.clone() for p in model.parameters()]
    of_plain.zero_grad()
    functional.cross_entropy(plain(x), y).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
    assert max(map(error, seen, (p.grad for p in plain.parameters()))) < 1e-5


def log_norms(model):
    sum(p.grad.norm() for p in model.parameters()).item()


def look_at_gradients(model):
    [p.grad.abs().max().item() for p in model.parameters()]


def gradient_by_the_input(model):
    inputs = x.clone().requires_grad_()
    torch.autograd.grad(model(inputs).sum(), inputs)


def evaluate_without_gradients(model):
    with torch.no_grad():
        model(x)


def a_detached_use(model):
    model(x).detach().mean()


def toggle_mode(model):
    model.eval()
    with torch.inference_mode():
        model(x)
    model.train()


@pytest.mark.parametrize(
    "extra",
    [log_norms, look_at_gradients, gradient_by_the_input, evaluate_without_gradients, a_detached_use, toggle_mode],
)
@pytest.mark.parametrize("before", [True, False])
def test_what_else_a_closure_does_changes_nothing(extra, before):
    if before and extra in (log_norms, look_at_gradients):
        extra = toggle_mode
    runs = []
    for disturbed in (True, False):
        model = mlp(5, 8, 3)
        optimizer = KFQN(model, lr=0.02, pairs="second_pass", pair_momentum=0.0)

        def closure(model=model, optimizer=optimizer, disturbed=disturbed):
            optimizer.zero_grad()
            if disturbed and before:
                extra(model)
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            if disturbed and not before:
                extra(model)
            return loss

        with silence():
            for _ in range(5):
                optimizer.step(closure)
        runs.append((model, optimizer))
    (one, of_one), (two, of_two) = runs
    assert difference(one, two) < 1e-5
    for name, layer in of_one.layers.items():
        assert error(layer.gradient.inverse.dense(), of_two.layers[name].gradient.inverse.dense()) < 1e-4


def gradient_penalty(model):
    inputs = x.double().requires_grad_()
    out = model(inputs)
    slopes = torch.autograd.grad(out.sum(), inputs, create_graph=True)[0]
    return out.square().mean() + slopes.square().sum(1).mean()


def adversarial(model):
    """Trained on what an attack within the closure has found."""
    delta = torch.zeros(16, 5, dtype=torch.float64, requires_grad=True)
    functional.cross_entropy(model(x + delta), y).backward(inputs=[delta])
    return functional.cross_entropy(model(x + 0.1 * delta.grad.sign()), y)


def hidden_slopes(model):
    h = model[0](x.double())
    slopes = torch.autograd.grad(model[2](torch.tanh(h)).square().sum(), h, create_graph=True)[0]
    return model[2](torch.tanh(h)).square().mean() + slopes.square().mean()


@pytest.mark.parametrize("loss", [gradient_penalty, adversarial, hidden_slopes])
def test_the_two_evaluations_of_a_loss_with_inner_gradients_are_compared_like_with_like(loss):
    """Between two points y is the change of the bias's gradient, which is the sum over samples of that of h."""
    model = mlp(5, 8, 3).double()
    optimizer = KFQN(model, lr=0.05, pairs="second_pass", pair_momentum=0.0)

    def gradient():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    gradient()
    before = model[0].bias.grad.clone()
    with silence():
        optimizer.step(gradient)
    gradient()
    assert error(optimizer.layers["0"].gradient.y_mean[0], model[0].bias.grad - before) < 1e-6


@pytest.mark.parametrize("inside", [1, 2])
@pytest.mark.parametrize("preset", [{"pairs": "second_pass"}, presets.KBFGS_2020, presets.KBFGS_L_2020])
def test_micro_batches_outside_of_the_closure_are_in_no_pair(inside, preset):
    """At the rate zero a pair of the same micro-batches is zero, wherever the others ran."""
    model = mlp(5, 8, 3)
    optimizer = KFQN(model, lr=0.0, **{**preset, "pair_momentum": 0.0})
    parts = list(zip(x.split(4), y.split(4), strict=True))

    def backward(some):
        loss = sum(functional.cross_entropy(model(part), of) / 4 for part, of in some)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.zero_grad()
        for part in parts[inside:]:
            backward([part])
        with silence():
            optimizer.step(lambda: backward(parts[:inside]))
    for layer in optimizer.layers.values():
        assert layer.gradient.s_mean.abs().max() == 0
        assert layer.gradient.y_mean.abs().max() < 1e-7


def test_micro_batches_within_the_closure_are_one_batch():
    runs = []
    for k in (1, 4):
        model = mlp(5, 8, 3)
        optimizer = KFQN(model, lr=0.05, pairs="second_pass", pair_momentum=0.0)

        def closure(model=model, optimizer=optimizer, k=k):
            optimizer.zero_grad()
            total = 0.0
            for part, of in zip(x.chunk(k), y.chunk(k), strict=True):
                loss = functional.cross_entropy(model(part), of) / k
                loss.backward()
                total += loss.detach()
            return total

        with silence():
            for _ in range(4):
                optimizer.step(closure)
        runs.append((model, optimizer))
    (one, of_one), (two, of_two) = runs
    assert difference(one, two) < 1e-3
    for name, layer in of_one.layers.items():
        assert error(layer.gradient.y_mean, of_two.layers[name].gradient.y_mean) < 1e-2


class FailsError(Exception):
    pass


@pytest.mark.parametrize("when", ["first", "second"])
def test_a_closure_that_fails_leaves_whole_steps(when):
    model = mlp(5, 8, 3)
    optimizer, before, calls = KFQN(model, pairs="second_pass"), values(model), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if len(calls) == (1 if when == "first" else 2):
            raise FailsError
        return loss

    with heard() as messages:
        if when == "first":
            with pytest.raises(FailsError):
                optimizer.step(closure)
            assert len(still(model, before)) == 4
        else:
            optimizer.step(closure)
            assert not still(model, before)
    assert ["Fails" in text for text in messages] == ([] if when == "first" else [True])
    assert all(p.requires_grad for p in model.parameters())
    with silence():
        for _ in range(3):
            optimizer.step(closure)
    assert all(p.grad is not None for p in model.parameters())


def test_a_use_whose_output_does_not_reach_the_loss():
    """An auxiliary head is computed and thrown away, in the closure."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(5, 8), "one": nn.Linear(8, 3), "two": nn.Linear(8, 3)})
    for pairs in ("second_pass", "next_batch"):
        optimizer, before = KFQN(model, pairs=pairs), values(model)

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            h = torch.tanh(model["body"](x))
            model["two"](h)
            loss = functional.cross_entropy(model["one"](h), y)
            loss.backward()
            return loss

        with silence():
            for _ in range(4):
                optimizer.step(closure)
        assert still(model, before) == {"two.weight", "two.bias"}


def test_rest_of_the_trainer_goes_on_with_a_closure_and_a_scheduler():
    model = mlp(5, 8, 3)
    optimizer = KFQN(model, lr=0.02, pairs="second_pass")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with silence():
        losses = []
        for _ in range(40):
            losses.append(optimizer.step(closure).item())
            schedule.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("later", "warned"), [([16, 8], False), ([16], True)])
def test_a_closure_that_draws_its_mini_batches_has_no_pair_of_two_that_are_not_alike(later, warned):
    """Of another size, or none at all: README says that a closure draws nothing."""
    model = mlp(5, 8, 3)
    optimizer, batches = KFQN(model, lr=0.05, pairs="second_pass"), iter([x[:size] for size in later])
    with heard() as messages:
        optimizer.step(lambda: backward_of(model, next(batches)))
    assert ["StopIteration" in text for text in messages] == [True] * warned
    assert all(layer.gradient.s_mean.abs().max() == 0 for layer in optimizer.layers.values())
    assert all(layer.started for layer in optimizer.layers.values())


def backward_of(model, batch):
    loss = model(batch).square().mean()
    loss.backward()
    return loss

"""What follows a layer may write over its output, which for inputs of three axes is a view."""

import copy
import gc

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from tests.field.programs import error, silence, train


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.inner(x)
        h += x
        h[..., 0].mul_(2.0)
        return self.out(h)


MODELS = {
    "relu": lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "silu and dropout": lambda: nn.Sequential(
        nn.Linear(8, 6), nn.SiLU(inplace=True), nn.Dropout(0.0, inplace=True), nn.Linear(6, 3)
    ),
    "unbatched convolution": lambda: nn.Sequential(nn.Conv1d(4, 5, 3), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "added": Added,
}


@pytest.mark.parametrize("shape", [(3, 4, 8), (4, 8)])
@pytest.mark.parametrize("pairs", [None, "next_batch"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_seen(name, pairs, shape):
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer, x = KFQN(model, pairs=pairs), torch.randn(shape)
    names = set(optimizer.layers)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 3)
    assert set(optimizer.layers) == names
    assert all(layer.started for layer in optimizer.layers.values())


@pytest.mark.parametrize("shape", [(3, 4, 8), (2, 3, 4, 8), (5, 8), (8,)])
def test_gradients_are_those_of_before(shape):
    """Means of h and of its gradient, against the same network that writes over nothing."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    model = copy.deepcopy(plain)
    model[1].inplace = True
    x = torch.randn(shape, dtype=torch.float64)
    found = []
    for network in (plain, model):
        optimizer = KFQN(network, pairs="next_batch")
        network(x).square().mean().backward()
        found.append(optimizer.plan.hooks.pop())
    for name, record in found[0].items():
        assert error(found[1][name].mean_gradient(), record.mean_gradient()) < 1e-14
        assert error(found[1][name].mean_output(), record.mean_output()) < 1e-14


@pytest.mark.parametrize("first", ["the user's", "ours"])
def test_a_hook_that_changes_the_output_changes_no_statistics(first):
    """h is W a, and its gradient that of h, whatever a hook makes of it, registered before or after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    if first == "the user's":
        model[0].register_forward_hook(lambda module, args, h: 2 * h)
    optimizer = KFQN(model, pairs="next_batch")
    if first == "ours":
        model[0].register_forward_hook(lambda module, args, h: 2 * h)
    h = nn.functional.linear(x, model[0].weight, model[0].bias).detach().requires_grad_()
    (6 * model[2](torch.tanh(2 * h)).square().mean()).backward()  # six samples: the gradient of a mean, per sample
    model.zero_grad()
    model(x).square().mean().backward()
    record = optimizer.plan.hooks.pop()["0"]
    assert error(record.mean_output()[0], h.detach().mean(0)) < 1e-14
    assert error(record.mean_gradient()[0], h.grad.mean(0)) < 1e-13


def test_an_optimizer_that_goes_in_the_middle_of_a_forward_is_not_noticed():
    """As the garbage collector may do with one that was replaced, whenever it runs."""
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    old = KFQN(layer)
    layer.register_forward_hook(lambda *_: old.remove_hooks(), prepend=True)
    new = KFQN(layer)
    layer(x).square().mean().backward()
    new.step()
    assert new.layers[""].started


@pytest.mark.parametrize("name", ["attention", "linear"])
def test_a_forward_without_backward_is_freed(name):
    """Also of attention, whose input is read from its graph: nothing there may hold itself."""
    module = nn.MultiheadAttention(16, 2, batch_first=True) if name == "attention" else nn.Linear(16, 16)
    optimizer, x = KFQN(module), torch.randn(2, 3, 16)

    def watching():
        """How many objects know of a forward."""
        return sum(str(type(thing).__module__).startswith("kfqn_core.estimate") for thing in gc.get_objects())

    gc.collect()
    gc.disable()  # a circle would be freed some time, and memory filled until then
    try:
        before = watching()
        for _ in range(5):
            module(x, x, x) if name == "attention" else module(x)
        assert watching() == before
    finally:
        gc.enable()
    del optimizer

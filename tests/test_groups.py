"""Layers of one shape as one tensor, against the same layers one by one, in float64."""

import copy

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from kfqn_core.estimate.statistics import Record, Use
from kfqn_core.training.rounds import update
from tests.test_optimizer import METHODS, error, snapshot, train

F64 = torch.float64
LAYERS = {
    "linear": lambda: (nn.Linear(5, 3), (5,)),
    "no bias": lambda: (nn.Linear(5, 3, bias=False), (5,)),
    "conv": lambda: (nn.Conv2d(4, 6, 2, groups=2), (4, 3, 4)),
    "conv, no bias": lambda: (nn.Conv1d(3, 2, 2, bias=False), (3, 5)),
    "transposed": lambda: (nn.ConvTranspose2d(4, 6, 2, groups=2), (4, 3, 3)),  # no strides say how its weight is stored
}
# As to what an H_a is, and whether there is an H_g.
FACTORS = {
    "action": {"activation_factor": "action"},
    "low rank": {"activation_factor": "low_rank", "rank": 2},
    "diagonal": {"activation_factor": "diagonal"},
    "inverse": {"activation_factor": "inverse", "activation_decay": 0.9},
    "with H_g": {"activation_factor": "action", "pairs": "next_batch"},
    "with a limited H_g": {"activation_factor": "low_rank", "rank": 2, "pairs": "next_batch", "memory": 2},
}


def drawn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=F64)


def layers_after_three_steps(kind, count, params=lambda model: None, **options):
    """Layers of one shape, each with an input and a target of its own, and the optimizer; refreshed in every step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    made = [LAYERS[kind]() for _ in range(count)]
    model = nn.ModuleList(layer for layer, _ in made).double()
    optimizer = KFQN(model, params=params(model), refresh=1, **{"lr": 0.1, **options})
    for _ in range(3):
        optimizer.zero_grad()
        for i, (layer, shape) in enumerate(made):
            h = layer((1 + i) * drawn(generator, 7, *shape))
            (h - drawn(generator, *h.shape)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def look(optimizer):
    """Of every layer, copies of `W`, `M`, `H_a` and `H_g`."""
    seen = {}
    for name, layer in optimizer.layers.items():
        W = layer.view.to_matrix(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
        H_g = None if layer.gradient is None else layer.gradient.inverse.dense().clone()
        seen[name] = W.clone(), layer.M.clone(), layer.activation.H.clone(), H_g
    return seen


class SameShapes(nn.Module):
    """Convolutions of one shape at different numbers of locations, and fully connected layers of one shape."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, groups=2) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.begin, self.end = nn.Linear(16, 6), nn.Linear(6, 2)

    def forward(self, x):
        for conv in self.convs:
            x = nn.functional.avg_pool2d(torch.tanh(conv(x)), 2, ceil_mode=True)
        h = self.begin(nn.functional.pad(x.flatten(1), (0, 16 - x[0].numel())))
        for linear in self.linears:
            h = linear(torch.tanh(h))
        return self.end(torch.tanh(h))


@pytest.mark.parametrize("method", METHODS)
def test_layers_side_by_side_train_as_layers_alone(method):
    """In parameter groups of their own layers are no group; means over ten steps of everything that is kept."""
    generator = torch.Generator().manual_seed(0)
    data = [(drawn(generator, 9, 4, 12, 12), drawn(generator, 9, 2)) for _ in range(3)]
    torch.manual_seed(0)
    model = SameShapes().double()
    twin = copy.deepcopy(model)
    together = KFQN(model, lr=0.05, **METHODS[method])
    modules = [module for module in twin.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    alone = KFQN(twin, lr=0.05, params=[{"params": list(m.parameters())} for m in modules], **METHODS[method])
    assert len(together.plan.groups) == 4
    assert len(alone.plan.groups) == 8
    for optimizer, net in ((together, model), (alone, twin)):
        train(net, optimizer, data, 10)
    expected = snapshot(twin, alone)
    for name, value in snapshot(model, together).items():
        assert error(value, expected[name]) < 1e-9, name  # ten steps of rounding, amplified by the conditioning of H


def test_layers_look_at_their_part_of_the_group():
    """What `optimizer.layers` shows is the state itself, and of no other layer."""
    _, optimizer = layers_after_three_steps("conv", 3, **FACTORS["with H_g"])
    before = look(optimizer)
    layer = optimizer.layers["1"]
    layer.activation.inverse.H.mul_(2)
    layer.gradient.inverse.H.mul_(3)
    after = look(optimizer)
    for name in before:
        factor = 2 if name == "1" else 1
        assert torch.equal(after[name][2], factor * before[name][2])
        assert torch.equal(after[name][3], (3 if name == "1" else 1) * before[name][3])
    assert error(layer.direction(), layer.gradient.inverse.H @ layer.M @ layer.activation.H) < 1e-14


def seen_of(optimizer, seed, poisoned=()):
    """One use of every layer; NaN in the inputs of some."""
    generator = torch.Generator().manual_seed(seed)
    records = {}
    for name, layer in optimizer.layers.items():
        x = drawn(generator, 6, 4, 3, 4)
        if name in poisoned:
            x[0] = torch.nan
        records[name] = Record(layer.view, [Use(x, layer.view.locations(x))])
    return records


def test_first_estimates_come_layer_by_layer():
    """Of a layer that was not seen, or whose inputs were not finite, when it is; nobody else waits for it."""
    torch.manual_seed(0)
    model = nn.ModuleList(LAYERS["conv"]()[0] for _ in range(3)).double()
    optimizer = KFQN(model, activation_factor="action")
    ((group, _),) = optimizer.plan.groups
    finite, identity = torch.tensor(True), torch.eye(9, dtype=F64).expand(2, 9, 9)
    records = seen_of(optimizer, 0, poisoned=("1",))
    first = {"0": records["0"], "1": records["1"]}
    group.observe(group.batch(first), finite, average=True)
    assert [layer.started for layer in optimizer.layers.values()] == [True, False, False]
    assert torch.equal(optimizer.layers["1"].activation.H, identity)
    assert torch.equal(optimizer.layers["2"].activation.H, identity)
    settled = optimizer.layers["0"].activation.H.clone()
    group.observe(group.batch(seen_of(optimizer, 1)), torch.tensor(False), average=True)
    assert [layer.started for layer in optimizer.layers.values()] == [True, False, False]
    records = seen_of(optimizer, 2)
    group.observe(group.batch(records), finite, average=True)
    assert all(layer.started for layer in optimizer.layers.values())
    assert torch.equal(optimizer.layers["0"].activation.H, settled)  # one estimate is the first
    for name in ("1", "2"):
        exact = torch.linalg.inv(records[name].second_moment() + 0.03 * torch.eye(9, dtype=F64))
        assert error(optimizer.layers[name].activation.H, exact) < 1e-12


@pytest.mark.parametrize("factors", FACTORS)
def test_an_update_reaches_the_layers_that_were_seen_and_are_started(factors):
    _, optimizer = layers_after_three_steps("conv", 3, **FACTORS[factors])
    ((group, _),) = optimizer.plan.groups
    before = {name: look(optimizer)[name][2] for name in optimizer.layers}
    records = seen_of(optimizer, 0, poisoned=("1",))
    del records["2"]
    update({group: group.batch(records)}, torch.tensor(False), before)
    assert all(torch.equal(look(optimizer)[name][2], H) for name, H in before.items())
    update({group: group.batch(records)}, torch.tensor(True), before.keys() - {"0"})
    assert all(torch.equal(look(optimizer)[name][2], H) for name, H in before.items())  # the others were not due
    update({group: group.batch(records)}, torch.tensor(True), before)
    changed = [not torch.equal(look(optimizer)[name][2], H) for name, H in before.items()]
    # An average that is kept is looked at in `observe`, so that the inverse of it is the same.
    assert changed == [factors != "inverse", False, False]


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_state_of_a_layer_is_loaded_as_it_was_saved(kind, factors):
    """Also for layers whose momentum no view can shape like the weight."""
    model, optimizer = layers_after_three_steps(kind, 3, **FACTORS[factors])
    twin = copy.deepcopy(model)
    resumed = KFQN(twin, lr=0.1, refresh=1, **FACTORS[factors])
    resumed.load_state_dict(optimizer.state_dict())
    for name, layer in optimizer.layers.items():
        for key, tensor in layer.tensors().items():
            assert torch.equal(resumed.layers[name].tensors()[key], tensor), key

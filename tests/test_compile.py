"""The update of one layer compiles without a graph break and equals the eager one; a compiled model trains as it is."""

import copy

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from kfqn_core.estimate.statistics import Record, Use
from tests.test_optimizer import METHODS, error, snapshot, train

# The tracer and the functionalised graph, without a C++ compiler: what is proved is that nothing breaks the graph.
# Tried with 2.6.0 and 2.13.0, and nothing between.
pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="in a compiled model of torch 2.6 the hooks see no inputs: use a newer torch"
)
COMPILE = {"fullgraph": True, "backend": "aot_eager", "dynamic": False}


@pytest.mark.parametrize("method", METHODS)
def test_layer_update_is_one_graph(method):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()
    optimizer = KFQN(model, lr=0.1, **METHODS[method])
    train(model, optimizer, [(torch.randn(8, 2, 5, 5).double(), torch.randn(8, 3).double())], 1)
    where = torch.tensor(True)
    for name, x, T in (("0", torch.randn(8, 2, 5, 5).double(), 9), ("3", torch.randn(8, 36).double(), 1)):
        eager = optimizer.layers[name]
        record = Record(eager.view, [Use(x, T)])
        compiled = copy.deepcopy(eager)  # with a group of its own: factors are views of that group's tensors
        s, y, g = (torch.randn(eager.view.groups, eager.view.d_out).double() for _ in range(3))
        before = {key: value.clone() for key, value in eager.tensors().items()}
        for layer, wrap in ((eager, lambda f: f), (compiled, lambda f: torch.compile(f, **COMPILE))):
            if layer.activation.every_step:
                layer.activation.average(record, where)
            wrap(layer.activation.update)(record, where)
            if layer.gradient is not None:
                wrap(layer.gradient.update)(s, y, g, where)
        changed = {key for key, value in eager.tensors().items() if not torch.equal(value, before[key])}
        assert changed >= {"H_a", "B", "e"} & before.keys()
        for key, value in eager.tensors().items():
            assert error(compiled.tensors()[key], value) < 1e-12, key
        assert error(torch.compile(compiled.direction, **COMPILE)(), eager.direction()) < 1e-12


class Straight(nn.Module):
    """A forward that is not a loop, so that a graph may go on behind a layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(2, 3, 3), nn.Linear(27, 5), nn.LayerNorm(5)

    def forward(self, x):
        return self.norm(torch.tanh(self.b(torch.tanh(self.a(x)).flatten(1))))


COMPILED = {name: METHODS[name] for name in ("default", "KBFGS_2020", "next_batch")} | {
    "watched now and then": {"refresh": 3}
}


@pytest.mark.parametrize("order", ["KFQN first", "torch.compile first", "model.compile first"])
@pytest.mark.parametrize("method", COMPILED)
def test_a_compiled_model_trains_as_the_model(method, order):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Straight().double()
    compiled = twin = copy.deepcopy(model)
    data = [(torch.randn(6, 2, 5, 5).double(), torch.randn(6, 5).double()) for _ in range(2)]
    usual = KFQN(model, lr=0.05, **COMPILED[method])
    if order == "model.compile first":
        twin.compile(backend="aot_eager")
    elif order == "torch.compile first":
        compiled = torch.compile(twin, backend="aot_eager")
    optimizer = KFQN(compiled, lr=0.05, **COMPILED[method])
    if order == "KFQN first":
        compiled = torch.compile(twin, backend="aot_eager")
    train(model, usual, data, 5)
    train(compiled, optimizer, data, 5)
    expected, actual = snapshot(model, usual), snapshot(twin, optimizer)
    for (key, value), found in zip(expected.items(), actual.values(), strict=True):
        assert error(found, value) < 1e-12, key


def test_the_hooks_cost_evaluation_no_graph_break():
    """Nor do they between updates. Where they look, the graph ends, and the message says at what."""
    torch._dynamo.reset()
    model = Straight()
    optimizer = KFQN(model, refresh=3)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(6, 2, 5, 5)
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            assert torch.equal(whole(x), model(x))
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Watch\.observe"):
            whole(x)
    model(x).square().mean().backward()
    optimizer.step()
    assert torch.equal(whole(x), model(x))
    optimizer.remove_hooks()


def test_hooks_that_a_compiled_model_has_not_seen_are_missed_before_the_first_step():
    torch._dynamo.reset()
    model, x = Straight(), torch.randn(6, 2, 5, 5)
    compiled = torch.compile(model, backend="eager")
    compiled(x).sum().backward()
    optimizer = KFQN(compiled)
    for _ in range(2):
        compiled(x).sum().backward()
        with pytest.raises(RuntimeError, match=r"must be compiled anew \(torch\.compiler\.reset\(\)\)"):
            optimizer.step()
    torch.compiler.reset()
    compiled(x).sum().backward()
    optimizer.step()


def test_a_compiled_step_is_the_step():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    twin, data = copy.deepcopy(model), [torch.randn(8, 4).double() for _ in range(4)]
    for network, compiled in ((model, False), (twin, True)):
        optimizer = KFQN(network)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for x in data:
            optimizer.zero_grad()
            network(x).square().mean().backward()
            step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert error(p.detach(), q.detach()) < 1e-12

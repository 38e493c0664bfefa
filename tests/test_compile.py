"""The update of one layer compiles without a graph break, and the compiled update equals the eager one."""

import copy

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from kfqn_core.capture import Record, Use
from tests.test_optimizer import METHODS, error

# The tracer and the functionalised graph, without a C++ compiler: what is proved is that nothing breaks the graph.
COMPILE = {"fullgraph": True, "backend": "aot_eager", "dynamic": False}


@pytest.mark.parametrize("method", METHODS)
def test_layer_update_is_one_graph(method):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()
    optimizer = KFQN(model, lr=0.1, **METHODS[method])
    finite = torch.tensor(True)
    for name, x, T in (("0", torch.randn(8, 2, 5, 5).double(), 9), ("3", torch.randn(8, 36).double(), 1)):
        eager = optimizer.layers[name]
        record = Record(eager.view, [[Use(x, T)]])
        eager.activation.start(record.second_moment())
        eager.M.normal_()
        compiled = copy.deepcopy(eager)
        s, y, g = (torch.randn(eager.view.groups, eager.view.d_out).double() for _ in range(3))
        for layer, wrap in ((eager, lambda f: f), (compiled, lambda f: torch.compile(f, **COMPILE))):
            wrap(layer.activation.update)(record, finite)
            if layer.gradient is not None:
                wrap(layer.gradient.update)(s, y, g, finite)
        for key, value in eager.tensors().items():
            if not value.isnan().any():  # "next_batch" has not seen a mini-batch yet
                assert error(compiled.tensors()[key], value) < 1e-12, key
        assert error(torch.compile(compiled.direction, **COMPILE)(), eager.direction()) < 1e-12

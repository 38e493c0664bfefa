"""What is typed first: constructors and their sentences, what it says of itself, compilation, other processes."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kfqn_core import KFQN, describe
from tests.field.programs import H_of, Shadow, difference, error, heard, mlp, newer_torch, randn, silence, train, values

x = randn(16, 5)

WRONG = {
    "parameters": lambda m: KFQN(m.parameters(), lr=0.1),
    "list of parameters": lambda m: KFQN(list(m.parameters())),
    "named parameters": lambda m: KFQN(m.named_parameters(), 0.1),
    "groups": lambda m: KFQN([{"params": list(m.parameters()), "lr": 0.1}]),
    "keyword": lambda m: KFQN(model=m.parameters()),
    "tensor": lambda m: KFQN(m[0].weight),
    "dict": lambda m: KFQN(m.state_dict()),
    "class": lambda m: KFQN(nn.Linear),
    "one tensor as params": lambda m: KFQN(m, params=m[0].weight),
}


@pytest.mark.parametrize("door", WRONG.values(), ids=WRONG)
def test_what_was_passed_and_what_is_needed_in_one_sentence(door):
    with pytest.raises(TypeError, match=r"KFQN\(model|iterable") as caught:
        door(mlp(5, 8, 3))
    assert "\n" not in str(caught.value)


def test_a_framework_that_makes_its_optimizer_from_a_class_and_keywords():
    """skorch, transformers: a class, keywords, and parameters of which some names are matched by a pattern."""
    model = mlp(5, 8, 3)
    make, keywords = KFQN, {"lr": 0.02, "weight_decay": 0.01}
    groups = [{"params": [p for n, p in model.named_parameters() if n.startswith("0")], "lr": 0.001}]
    groups.append({"params": [p for n, p in model.named_parameters() if not n.startswith("0")]})
    with silence():
        optimizer = make(model, params=groups, **keywords)
        train(optimizer, lambda: model(x).square().mean(), 3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.001, 0.02]
    assert all(group["weight_decay"] == 0.01 for group in optimizer.param_groups)


@pytest.mark.parametrize("rate", [torch.tensor(0.02), torch.tensor([0.02]), 0.02, np.float32(0.02)])
def test_a_rate_is_a_number_or_a_tensor(rate):
    model, plain = mlp(5, 8, 3), mlp(5, 8, 3)
    with silence():
        train(KFQN(model, lr=rate), lambda: model(x).square().mean(), 3)
        train(KFQN(plain, lr=0.02), lambda: plain(x).square().mean(), 3)
    assert difference(model, plain) < 1e-6


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.LazyConv1d(4, 2)])
def test_a_layer_that_does_not_know_its_size(make):
    model = nn.Sequential(make(), nn.Flatten(), nn.ReLU())
    with pytest.raises(ValueError, match="forward pass"):
        KFQN(model)
    inputs = randn(4, 6, 5) if isinstance(model[0], nn.LazyConv1d) else randn(4, 5)
    model(inputs)
    with silence():
        optimizer = KFQN(model)
        train(optimizer, lambda: model(inputs).square().mean(), 2)
    assert optimizer.layers["0"].started


def test_a_parametrized_bias_is_no_reason_to_stop():
    from torch.nn.utils import parametrize

    model = mlp(5, 8, 3)
    parametrize.register_parametrization(model[2], "bias", nn.Tanh())
    with heard():
        optimizer = KFQN(model)
    before = values(model)
    with heard() as messages:
        train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    assert not messages
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


# -- what it says of itself


class Custom(nn.Module):
    """A layer that this package has never met, and holds most of the weights."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.eye(24))
        self.small = nn.Linear(24, 2)

    def forward(self, x):
        return self.small(x @ self.kernel)


def test_low_coverage_is_one_warning_with_names_and_the_fallback_is_adam_at_its_own_rate():
    torch.manual_seed(0)
    model, inputs = Custom(), randn(16, 24)
    with heard() as messages:
        optimizer = KFQN(model, lr=0.3)
    assert len(messages) == 1
    assert "Custom" in messages[0]
    assert "%" in messages[0]
    shadow = Shadow(model.kernel)
    with silence():
        for _ in range(5):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            shadow.step()
            optimizer.step()
    assert shadow.error < 1e-6
    with silence():
        KFQN(mlp(5, 8, 3))


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 8), lambda: nn.GRU(4, 8), lambda: nn.Bilinear(4, 4, 8)])
def test_a_recurrent_network_runs_on_the_fallback_as_adam_does(make):
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": make(), "head": nn.Linear(8, 2)})
    inputs = randn(6, 3, 4)
    with heard() as messages:
        optimizer = KFQN(model)
    assert len(messages) == 1
    assert type(model["rnn"]).__name__ in messages[0]
    shadow = Shadow(*model["rnn"].parameters())
    with silence():
        for _ in range(5):
            optimizer.zero_grad()
            h = model["rnn"](inputs, inputs) if isinstance(model["rnn"], nn.Bilinear) else model["rnn"](inputs)[0]
            model["head"](h).square().mean().backward()
            shadow.step()
            optimizer.step()
    assert shadow.error < 1e-5


def test_one_line_of_coverage_in_repr_and_table():
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    first = repr(KFQN(model)).splitlines()[0]
    assert "%" in first
    assert "Adam" in first
    assert str(describe(model)).splitlines()[0] in first
    share = (5 * 8 + 8 + 8 * 3 + 3) / sum(p.numel() for p in model.parameters())
    assert f"{share:.0%}" in first


# -- kinds that are added


def test_a_kind_that_is_registered_has_curvature():
    from kfqn_core.layers import LinearView, register
    from kfqn_core.layers.kinds import SUPPORTED

    class Turned(nn.Module):
        """`h = W x + b`, under other names."""

        def __init__(self):
            super().__init__()
            self.matrix, self.shift = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x @ self.matrix.T + self.shift

    torch.manual_seed(0)
    model, plain = nn.Sequential(Turned()), nn.Sequential(nn.Linear(5, 3))
    with torch.no_grad():
        plain[0].weight.copy_(model[0].matrix)
        plain[0].bias.zero_()
    register(Turned, lambda m: LinearView.of(m.matrix, has_bias=True), weight="matrix", bias="shift")
    try:
        with silence():
            train(KFQN(model), lambda: model(x).square().mean(), 5)
            train(KFQN(plain), lambda: plain(x).square().mean(), 5)
    finally:
        del SUPPORTED[Turned]
    assert difference(model, plain) < 1e-6


@pytest.mark.parametrize("kind", ["transposed convolution", "embedding", "plain"])
def test_more_kinds_of_layers_have_curvature(kind):
    torch.manual_seed(0)
    if kind == "transposed convolution":
        model, inputs = (
            nn.Sequential(nn.ConvTranspose1d(3, 4, 2, stride=2), nn.Flatten(), nn.Linear(40, 2)),
            randn(6, 3, 5),
        )
    elif kind == "embedding":
        model, inputs = nn.Sequential(nn.Embedding(12, 4), nn.Flatten(), nn.Linear(12, 2)), torch.arange(12).view(4, 3)
    else:
        model, inputs = nn.Sequential(*[nn.Linear(5, 5, bias=False) for _ in range(3)]), x
    with silence():
        optimizer = KFQN(model)
        train(optimizer, lambda: model(inputs).square().mean(), 3)
    covered = {p for layer in optimizer.layers.values() for p in (layer.weight, layer.bias) if p is not None}
    assert covered == set(model.parameters())
    assert all(layer.started for layer in optimizer.layers.values())
    if kind == "embedding":
        assert error(H_of(optimizer, "0").diagonal()[:1], torch.tensor([1 / (1 / 12 + 0.03)])) < 1e-3


# -- compilation

COMPILED = textwrap.dedent(
    """
    import sys, warnings, logging, io, copy
    import torch
    from torch import nn
    import torch._dynamo
    from kfqn_core import KFQN
    log = io.StringIO()
    logging.getLogger("torch._dynamo").addHandler(logging.StreamHandler(log))
    torch.manual_seed(0)
    n, order = int(sys.argv[1]), sys.argv[2]
    model = nn.Sequential(*[m for _ in range(n) for m in (nn.Linear(6, 6), nn.Tanh())])
    plain = copy.deepcopy(model)
    compiles = 0
    def backend(graph, inputs):
        global compiles
        compiles += 1
        return graph.forward
    if order == "before":
        compiled = torch.compile(model, backend=backend); optimizer = KFQN(compiled)
    else:
        optimizer = KFQN(model); compiled = torch.compile(model, backend=backend)
    of_plain = KFQN(plain)
    x = torch.randn(16, 6)
    counts = []
    for step in range(30):
        for net, steps in ((compiled, optimizer), (plain, of_plain)):
            steps.zero_grad(); net(x).square().mean().backward(); steps.step()
        counts.append(compiles)
    worst = max((p - q).abs().max().item() for p, q in zip(model.parameters(), plain.parameters()))
    assert worst < 1e-4, worst
    assert "recompile_limit" not in log.getvalue(), log.getvalue()
    from torch._dynamo.utils import counters
    assert counts[-1] == counts[20], counts
    assert counts[-1] <= 3 * (2 * n + 2), counts
    print(counts[-1], counts)
    """
)


@newer_torch
@pytest.mark.parametrize("order", ["before", "after"])
def test_compilation_has_no_storm_of_recompilations(order):
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED, "9", order], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


# -- other processes

APART = textwrap.dedent(
    """
    import os, sys, torch, torch.distributed as dist
    from torch import nn
    from kfqn_core import KFQN
    rank, port, given = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "given"
    dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = KFQN(model, **({"process_group": dist.group.WORLD} if given else {}))
    before = [p.clone() for p in model.parameters()]
    try:
        for step in range(6):
            optimizer.zero_grad()
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + rank))
            model(x).square().mean().backward()
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= 2
            optimizer.step()
    except RuntimeError as error:
        assert not given and "process_group" in str(error), error
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
        print("refused")
    else:
        flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        other = flat.clone()
        dist.all_reduce(other)
        assert torch.equal(other / 2, flat)
        print("equal")
    """
)


@pytest.mark.parametrize("given", ["given", "not"])
def test_processes_that_average_gradients_themselves_stay_equal_or_are_refused(tmp_path, given):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", APART, str(rank), str(tmp_path / "meeting"), given],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [out.strip() for out, _ in outputs] == ["equal" if given == "given" else "refused"] * 2, outputs


@pytest.mark.parametrize("again", [False, True])
def test_coverage_that_is_lost_later_is_said_once(again):
    """Quantisation-aware training, for instance, puts layers of another kind in the place of those there were."""

    class Rounded(nn.Linear):
        def forward(self, x):
            return functional.linear(x, self.weight + (self.weight.round(decimals=1) - self.weight).detach(), self.bias)

    model = mlp(5, 8, 3)
    with silence():
        optimizer = KFQN(model)
        train(optimizer, lambda: model(x).square().mean(), 2)
    with heard() as messages:
        model[0] = Rounded(5, 8)
        train(optimizer, lambda: model(x).square().mean(), 2)
        if again:
            model[2] = Rounded(8, 3)
            train(optimizer, lambda: model(x).square().mean(), 2)
    assert len(messages) == 1
    assert "Rounded" in messages[0]
    assert "fallback_lr" in messages[0]


@newer_torch
def test_a_graph_that_may_not_be_left_says_why_it_is():
    model = mlp(5, 8, 3)
    optimizer = KFQN(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="without fullgraph=True"):
        train(optimizer, lambda: compiled(x).square().mean(), 1)

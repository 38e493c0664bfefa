"""What a step does, counted: against the floor that shapes give, and against what it was when last looked at.

No clock is read. The time of a step is a sum of arithmetic, memory traffic and dispatched operations; each of these
three counts may grow by 5 %. If all stay within that, so does their sum, whatever the weights: a step that became 20 %
slower by doing more turns one of them red. After an intended change, `python -m tests.bench.test_step_counts` writes
`step_counts.json` anew; the commit explains the change.
"""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.costs import described_bytes
from benchmarks.counting import count
from benchmarks.flops import floor, floor_ratio, forward_backward, shapes
from benchmarks.kfac import KFAC, LIKELIHOODS
from benchmarks.methods import METHODS, state_bytes
from benchmarks.problems import TASKS
from benchmarks.timing import stepper
from kfqn_core import KFQN
from kfqn_core.lab import further_problems, problems
from kfqn_core.training import length
from kfqn_core.training.groups import Group

FILE = Path(__file__).with_name("step_counts.json")
GROWTH = 1.05
OURS = [name for name, method in METHODS.items() if method.constructor is KFQN]
CASES = [
    ("P2", "kfqn"),
    ("P2", "kfqn-5"),
    ("P2", "kfqn-dense"),
    ("P2", "kfqn-next-batch"),
    ("P2", "kbfgs-5"),
    ("P3", "kfqn"),
    ("P3", "kfqn-2022"),
]


def freshly_counted(problem, method):
    step, _ = stepper(TASKS[problem], METHODS[method])
    return count(step, METHODS[method].period)


counted = cache(freshly_counted)


def excess(problem, method, counts):
    """By how much counts exceed those that are stored, where they do by more than the tolerance."""
    stored = json.loads(FILE.read_text())[f"{problem} {method}"]
    return {name: now / stored[name] for name, now in asdict(counts).items() if now > GROWTH * stored[name]}


@pytest.mark.parametrize(("problem", "method"), CASES)
def test_a_step_does_no_more_than_it_did(problem, method):
    assert excess(problem, method, counted(problem, method)) == {}


def test_a_slower_step_is_seen(monkeypatch):
    direction = Group.direction
    monkeypatch.setattr(Group, "direction", lambda self, out=None: (direction(self), direction(self, out))[1])
    assert "flops" in excess("P2", "kfqn", freshly_counted("P2", "kfqn"))


def test_every_unit_moves_by_its_normalised_length():
    """The first step of every output unit has the length 3 lr, whatever gradient and width are (chapter 13)."""
    problem = TASKS["P3"].problem
    model = problem.model(0)
    optimizer = KFQN(model, lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    problem.loss(model(problem.x_train[:64]), problem.y_train[:64]).backward()
    optimizer.step()
    for name, layer in optimizer.layers.items():
        weight, bias = (p - before[f"{name}.{part}"] for part, p in (("weight", layer.weight), ("bias", layer.bias)))
        lengths = torch.cat([weight.flatten(1), bias[:, None]], dim=1).norm(dim=1)
        used = lengths[lengths > 1e-6]  # a unit whose ReLU lets nothing through has no gradient and rests
        assert len(used) > 0.3 * len(lengths)
        # A row is divided by its length plus a thousandth of the mean length.
        assert used.median().item() == pytest.approx(length.ROW * 0.01, rel=0.005)
        assert used.max().item() < length.ROW * 0.01 * 1.001


# Without the limited-memory presets: their floor is the product with S and Y, and a memory of 100 pairs for layers of
# width 64 costs more inside than that.
@pytest.mark.parametrize(("key", "name"), [*CASES, ("P2", "muon"), ("P3", "muon"), ("P3", "adam")])
def test_flop_floor_is_what_torch_counts(key, name):
    task, method = TASKS[key], METHODS[name]
    layers = shapes(task.problem.model(0), task.problem.x_train[: task.problem.batch_size])
    sgd = counted(key, "sgd").flops
    # The bias is a column of W here and an addition there: 1/d_i of the products.
    assert sgd == pytest.approx(forward_backward(layers), rel=0.03)
    floor = floor_ratio(name, method.settings, layers)
    assert counted(key, name).flops / sgd == pytest.approx(floor, rel=0.05), "the step multiplies more than it must"


def test_floors_of_the_published_network_are_those_derived_by_hand():
    # Ratios to one forward and backward pass, worked out by hand from the costs of each part.
    layers = shapes(TASKS["P1"].problem.model(0), TASKS["P1"].problem.x_train[:1000])
    assert floor_ratio("kfqn-2021", METHODS["kfqn-2021"].settings, layers) == pytest.approx(2.01, abs=0.005)
    assert floor_ratio("kbfgs", METHODS["kbfgs"].settings, layers) == pytest.approx(2.48, abs=0.005)


def test_looking_rows_up_multiplies_nothing():
    model, tokens = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 5), nn.Linear(5, 4)), torch.randint(20, (8, 3))
    layers = shapes(model, tokens)
    products = 2 * 8 * 3 * torch.tensor([0, 6 * 5, 5 * 4])  # torch counts no product for a bias
    assert count(lambda: model(tokens).sum().backward()).flops == 3 * products.sum()
    assert [layer.product for layer in layers] == [0, 2 * 8 * 3 * 7 * 5, 2 * 8 * 3 * 6 * 4]
    for kind in ("action", "low_rank", "diagonal"):
        settings = {"activation_factor": kind, "activation_decay": None}
        assert floor("kfqn", settings, layers) == floor("kfqn", settings, layers[1:])


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("key", ["P2", "P3"])
def test_described_bytes_are_the_bytes_held(key, name):
    optimizer = METHODS[name].build(TASKS[key].problem.model(0), 0.01, TASKS[key])
    assert state_bytes(optimizer) == described_bytes(TASKS[key], name)


def test_kfac_equals_its_definition_in_float64(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(6, 2, 4, 4).double(), torch.randint(4, (6,))
    labels = torch.randint(4, (6,))
    monkeypatch.setattr(torch, "multinomial", lambda p, n: labels[:, None])
    optimizer = KFAC(model, 0.5, "categorical", damping=0.04, momentum=0.0, kl_clip=1e9)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(lambda: _differentiated(optimizer, model, x, y))
    moved = [old - p.detach() for p, old in zip(model.parameters(), before, strict=True)]

    # One sample, one location at a time, at the point before the step.
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    for layer, parts in ((model[0], moved[:2]), (model[3], moved[2:])):
        A, G = _factors(model, layer, x, labels)
        gradient = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
        D = torch.linalg.solve(G + 0.2 / pi * torch.eye(len(G)).double(), gradient)
        D = torch.linalg.solve(A + 0.2 * pi * torch.eye(len(A)).double(), D.T).T
        actual = torch.cat([parts[0].flatten(1), parts[1][:, None]], 1)
        assert torch.allclose(actual, 0.5 * D, rtol=1e-9, atol=0)  # condition numbers below 1e4


@pytest.mark.parametrize(
    ("likelihood", "output", "loss_fn"),
    [
        ("bernoulli", (3,), lambda z, y: problems.pixel_cross_entropy(z, y)),
        ("categorical", (4,), lambda z, y: nn.functional.cross_entropy(z, y)),
        ("categorical", (2, 4), lambda z, y: further_problems.token_cross_entropy(z, y)),
        ("gaussian", (3,), lambda z, y: further_problems.squared_error(z, y)),
    ],
    ids=["pixels", "classes", "tokens", "squares"],
)
def test_drawn_gradients_have_the_hessian_of_the_loss_as_their_second_moment(likelihood, output, loss_fn):
    """E[g g^T] over labels of the model is the Fisher matrix of its outputs, which is the Hessian of these losses."""
    torch.manual_seed(0)
    z = torch.randn(1, *output, dtype=torch.float64)
    y = torch.zeros(1, *output[:-1], dtype=torch.long) if likelihood == "categorical" else torch.rand_like(z)
    terms = y.numel() if likelihood == "categorical" else 1  # the loss is a mean over labels, the gradient of a sum
    hessian = terms * torch.autograd.functional.hessian(lambda z: loss_fn(z, y), z).reshape(z.numel(), z.numel())
    draws = LIKELIHOODS[likelihood](z.expand(40_000, *output)).flatten(1)
    # Standard errors: entries of g have squares of at most 2, and a deviation of their products of at most 2 sqrt 2.
    assert draws.mean(0).abs().max() < 5 * (2 / 40_000) ** 0.5
    assert (draws.mT @ draws / 40_000 - hessian).abs().max() < 5 * (8 / 40_000) ** 0.5


def test_kfac_says_of_a_loss_that_is_no_likelihood_that_it_is_none():
    with pytest.raises(
        ValueError, match=r"must be one of \['bernoulli', 'categorical', 'gaussian'\], got 'elbo'.*labels"
    ):
        METHODS["kfac"].build(TASKS["P13"].problem.model(0), 0.1, TASKS["P13"])


def _differentiated(optimizer, model, x, y):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def _factors(model, layer, x, labels):
    A = G = 0.0
    for sample, label in zip(x, labels, strict=True):
        seen = {}
        handle = layer.register_forward_hook(lambda module, args, h, seen=seen: seen.update(a=args[0], h=h))
        loss = nn.functional.cross_entropy(model(sample[None]), label[None])
        handle.remove()
        g = torch.autograd.grad(loss, seen["h"])[0][0].reshape(layer.weight.shape[0], -1)
        a = seen["a"] if isinstance(layer, nn.Linear) else nn.functional.unfold(seen["a"], 2, stride=2)
        a = a.detach()[0].reshape(-1, g.shape[1])
        a = torch.cat([a, torch.ones(1, a.shape[1]).double()])
        A = A + a @ a.T / len(x)
        G = G + g @ g.T / g.shape[1] / len(x)
    return A, G


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {f"{problem} {method}": asdict(counted(problem, method)) for problem, method in CASES}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


def test_products_that_torch_does_not_count_are_counted_and_only_products():
    """A column times a row, added to a matrix, is one; the same call entry by entry, which Adam makes, is not."""
    H, column, row = torch.zeros(1, 5, 5), torch.ones(1, 5, 1), torch.ones(1, 1, 5)
    assert count(lambda: H.addcmul_(column, row)).flops == 2 * 5 * 5
    assert count(lambda: H.addcmul_(H, H)).flops == 0
    assert count(lambda: H.baddbmm_(column, row)).flops == 2 * 5 * 5

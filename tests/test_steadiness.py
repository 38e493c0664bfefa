"""How long a step may be by what its average keeps of the gradient: against plain formulas, and what it is for."""

import copy
import math

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from kfqn_core.lab.checks import relative_error
from kfqn_core.training import length, steadiness

F64 = torch.float64
ONE = torch.tensor(1.0, dtype=F64)
TAKEN = torch.tensor(True)


def share_after(gradients, mu=0.9):
    """By its definition, with sums over the past in place of running averages: `[layers]` of `[steps, layers, n]`."""
    weights = torch.tensor([(1 - mu) * mu**t for t in reversed(range(len(gradients)))], dtype=F64)[:, None]
    M = (weights[..., None] * gradients).sum(0).norm(dim=-1)
    mean = (weights * gradients.norm(dim=-1)).sum(0)
    return (M / mean / steadiness.KEPT).clamp_max(1.0)


def found_after(gradients, mu=0.9):
    """The same by what the optimizer does."""
    means = torch.zeros(gradients.shape[1], dtype=F64)
    M = torch.zeros_like(gradients[0])
    for G in gradients:
        steadiness.observe(means, G.norm(dim=-1), 1 - mu, TAKEN)
        M = mu * M + (1 - mu) * G
    return steadiness.shares(steadiness.kept(means, M.norm(dim=-1)))


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_share_is_its_definition(steps):
    generator = torch.Generator().manual_seed(steps)
    gradients = torch.randn(steps, 3, 5, generator=generator, dtype=F64) + torch.tensor([0.0, 0.3, 3.0])[:, None]
    found = found_after(gradients)
    assert relative_error(found, share_after(gradients)) < 1e-14


def test_a_gradient_that_stays_gives_full_steps_and_noise_what_an_average_keeps_of_it():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 1, 20_000, generator=generator, dtype=F64)
    found = found_after(torch.cat([torch.ones_like(noise), noise], dim=1))
    assert found[0] == 1.0
    assert (found_after(torch.ones(1, 3, 5, dtype=F64)) == 1.0).all()  # from the first step on
    # sqrt(0.1 / 1.9) = 0.2294; the sum over 20,000 entries has a deviation of half a percent.
    assert found[1].item() == pytest.approx(math.sqrt(0.1 / 1.9) / steadiness.KEPT, rel=0.02)


def test_the_scale_of_gradients_does_not_matter():
    gradients = torch.randn(10, 4, 6, generator=torch.Generator().manual_seed(1), dtype=F64)
    scales = torch.tensor([1e-12, 1.0, 1e12, 1e3], dtype=F64)[:, None]
    assert relative_error(found_after(scales * gradients), found_after(gradients)) < 1e-13


def test_where_nothing_was_seen_steps_have_their_full_length():
    means, none = torch.zeros(2), torch.zeros(2)

    def shares(M):
        return steadiness.shares(steadiness.kept(means, torch.full((2,), M))).tolist()

    assert shares(0.0) == [1.0, 1.0]
    steadiness.observe(means, none, 0.1, TAKEN)  # gradients of a dead layer
    assert shares(0.0) == [1.0, 1.0]
    assert shares(1.0) == [1.0, 1.0]  # a momentum that came with a checkpoint
    steadiness.observe(means, torch.ones(2), 0.1, TAKEN)  # which comes alive
    assert (means > 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_to_be_seen_changes_nothing(bad):
    means = torch.tensor([0.5, 0.6, 0.7])
    steadiness.observe(means, torch.tensor([1.0, bad, 2.0]), 0.1, torch.tensor([True, False, False]))
    assert means[0].item() == pytest.approx(0.55)
    assert torch.equal(means[1:], torch.tensor([0.6, 0.7]))


class Layers(nn.Module):
    """Two layers of one shape and one of another, with and without bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.c = nn.Linear(4, 3)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def noisy_run(steps, lr=0.03, schedule=lambda t: 1.0, **options):
    """How long the step of every weight's rows was, `[steps]` by layer, in units of `ROW`."""
    torch.manual_seed(0)
    model = Layers().double()
    optimizer = KFQN(model, lr=lr, activation_factor="action", **options)
    generator = torch.Generator().manual_seed(1)
    lengths = {name: [] for name in "abc"}
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr * schedule(t)
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=generator, dtype=F64)
        (model(x) * torch.randn(8, 3, generator=generator, dtype=F64)).sum(1).mean().backward()
        optimizer.step()
        for name in lengths:
            new, old = getattr(model, name), getattr(before, name)
            rows = (new.weight - old.weight).square().sum(1)
            if new.bias is not None:
                rows = rows + (new.bias - old.bias).square()
            lengths[name].append(rows.sqrt().max().item() / length.ROW)
    return model, optimizer, lengths


def shares_of(optimizer):
    return {name: group.steady[i, 1].item() for name, (group, i) in optimizer.plan.places.items()}


def test_steps_led_by_noise_are_shorter_layer_by_layer():
    _, optimizer, lengths = noisy_run(40)
    for name, (group, i) in optimizer.plan.places.items():
        mean, share = group.steady[i].tolist()
        assert share == pytest.approx(group.momentum(0)[i].norm().item() / mean / steadiness.KEPT, rel=1e-12)
        assert share < 0.9
        assert lengths[name][-1] == pytest.approx(0.03 * share, rel=2e-3)  # rows hardly shorter by the floor
    assert all(of_layer[0] == pytest.approx(0.03, rel=2e-3) for of_layer in lengths.values())


def test_a_rate_that_falls_leaves_the_share_as_it_was():
    """Steps fall as the schedule says: full ones from the first step on, and after a stretch of noise as short."""
    _, falling, of_line = noisy_run(40, schedule=lambda t: 1.0 - t / 40)
    assert shares_of(falling) == dict.fromkeys("abc", 1.0)
    for of_layer in of_line.values():
        assert of_layer == pytest.approx([0.03 * (1 - t / 40) for t in range(40)], rel=2e-3)

    _, constant, of_constant = noisy_run(30)
    _, dropped, of_dropped = noisy_run(40, schedule=lambda t: 1.0 if t < 30 else 0.5)
    assert shares_of(dropped) == shares_of(constant)
    for name, share in shares_of(constant).items():
        assert share < 0.9
        assert of_dropped[name][:30] == of_constant[name]
        assert of_dropped[name][30:] == pytest.approx(10 * [0.5 * 0.03 * share], rel=2e-3)


def test_a_rate_that_a_warm_up_leads_to_stands_although_schedules_round():
    """`LinearLR` multiplies its way up and ends beside the rate, of which KFQN was made with the whole."""
    _, warmed, _ = noisy_run(40, schedule=lambda t: min(1.0 - 1e-7, (t + 1) / 8))
    assert all(share < 0.9 for share in shares_of(warmed).values())
    _, warming, _ = noisy_run(40, schedule=lambda t: (t + 1) / 50)
    assert shares_of(warming) == dict.fromkeys("abc", 1.0)


def test_rates_that_differ_by_group_fall_by_group():
    """`b` falls, the others stand: rates as numbers, and as tensors, which are not read on the host."""
    found = []
    for rate in (float, torch.tensor):
        torch.manual_seed(0)
        model = Layers().double()
        groups = [{"params": [*model.a.parameters(), *model.c.parameters()]}, {"params": list(model.b.parameters())}]
        optimizer = KFQN(model, lr=rate(0.03), activation_factor="action", params=groups)
        generator = torch.Generator().manual_seed(1)
        for t in range(20):
            optimizer.param_groups[1]["lr"] = rate(0.03 * (1 - t / 20))
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=generator, dtype=F64)
            (model(x) * torch.randn(8, 3, generator=generator, dtype=F64)).sum(1).mean().backward()
            optimizer.step()
        shares = shares_of(optimizer)
        assert shares["b"] == 1.0
        assert shares["a"] < 0.9
        assert shares["c"] < 0.9
        found.append(shares)
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # a float32 rate


def test_the_largest_rate_counts_also_as_a_tensor_and_is_not_the_users():
    rate = torch.tensor(0.03)
    model = nn.Linear(3, 2)
    optimizer = KFQN(model, lr=rate)
    for value, peak in ((0.03, 0.03), (0.3, 0.3), (0.01, 0.3)):
        rate.fill_(value)
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["peak_lr"].item() == pytest.approx(peak)
        assert rate.item() == pytest.approx(value)


def test_deep_networks_take_shorter_steps():
    def first_step(layers):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(layers)]).double()
        for layer in model:
            nn.init.orthogonal_(layer.weight)
        before = copy.deepcopy(model)
        optimizer = KFQN(model, lr=0.03, activation_factor="action")
        model(torch.randn(8, 4, dtype=F64)).square().sum(1).mean().backward()
        optimizer.step()
        return (model[-1].weight - before[-1].weight).norm(dim=1).max().item()

    assert first_step(2) == pytest.approx(first_step(length.DEEP), rel=0.1)
    assert first_step(4 * length.DEEP) == pytest.approx(first_step(length.DEEP) / 2, rel=0.1)


def test_what_was_kept_is_saved_and_loaded():
    model, optimizer, _ = noisy_run(12)
    twin = copy.deepcopy(model)
    other = KFQN(twin, lr=0.03, activation_factor="action")
    other.load_state_dict(optimizer.state_dict())
    x = torch.randn(8, 4, dtype=F64)
    for m, o in ((model, optimizer), (twin, other)):
        o.zero_grad()
        m(x).square().sum(1).mean().backward()
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_layers_without_a_gradient_keep_what_they_had():
    model, optimizer, _ = noisy_run(5)
    group, i = optimizer.plan.places["c"]
    before = group.steady[i].clone()
    optimizer.zero_grad()
    torch.tanh(model.b(torch.tanh(model.a(torch.randn(8, 4, dtype=F64))))).sum(1).mean().backward()
    optimizer.step()
    assert torch.equal(group.steady[i], before)

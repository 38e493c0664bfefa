"""What a step does to all layers at once, against the plain step of each, in float64."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kfqn_core import KFQN
from kfqn_core.training import length
from kfqn_core.training.finite import all_finite
from kfqn_core.training.groups import plain_step
from kfqn_core.training.sharded import ShardedMomenta
from tests.test_groups import F64, FACTORS, LAYERS, drawn, layers_after_three_steps, look
from tests.test_optimizer import batches, error, snapshot, square_loss, tanh_network, train

LENGTHS = {"raw": length.raw, "normalised": length.normalised, "normalised_rows": length.normalised_rows}


@pytest.fixture(autouse=True)
def full_length(monkeypatch):
    """Steps of full length: what a layer may take of it is held by `test_steadiness`."""
    monkeypatch.setattr("kfqn_core.training.steadiness.KEPT", 1e-9)


def gradients_of(model, optimizer, seed):
    """Set gradients from nowhere, and return them as matrices: of layers that nothing is seen of no factor changes."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = drawn(generator, *p.shape)
    return {
        name: layer.view.to_matrix(layer.weight.grad, None if layer.bias is None else layer.bias.grad).clone()
        for name, layer in optimizer.layers.items()
    }


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.3, "decoupled_weight_decay": True},
                                   {"weight_decay": 0.3, "decoupled_weight_decay": False}],
                         ids=["no decay", "decoupled", "coupled"])  # fmt: skip
@pytest.mark.parametrize("step_length", LENGTHS)
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_of_many_layers_is_the_plain_step_of_each(kind, factors, step_length, decay):
    model, optimizer = layers_after_three_steps(kind, 3, step_length=step_length, **FACTORS[factors], **decay)
    assert len(optimizer.plan.groups) == 1  # else this test tests nothing
    tau, decoupled = decay.get("weight_decay", 0.0), decay.get("decoupled_weight_decay", True)
    for seed in range(2):
        before = look(optimizer)
        gradients = gradients_of(model, optimizer, seed)
        optimizer.step()
        after = look(optimizer)
        for name, (W, M, H_a, H_g) in before.items():
            expected_W, expected_M = plain_step(
                W, M, gradients[name], H_a, H_g, lr=0.1, momentum=0.9, weight_decay=0.0 if decoupled else tau,
                length=LENGTHS[step_length],
            )  # fmt: skip
            if decoupled:
                expected_W = expected_W - 0.1 * tau * W
            assert error(after[name][1], expected_M) < 1e-14
            assert error(after[name][0], expected_W) < 1e-13  # products in another order, and H of condition 1e2
            assert torch.equal(after[name][2], H_a)
            assert H_g is None or torch.equal(after[name][3], H_g)


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_a_parameter_moves_as_its_own_parameter_group_says(kind):
    """Biases with a rate, momentum and decay of their own; a third group in which nothing of a layer is."""
    biases = {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.4, "decoupled_weight_decay": False}

    def params(model):
        return [
            {"params": [layer.weight for layer in model], "weight_decay": 0.2},
            {"params": [layer.bias for layer in model], **biases},
        ]

    model, optimizer = layers_after_three_steps(kind, 3, params, activation_factor="action")
    before, gradients = look(optimizer), gradients_of(model, optimizer, 0)
    optimizer.step()
    for name, (W, M, H_a, _) in before.items():
        same = {"length": length.normalised_rows, "H_a": H_a, "H_g": None}
        _, M_w = plain_step(W, M, gradients[name], lr=0, momentum=0.9, weight_decay=0.0, **same)
        _, M_b = plain_step(W, M, gradients[name], lr=0, momentum=0.5, weight_decay=0.4, **same)
        M = torch.cat([M_w[..., :-1], M_b[..., -1:]], -1)
        of_weights, of_biases = (
            plain_step(W, M, M, lr=lr, momentum=0.0, weight_decay=0.0, **same)[0] for lr in (0.1, 0.02)
        )
        expected = torch.cat([of_weights[..., :-1] - 0.1 * 0.2 * W[..., :-1], of_biases[..., -1:]], -1)
        found_W, found_M, _, _ = look(optimizer)[name]
        assert error(found_M, M) < 1e-14
        assert error(found_W, expected) < 1e-13


@pytest.mark.parametrize("decay", [{"decoupled_weight_decay": True}, {"decoupled_weight_decay": False}])
@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_what_has_no_gradient_stays_and_the_others_move_as_they_would(kind, decay):
    """Of four layers one has none, one has none of its bias, one has none of its weight."""
    model, optimizer = layers_after_three_steps(kind, 4, activation_factor="action", weight_decay=0.3, **decay)
    before, gradients = look(optimizer), gradients_of(model, optimizer, 0)
    without = {"0": {"weight", "bias"}, "1": {"bias"}, "2": {"weight"}, "3": set()}
    for name, missing in without.items():
        for parameter in missing:
            getattr(model[int(name)], parameter).grad = None
    optimizer.step()
    for name, (W, M, H_a, _) in before.items():
        stays = torch.zeros_like(W, dtype=torch.bool)
        stays[..., :-1], stays[..., -1] = "weight" in without[name], "bias" in without[name]
        tau = 0.0 if decay["decoupled_weight_decay"] else 0.3
        # With M as its gradient, and nothing of the decay, M stays as it is.
        G = torch.where(stays, M - tau * W, gradients[name])
        expected_W, expected_M = plain_step(
            W, M, G, H_a, None, lr=0.1, momentum=0.9, weight_decay=tau, length=length.normalised_rows
        )
        expected_W = expected_W - 0.1 * (0.3 - tau) * W
        found_W, found_M, _, _ = look(optimizer)[name]
        assert torch.equal(found_M[stays], M[stays])
        assert torch.equal(found_W[stays], W[stays])
        assert error(found_M, expected_M) < 1e-14
        assert error(found_W[~stays], expected_W[~stays]) < 1e-13 or stays.all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("step_length", LENGTHS)
@pytest.mark.parametrize("factors", ["action", "low rank", "diagonal", "with H_g"])
def test_a_gradient_that_is_not_finite_stops_all_layers(factors, step_length, poison):
    """The step is one: of parameters, momenta and factors nothing changes in a bit, whoever's gradient it is."""
    model, optimizer = layers_after_three_steps(
        "conv", 3, step_length=step_length, weight_decay=0.1, **FACTORS[factors]
    )
    before = {name: value.clone() for name, value in snapshot(model, optimizer).items()}
    gradients_of(model, optimizer, 0)
    model[1].weight.grad[0, 0, 0, 1] = poison
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model, optimizer).items())
    gradients_of(model, optimizer, 1)
    optimizer.step()
    assert not any(torch.equal(p, before[f"p{i}"]) for i, p in enumerate(model.parameters()))


class Calls(TorchDispatchMode):
    """How many operations are dispatched that do something: views do not."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_in_half_precision_is_finite_whatever_its_length(dtype):
    """Of float16 the largest number is 65,504, and the length of this gradient is 2.4 million."""
    p = nn.Parameter(torch.zeros(80, 80, dtype=dtype))
    p.grad = torch.full_like(p, 30_000.0)
    finite, lengths = all_finite([p], None, None, None, torch.device("cpu"))
    assert finite
    assert error(lengths[p], torch.tensor(80 * 30_000.0)) < 2**-8  # what bfloat16 makes of 30,000


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": False}])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv"])
def test_between_updates_fifty_layers_cost_the_calls_of_two(kind, factors, decay):
    counts = []
    for layers in (2, 50):
        model, optimizer = layers_after_three_steps(kind, layers, **FACTORS[factors], **decay)
        gradients_of(model, optimizer, 0)
        with Calls() as calls:
            optimizer.step()
        counts.append(calls.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": False}])
@pytest.mark.parametrize("rate", [torch.tensor(0.05), torch.tensor([0.05]), torch.tensor(0.05, dtype=F64)])
def test_a_rate_may_be_any_tensor_with_one_number(rate, decay):
    """Beside parameters that the fallback moves."""
    models = []
    for lr in (rate, 0.05):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        optimizer = KFQN(model, lr=lr, **decay)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(5, 3)).square().mean().backward()
            optimizer.step()
        models.append(nn.utils.parameters_to_vector(model.parameters()))
    assert error(*models) < 1e-6  # float32 roundings


def test_a_group_of_parameters_none_of_which_has_a_gradient_does_not_decay():
    """Biases with a decay of their own, in a step that reaches the weights alone."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    biases = [layer.bias for layer in (model[0], model[2])]
    groups = [{"params": [model[0].weight, model[2].weight]}, {"params": biases, "weight_decay": 0.5}]
    optimizer = KFQN(model, lr=0.1, params=groups)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(5, 3).double()).square().mean().backward()
    for bias in biases:
        bias.grad = None
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_decays_never_comes_to_the_numbers_that_a_processor_is_slow_with(dtype):
    # A unit behind a bias of -100 passes nothing on: its weights have no gradient, and their momentum decays for ever.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).to(dtype)
    optimizer = KFQN(model, lr=0.0, momentum=0.5)
    x = torch.randn(8, 3, dtype=dtype)
    smallest = torch.finfo(torch.float32).tiny
    for step in range(160):  # 0.5^160 is 7e-49
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step == 0:
            with torch.no_grad():
                model[0].bias[0] = -100.0
        momentum = optimizer.layers["0"].M[0]
        assert not ((momentum != 0) & (momentum.abs() < smallest)).any(), step
    assert (momentum[0] == 0).all()
    assert (momentum[1:] != 0).any()


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone."""
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 has no fully_shard on a CPU; 2.13.0 is tried")
def test_momenta_held_in_parts_are_whole_in_a_move_and_take_no_memory_after_it(process_group, monkeypatch):
    monkeypatch.undo()  # steps of the length that steadiness leaves them, which looks at momenta as well
    whole, parts = tanh_network(), fully_shard(tanh_network())
    steps = [KFQN(model, lr=0.05, weight_decay=0.1) for model in (whole, parts)]
    gather, gathered = ShardedMomenta.gather, []

    def noted(momenta):
        gather(momenta)
        held = [M for group in steps[1].plan.layer_groups for M in group.M if M is not None]
        gathered.extend(StorageWeakRef(M.untyped_storage()) for M in held)

    monkeypatch.setattr(ShardedMomenta, "gather", noted)
    for batch in batches()[:4]:
        for model, optimizer in zip((whole, parts), steps, strict=True):
            train(model, optimizer, [batch], 1, square_loss)
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            assert error(q.full_tensor(), p) < 1e-13  # the same operations, of which sums may come in another order
        held = [M for group in steps[1].plan.layer_groups for M in group.M if M is not None]
        assert max(M.untyped_storage().nbytes() for M in held) == 8  # a zero
        assert gathered
        assert all(storage.expired() for storage in gathered)  # whoever looked at them, too, has let them go

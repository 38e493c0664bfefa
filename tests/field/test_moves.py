"""Which parameter moves, and how: frozen, unfrozen, added, replaced, unused, complex, moved elsewhere."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from kfqn_core import KFQN, describe
from tests.field.programs import (
    H_of,
    Shadow,
    difference,
    error,
    heard,
    inverse_of,
    mlp,
    randn,
    silence,
    still,
    train,
    twins,
    values,
)

# -- frozen and unfrozen


@pytest.mark.parametrize("pairs", [None, "second_pass"])
def test_staged_unfreezing(pairs):
    """One block more of a network in every stage, from the head downwards."""
    model = mlp(5, 8, 8, 3)
    model.requires_grad_(False)
    model[4].requires_grad_(True)
    optimizer, x = KFQN(model, pairs=pairs), randn(16, 5)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    for stage, i in enumerate((4, 2, 0)):
        model[i].requires_grad_(True)
        before = values(model)
        with silence():
            for _ in range(4):
                optimizer.step(closure)
        assert len(still(model, before)) == 4 - 2 * stage
        assert set(optimizer.layers) == {"4", "2", "0"} if stage == 2 else len(optimizer.layers) == stage + 1
        assert all(layer.started for layer in optimizer.layers.values())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_frozen_again_keeps_what_was_learnt_of_the_others():
    model, x = mlp(5, 8, 8, 3), randn(16, 5)
    twin = copy.deepcopy(model)
    optimizer, of_twin = KFQN(model), KFQN(twin)
    with silence():
        for net, steps in ((model, optimizer), (twin, of_twin)):
            train(steps, lambda net=net: net(x).square().mean(), 6)
        model[2].requires_grad_(False)
        before = values(model)
        for _ in range(3):
            for net, steps in ((model, optimizer), (twin, of_twin)):
                steps.zero_grad()
                net(x).square().mean().backward()
                if net is twin:
                    twin[2].weight.grad = twin[2].bias.grad = None
                steps.step()
    assert still(model, before) == {"2.weight", "2.bias"}
    assert difference(model, twin) < 1e-5


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.MultiheadAttention(8, 2), lambda: nn.Linear(8, 8)]
)
@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("step", [0, 2])
def test_one_parameter_of_a_layer_frozen_and_unfrozen(make, which, step):
    torch.manual_seed(0)
    layer = make()
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(8, 2)})
    head = lambda h: model["head"](h.reshape(-1, 8))  # noqa: E731

    def loss():
        if isinstance(layer, nn.Conv2d):
            return head(layer(randn(4, 3, 6, 6))).square().mean()
        x = randn(5, 4, 8)
        return head(layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)).square().mean()

    name = f"in_proj_{which}" if isinstance(layer, nn.MultiheadAttention) else which
    other = name.replace(which, "bias" if which == "weight" else "weight")
    optimizer = KFQN(model)
    with silence():
        train(optimizer, loss, step)
        getattr(layer, name).requires_grad_(False)
        before = values(model)
        train(optimizer, loss, 3)
        assert f"layer.{name}" in still(model, before)
        assert f"layer.{other}" not in still(model, before)
        getattr(layer, name).requires_grad_(True)
        before = values(model)
        train(optimizer, loss, 3)
        assert not still(model, before)


def test_a_frozen_bias_leaves_the_matrix_of_the_layer_without_bias():
    model, x = mlp(5, 8, 3), randn(16, 5)
    optimizer = KFQN(model, activation_factor="action")
    model[0].bias.requires_grad_(False)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 2)
    fresh = mlp(5, 8, 3)
    fresh[0].bias.requires_grad_(False)
    with silence():
        train(KFQN(fresh, activation_factor="action"), lambda: fresh(x).square().mean(), 2)
    assert optimizer.layers["0"].M.shape[-1] == 5
    assert optimizer.layers["0"].started
    assert error(H_of(optimizer, "0"), inverse_of(x, bias=False)) < 1e-3


class Scaled(nn.Linear):
    """A layer with parameters of its own beside weight and bias."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale, self.log_temperature = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(3))


def test_further_parameters_of_a_subclass_move_as_adams():
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc": Scaled(5, 3), "out": nn.Linear(3, 2)})
    optimizer, x, before = KFQN(model), randn(16, 5), values(model)
    fc = model["fc"]
    shadow = Shadow(fc.scale, fc.log_temperature)
    with silence():
        for _ in range(5):
            optimizer.zero_grad()
            h = fc.scale * fc(x) * fc.log_temperature.exp()
            model["out"](h).square().mean().backward()
            shadow.step()
            optimizer.step()
    assert not still(model, before)
    assert shadow.error < 1e-6
    assert {row.name for row in describe(model).rows} >= {"fc.scale", "fc.log_temperature"}


class Gate(nn.Conv1d):
    """Another: a convolution whose own parameter is used inside a wrapper's forward."""

    def __init__(self):
        super().__init__(2, 4, 3)
        self.gate = nn.Parameter(torch.zeros(4, 1))


def test_further_parameters_of_a_convolution_move():
    torch.manual_seed(0)
    model = nn.Sequential(Gate(), nn.Flatten(), nn.Linear(16, 2))
    x, before = randn(6, 2, 6), values(model)
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model[2](model[1](model[0](x) * model[0].gate.sigmoid())).square().mean(), 3)
    assert not still(model, before)


APPLIED_LATER = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "old weight_norm": lambda layer: torch.nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "a mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "of the bias": lambda layer: parametrize.register_parametrization(layer, "bias", Softplus()),
}


class Softplus(nn.Module):
    def forward(self, x):
        return functional.softplus(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("apply", APPLIED_LATER.values(), ids=APPLIED_LATER)
@pytest.mark.parametrize("start", [0, 3])
def test_what_is_reparametrized_later_still_trains(apply, start):
    model, x = mlp(5, 8, 8, 3), randn(16, 5)
    optimizer = KFQN(model)
    with heard() as messages:
        train(optimizer, lambda: (model(x) - 1).square().mean(), start)
        apply(model[2])
        before, computed = values(model), model[2].weight.detach().clone()
        losses = train(optimizer, lambda: (model(x) - 1).square().mean(), 20)
    assert not still(model, before)
    assert error(model[2].weight, computed) > 1e-3
    assert losses[-1] < losses[0]
    assert len(messages) <= 1
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))


class LoRA(nn.Module):
    """An adapter around a frozen layer."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("start", [0, 4])
def test_adapters_added_later_train_with_curvature(start):
    model, x = mlp(12, 16, 16, 3), randn(16, 12)
    optimizer = KFQN(model)
    with heard() as messages:
        train(optimizer, lambda: (model(x) - 1).square().mean(), start)
        for i in (0, 2):
            model[i] = LoRA(model[i])
        before = values(model)
        losses = train(optimizer, lambda: (model(x) - 1).square().mean(), 15)
    assert still(model, before) == {f"{i}.base.{p}" for i in (0, 2) for p in ("weight", "bias")}
    assert {"0.down", "0.up", "2.down", "2.up", "4"} == set(optimizer.layers)
    assert losses[-1] < losses[0]
    assert not messages


def test_a_head_replaced_later_trains_and_the_old_one_is_let_go():
    model, x = mlp(5, 8, 3), randn(16, 5)
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 3)
        old, model[2] = model[2], nn.Linear(8, 7)
        before, of_old = values(model), values(old)
        train(optimizer, lambda: (model(x) - 1).square().mean(), 4)
    assert not still(model, before)
    assert len(still(old, of_old)) == 2
    assert error(H_of(optimizer, "0"), inverse_of(x)) < 1
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))


# -- unused in a step


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x, head):
        return getattr(self, head)(torch.tanh(self.body(x) + self.bias))


@pytest.mark.parametrize("pairs", [None, "next_batch", "second_pass"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_heads_that_take_turns(pairs, set_to_none, first):
    model, x = Heads(), randn(16, 5)
    optimizer = KFQN(model, pairs=pairs, lr=0.01)
    with silence():
        for step in range(12):
            head = ("one", "two")[(step + first) % 2]
            before = values(model)

            def closure(head=head):
                optimizer.zero_grad(set_to_none=set_to_none)
                loss = (model(x, head) - 1).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            resting = {"one": {"two.weight", "two.bias"}, "two": {"one.weight", "one.bias"}}[head]
            if set_to_none:
                assert still(model, before) == resting
            else:
                assert still(model, before) <= resting  # momentum decays, as Adam's does
    assert all(layer.started for layer in optimizer.layers.values())


def test_a_gradient_of_zeros_lets_momentum_decay():
    model, x = Heads(), randn(16, 5)
    optimizer = KFQN(model, step_length="raw", lr=0.1)
    with silence():
        train(optimizer, lambda: model(x, "one").square().mean() + model(x, "two").square().mean(), 3)
        M = optimizer.layers["two"].M.clone()
        optimizer.zero_grad(set_to_none=False)
        model(x, "one").square().mean().backward()
        optimizer.step()
    assert error(optimizer.layers["two"].M, 0.9 * M) < 1e-5


@pytest.mark.parametrize("step", [0, 1, 27])
def test_a_step_in_which_only_others_have_gradients_or_none_has(step):
    model, x = Heads(), randn(16, 5)
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model(x, "one").square().mean(), step)
        before = values(model)
        optimizer.zero_grad()
        optimizer.step()  # nothing has a gradient
        assert len(still(model, before)) == 7
        optimizer.zero_grad()
        model.bias.grad = torch.ones(8)
        optimizer.step()
        assert still(model, before) == set(before) - {"bias"}
        losses = train(optimizer, lambda: (model(x, "two") - 1).square().mean(), 20)
    assert losses[-1] < losses[0]
    assert optimizer.skipped_steps == 0


def test_stepping_twice_on_one_gradient():
    model, twin, x = mlp(5, 8, 3), mlp(5, 8, 3), randn(16, 5)
    for net in (model, twin):
        optimizer = KFQN(net)
        with silence():
            for _ in range(30):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
                before = values(net)
                optimizer.step()
                assert not still(net, before)
    assert difference(model, twin) == 0


# -- complex and sparse


class Spectral(nn.Module):
    """A Fourier layer in two dimensions, and a phase."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.drop = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)
        self.modes = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.cfloat) / 4)
        self.phase = nn.Parameter(torch.ones((), dtype=torch.cfloat))

    def forward(self, x):
        z = torch.fft.rfft2(self.lift(x))[..., :3, :3]
        z = torch.einsum("nixy,ioxy->noxy", z, self.modes) * self.phase
        return self.drop(torch.fft.irfft2(z, s=x.shape[-2:]))


def test_fourier_modes_move_as_with_adam():
    model, x = Spectral(), randn(6, 1, 8, 8)
    with heard():
        optimizer = KFQN(model)
    shadow, before = Shadow(model.modes, model.phase), values(model)
    for _ in range(6):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        shadow.step()
        with silence():
            optimizer.step()
    assert shadow.error < 1e-5
    assert not still(model, before)


@pytest.mark.parametrize("step_length", ["raw", "normalised"])
def test_complex_layers_beside_real_ones(step_length):
    torch.manual_seed(0)
    model = nn.ModuleDict({"z": nn.Conv1d(2, 4, 3, dtype=torch.cfloat), "scale": nn.Linear(16, 3)})
    optimizer, x, before = KFQN(model, step_length=step_length), randn(6, 2, 6), values(model)
    run = lambda: (model["scale"](model["z"](x.cfloat()).abs().flatten(1)) - 1).square().mean()  # noqa: E731
    with silence():
        losses = train(optimizer, run, 15)
    assert not still(model, before)
    assert losses[-1] < losses[0]
    state = optimizer.state_dict()
    with silence():
        optimizer.load_state_dict(copy.deepcopy(state))


SPARSE = {
    "table": lambda: nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 3)),
    "bag": lambda: nn.Sequential(nn.EmbeddingBag(10, 8, sparse=True), nn.Linear(8, 3)),
    "after others": lambda: nn.Sequential(nn.Embedding(10, 8), Table(), nn.Linear(8, 3)),
}


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))

    def forward(self, x):
        return x + functional.embedding(torch.zeros(len(x), dtype=torch.long), self.weight, sparse=True).view(
            -1, *[1] * (x.dim() - 2), 8
        )


@pytest.mark.parametrize("make", SPARSE.values(), ids=SPARSE)
def test_a_sparse_gradient_is_one_sentence_before_anything_moves(make):
    torch.manual_seed(0)
    model = make()
    before, x = values(model), torch.arange(12).view(4, 3) % 10
    with heard():
        optimizer = KFQN(model)
    model(x).square().mean().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optimizer.step()
    assert len(still(model, before)) == len(before)


def test_a_sparse_embedding_given_to_another_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 3))
    rest = [p for module in model[1:] for p in module.parameters()]
    with heard():
        optimizer = KFQN(model, params=rest)
    sparse, before = torch.optim.SparseAdam(list(model[0].parameters())), values(model)
    x = torch.arange(8)
    for _ in range(3):
        optimizer.zero_grad()
        sparse.zero_grad()
        model(x).square().mean().backward()
        with silence():
            optimizer.step()
        sparse.step()
    assert not still(model, before)


# -- moved, cast


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_a_model_that_is_cast_goes_on(dtype, start, pairs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3), nn.PReLU())
    optimizer, x = KFQN(model, pairs=pairs), randn(8, 2, 6)
    with heard() as messages:
        train(optimizer, lambda: (model(x) - 1).square().mean(), start)
        model.to(dtype)
        before = values(model)
        losses = train(optimizer, lambda: (model(x.to(dtype)).float() - 1).square().mean(), 20)
    assert not messages
    assert not still(model, before)
    assert losses[-1] < losses[0]
    expected = torch.promote_types(dtype, torch.float32)
    assert all(layer.M.dtype == layer.activation.H.dtype == expected for layer in optimizer.layers.values())
    assert optimizer.skipped_steps == 0


def test_a_model_cast_to_double_goes_on_as_one_that_was_double():
    one, two = twins(mlp(5, 8, 3))
    one.double()
    of_one, of_two, x = KFQN(one), KFQN(two), randn(16, 5).double()
    two.double()
    with silence():
        train(of_one, lambda: one(x).square().mean(), 10)
        train(of_two, lambda: two(x).square().mean(), 10)
    assert difference(one, two) < 1e-9


def test_a_state_on_another_device_follows_the_parameters_when_loaded():
    """A trainer's order: the optimizer is made, the model goes to its device, then the state is loaded."""
    model, x = mlp(5, 8, 3), randn(16, 5)
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 3)
        state = copy.deepcopy(optimizer.state_dict())
        twin = copy.deepcopy(model)
        of_twin = KFQN(twin)
        twin.double()
        of_twin.load_state_dict(state)
        train(of_twin, lambda: twin(x.double()).square().mean(), 3)
        train(optimizer, lambda: model(x).square().mean(), 3)
    assert difference(model, twin) < 1e-4
    assert all(layer.M.dtype == torch.float64 for layer in of_twin.layers.values())


def test_only_a_part_is_cast():
    model, x = mlp(5, 8, 8, 3), randn(16, 5)
    optimizer = KFQN(model)
    cast = lambda: model[4].double()(model[3](model[2](model[1](model[0](x))).double()))  # noqa: E731
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 2)
        losses = train(optimizer, lambda: (cast() - 1).square().mean(), 10)
    assert losses[-1] < losses[0]
    assert optimizer.layers["4"].M.dtype == torch.float64
    assert optimizer.layers["2"].M.dtype == torch.float32


def test_to_empty_and_back():
    """A model made on "meta", given memory and values after its optimizer was made."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    with silence():
        optimizer = KFQN(model)
        model.to_empty(device="cpu")
        model.load_state_dict(mlp(5, 8, 3).state_dict())
        x, twin = randn(16, 5), mlp(5, 8, 3)
        train(optimizer, lambda: model(x).square().mean(), 5)
        train(KFQN(twin), lambda: twin(x).square().mean(), 5)
    assert difference(model, twin) < 0.3
    assert all(p.isfinite().all() for p in model.parameters())


# -- several backwards, gradients by hand


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_two_backwards_through_one_graph_with_zero_grad_between(own, pairs):
    model, plain = mlp(5, 8, 2), mlp(5, 8, 2)
    x, parameters = randn(16, 5), list(model.parameters())
    optimizer, of_plain = KFQN(model, pairs=pairs), KFQN(plain, pairs=pairs)
    clear = optimizer.zero_grad if own else model.zero_grad
    for _ in range(8):
        h, gradients = model(x), []
        for loss in (h[:, 0].square().mean(), (h[:, 1] - 1).square().mean()):
            clear()
            loss.backward(retain_graph=True)
            gradients.append([p.grad.clone() for p in parameters])
        for p, a, b in zip(parameters, *gradients, strict=True):
            p.grad = a + b
        with silence():
            optimizer.step()
        of_plain.zero_grad()
        h = plain(x)
        (h[:, 0].square().mean() + (h[:, 1] - 1).square().mean()).backward()
        of_plain.step()
    if pairs is None:
        assert difference(model, plain) < 1e-4
    assert all(layer.started for layer in optimizer.layers.values())


def test_gradients_in_place_after_projection():
    """PCGrad as it is written most often: the last backward's gradients are written over in place."""
    model, x = mlp(5, 8, 8, 2), randn(16, 5)
    optimizer, before = KFQN(model, activation_factor="action", lr=0.0), values(model)
    h = model(x)
    grads = []
    for i in range(2):
        optimizer.zero_grad()
        h[:, i].square().mean().backward(retain_graph=True)
        grads.append([p.grad.clone() for p in model.parameters()])
    for p, a, b in zip(model.parameters(), *grads, strict=True):
        p.grad.copy_(a - (a * b).sum() / b.square().sum() * b)
    with silence():
        optimizer.step()
    assert error(H_of(optimizer, "0"), inverse_of(x)) < 1e-4
    assert len(still(model, before)) == 6


@pytest.mark.parametrize("detach", [True, False])
def test_adversaries_without_detach(detach):
    """The discriminator learns from images that the generator's graph still hangs on."""
    runs = []
    for kind in (KFQN, torch.optim.Adam):
        G, D = mlp(3, 8, 4), mlp(4, 8, 1, seed=1)
        optimizers = [kind(m) if kind is KFQN else kind(m.parameters()) for m in (G, D)]
        before, x, z = {**values(G)}, randn(16, 4), randn(16, 3, seed=5)
        of_D = values(D)
        for _ in range(5):
            fake = G(z)
            optimizers[1].zero_grad()
            on_fake = D(fake.detach() if detach else fake)
            (functional.softplus(-D(x)).mean() + functional.softplus(on_fake).mean()).backward(retain_graph=True)
            with silence():
                optimizers[1].step()
            optimizers[0].zero_grad()
            functional.softplus(-D(fake)).mean().backward()
            with silence():
                optimizers[0].step()
        assert not still(G, before)
        assert not still(D, of_D)
        runs.append(optimizers)
    of_G, of_D = runs[0]
    assert all(layer.started for o in (of_G, of_D) for layer in o.layers.values())


@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_gradients_from_autograd_grad_assigned_by_hand(pairs):
    model, plain, x = mlp(5, 8, 3), mlp(5, 8, 3), randn(16, 5)
    optimizer, of_plain = KFQN(model, pairs=pairs), KFQN(plain, pairs=pairs)
    with silence():
        for _ in range(6):
            loss = (model(x) - 1).square().mean()
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                p.grad = g
            optimizer.step()
        train(of_plain, lambda: (plain(x) - 1).square().mean(), 6)
    assert difference(model, plain) < 1e-5


def test_gradients_averaged_over_replicas_by_hand():
    """Parameter server: copies of the model compute, the original only steps and looks now and then."""
    model, x, before = mlp(5, 8, 3), randn(16, 5), None
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 2)
        for _ in range(4):
            copies = [copy.deepcopy(model) for _ in range(2)]
            for net, part in zip(copies, x.split(8), strict=True):
                net.zero_grad()
                net(part).square().mean().backward()
            optimizer.zero_grad()
            for p, *own in zip(model.parameters(), *(net.parameters() for net in copies), strict=True):
                p.grad = sum(q.grad for q in own) / 2
            before = values(model)
            optimizer.step()
            assert not still(model, before)


# -- parameter groups


def test_layers_in_groups_have_rates_of_their_own():
    model, plain, x = mlp(5, 8, 3), mlp(5, 8, 3), randn(16, 5)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.05}]
    optimizer = KFQN(model, params=groups)
    before = values(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 1)
        assert still(model, before) == {"0.weight", "0.bias"}
        of_plain = KFQN(plain, lr=0.05)
        train(of_plain, lambda: plain(x).square().mean(), 1)
    assert error(model[2].weight, plain[2].weight) < 1e-6
    optimizer.param_groups[0]["lr"] = 0.05
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 1)
    assert not still(model, before)


def test_weight_and_bias_of_one_layer_in_different_groups():
    """The usual recipe: no decay of biases and norms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() == 1]
    plain, x, began = copy.deepcopy(model), randn(16, 5), list(values(model).values())
    optimizer = KFQN(model, 0.01, [{"params": decayed, "weight_decay": 0.5}, {"params": free}])
    with silence():
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        train(KFQN(plain, 0.01), lambda: plain(x).square().mean(), 1)
    for p, q, w in zip(model.parameters(), plain.parameters(), began, strict=True):
        if w.dim() > 1:
            assert error(p - q, -0.01 * 0.5 * w) < 1e-3
        else:
            assert error(p, q) < 1e-6


@pytest.mark.parametrize("door", ["at construction", "later"])
def test_a_group_without_curvature_moves_by_adam_at_its_own_rate(door):
    model, x = mlp(5, 8, 8, 3), randn(16, 5)
    plain_group = {"params": list(model[2].parameters()), "curvature": False, "lr": 0.007, "betas": (0.8, 0.9)}
    rest = [p for i in (0, 4) for p in model[i].parameters()]
    if door == "later":
        optimizer = KFQN(model, params=rest)
        optimizer.add_param_group(plain_group)
    else:
        optimizer = KFQN(model, params=[{"params": rest}, plain_group])
    shadow = Shadow(*model[2].parameters(), lr=0.007, betas=(0.8, 0.9))
    with silence():
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            shadow.step()
            optimizer.step()
    assert set(optimizer.layers) == {"0", "4"}
    assert shadow.error < 1e-6


def test_an_added_group_of_parameters_outside_of_the_model():
    """A loss with weights of its own (uncertainty weighting, ArcFace)."""
    model, x = mlp(5, 8, 3), randn(16, 5)
    center = nn.Parameter(torch.zeros(3))
    optimizer = KFQN(model)
    optimizer.add_param_group({"params": [center], "lr": 0.01})
    before = values(model)
    with silence():
        train(optimizer, lambda: (model(x) - center - 1).square().mean(), 5)
    assert not still(model, before)
    assert center.abs().min() > 0
    assert center.grad is not None


def test_named_parameters_and_decay_of_the_fallback():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = KFQN(model, 0.03, model.named_parameters(), weight_decay=0.1, fallback_lr=0.002)
    copies = [nn.Parameter(p.detach().clone()) for p in model[1].parameters()]
    adamw, x = torch.optim.AdamW(copies, lr=0.002, betas=(0.9, 0.99), weight_decay=0.1), randn(16, 5)
    with silence():
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            for p, q in zip(model[1].parameters(), copies, strict=True):
                q.grad = p.grad.clone()
            adamw.step()
            optimizer.step()
    assert max(map(error, model[1].parameters(), copies)) < 1e-5


def test_a_schedule_moves_both_rates():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = KFQN(model, lr=torch.tensor(0.04))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    with silence():
        for step in range(4):
            before = values(model)
            optimizer.zero_grad()
            model(randn(16, 5)).square().mean().backward()
            optimizer.step()
            schedule.step()
            assert len(still(model, before)) == (0 if step < 2 else 6)

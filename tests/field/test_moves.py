"""Which parameter moves, and how: complex and sparse ones, after several backwards, from gradients by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfqn_core import KFQN
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
    values,
)

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


@pytest.mark.parametrize("first", ["hooks", "optimizers"])
def test_layers_that_step_while_backward_is_on_its_way(first):
    """An optimizer for each layer, which steps and clears when the last gradient of the layer is there."""
    model, x, optimizers, missing = mlp(5, 8, 8, 3), randn(16, 5), {}, {}
    twin = copy.deepcopy(model)

    def hook(i):
        def step(p):
            missing[i] = missing.get(i, 2) - 1
            if not missing[i]:
                optimizers[i].step()
                optimizers[i].zero_grad()
                del missing[i]

        return step

    def register():
        for i in (0, 2, 4):
            for p in model[i].parameters():
                p.register_post_accumulate_grad_hook(hook(i))

    if first == "hooks":
        register()
    optimizers.update((i, KFQN(model, params=list(model[i].parameters()))) for i in (0, 2, 4))
    if first == "optimizers":
        register()
    after = {i: KFQN(twin, params=list(twin[i].parameters())) for i in (0, 2, 4)}
    with silence():
        for _ in range(6):
            (model(x) - 1).square().mean().backward()
            (twin(x) - 1).square().mean().backward()
            for optimizer in after.values():
                optimizer.step()
                optimizer.zero_grad()
    assert difference(model, twin) == 0.0

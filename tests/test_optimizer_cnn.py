"""KFQN on convolutions, against an independent reference that forms every patch; and layers used in unusual ways."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfqn_core import KFQN, presets
from tests.reference_kfqn_cnn import ReferenceKFQN
from tests.test_optimizer import batches, closure_for, error, snapshot, square_loss, tanh_network, train

TOLERANCE = 1e-9  # ten steps of float64 rounding, amplified by the conditioning of H
F64 = torch.float64

NETWORKS = {
    "strided": lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 3, 2)],
    "dilated": lambda: [nn.Conv2d(2, 3, 3, dilation=2, bias=False), nn.Conv2d(3, 3, (1, 2), padding=(0, 1))],
    "grouped": lambda: [nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False)],
}


def image_network(name, seed=0):
    torch.manual_seed(seed)
    layers = [module for conv in NETWORKS[name]() for module in (conv, nn.Tanh())]
    body = nn.Sequential(*layers, nn.Flatten()).to(F64)
    features = body(torch.zeros(1, 2, 7, 7, dtype=F64)).shape[1]
    return nn.Sequential(*body, nn.Linear(features, 3, dtype=F64))


def images(count=3, samples=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(samples, 2, 7, 7, generator=generator, dtype=F64),
            torch.randint(3, (samples,), generator=generator),
        )
        for _ in range(count)
    ]


def reference_layers(optimizer, model):
    layers = []
    for name, layer in optimizer.layers.items():
        module = model.get_submodule(name)
        entry = {"W": layer.view.to_matrix(module.weight, module.bias).detach().numpy().copy()}
        entry["bias"] = module.bias is not None
        if isinstance(module, nn.Conv2d):
            entry["kernel"], entry["stride"] = module.kernel_size, module.stride
            entry["padding"], entry["dilation"] = module.padding, module.dilation
        layers.append(entry)
    return layers


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("preset", ["KFQN_CNN_2021", "KFQN_2022"])
def test_convolutional_presets_are_the_reconstructed_method(preset, network):
    """Weights, H_a, H_g and averaged pairs of every group after each of ten steps."""
    data, model = images(), image_network(network)
    optimizer = KFQN(model, lr=0.1, **getattr(presets, preset))
    loss_fn = nn.CrossEntropyLoss()
    reference = ReferenceKFQN(
        reference_layers(optimizer, model), loss_fn, 0.1, damping=0.3, locations=preset == "KFQN_2022"
    )
    for k in range(10):
        x, y = data[k % 3]
        loss = optimizer.step(closure_for(model, optimizer, loss_fn, x, y))
        assert loss.item() == pytest.approx(reference.step(x, y), rel=TOLERANCE)
        for layer, expected in zip(optimizer.layers.values(), reference.layers, strict=True):
            assert error(layer.view.to_matrix(layer.weight, layer.bias).detach(), expected["W"]) < TOLERANCE
            assert error(layer.activation.H, expected["H_a"]) < TOLERANCE
            assert error(layer.gradient.inverse.dense(), expected["H_g"]) < TOLERANCE
            assert error(layer.gradient.s_mean, expected["s"]) < TOLERANCE
            assert error(layer.gradient.y_mean, expected["y"]) < TOLERANCE


@pytest.mark.parametrize("options", [{}, presets.KBFGS_2020, presets.KFQN_2022, {"pairs": "next_batch"}], ids=str)
def test_two_half_batches_are_the_whole(options):
    """Accumulated micro-batches, each loss scaled by its share, give the step of the full batch."""
    (x, y), *_ = images(count=1, samples=8)
    whole, halves = image_network("grouped"), image_network("grouped")
    one, two = KFQN(whole, lr=0.05, **options), KFQN(halves, lr=0.05, **options)
    for _ in range(3):
        for model, optimizer, parts in (
            (whole, one, [(x, y)]),
            (halves, two, [(x[:4], y[:4]), (x[4:], y[4:])]),
        ):

            def evaluate(model=model, optimizer=optimizer, parts=parts):
                optimizer.zero_grad()
                total = 0.0
                for a, b in parts:
                    loss = nn.functional.cross_entropy(model(a), b) / len(parts)
                    loss.backward()
                    total += loss.detach()
                return total

            optimizer.step(evaluate)
    expected, actual = snapshot(whole, one), snapshot(halves, two)
    for key, value in expected.items():
        if not value.isnan().any():
            assert error(actual[key], value) < 1e-10, key


@pytest.mark.parametrize("options", [{}, presets.KBFGS_2020, presets.KFQN_2022, {"pairs": "next_batch"}], ids=str)
@pytest.mark.parametrize("forwards", [1, 2])
def test_zero_grad_may_stand_between_forward_and_backward(options, forwards):
    """As in `loss = ...; optimizer.zero_grad(); loss.backward()`; and several forwards may share one backward."""
    (x, y), *_ = images(count=1, samples=8)
    one, two = image_network("grouped"), image_network("grouped")
    usual, late = KFQN(one, lr=0.05, **options), KFQN(two, lr=0.05, **options)

    def closure():
        parts = zip(x.chunk(forwards), y.chunk(forwards), strict=True)
        loss = sum(nn.functional.cross_entropy(two(a), b) for a, b in parts) / forwards
        late.zero_grad()
        loss.backward()
        return loss

    for _ in range(3):
        train(one, usual, [(x, y)], 1, nn.functional.cross_entropy)
        late.step(closure)
    expected, actual = snapshot(one, usual), snapshot(two, late)
    assert all(error(actual[key], value) < 1e-10 for key, value in expected.items() if not value.isnan().any())


def test_two_losses_may_go_backward_one_after_the_other():
    (x, y), *_ = images(count=1, samples=8)
    one, two = image_network("grouped"), image_network("grouped")
    usual, split = KFQN(one, lr=0.05, **presets.KFQN_2022), KFQN(two, lr=0.05, **presets.KFQN_2022)

    def closure():
        split.zero_grad()
        loss = nn.functional.cross_entropy(two(x), y)
        (0.3 * loss).backward(retain_graph=True)
        (0.7 * loss).backward()
        return loss

    for _ in range(3):
        train(one, usual, [(x, y)], 1, nn.functional.cross_entropy)
        split.step(closure)
    expected, actual = snapshot(one, usual), snapshot(two, split)
    assert all(error(actual[key], value) < 1e-10 for key, value in expected.items())


class Shared(nn.Module):
    """The same layer twice in one forward: as if its two inputs were a sequence."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6, dtype=F64), nn.Linear(6, 5, dtype=F64)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x[:, 0])) + torch.tanh(self.layer(x[:, 1])))


class Stacked(Shared):
    """The same function with the two inputs as a sequence."""

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)).sum(1))


@pytest.mark.parametrize("options", [{}, presets.KBFGS_2020, presets.KFQN_2022, {"pairs": "next_batch"}], ids=str)
def test_a_layer_used_twice_sees_what_it_sees_of_a_sequence(options):
    torch.manual_seed(0)
    twice = Shared()
    once = Stacked()
    once.load_state_dict(twice.state_dict())
    x, y = torch.randn(8, 2, 6, dtype=F64), torch.randn(8, 5, dtype=F64)
    optimizers = [KFQN(model, lr=0.05, **options) for model in (twice, once)]
    for model, optimizer in zip((twice, once), optimizers, strict=True):
        train(model, optimizer, [(x, y)], 4)
    expected, actual = snapshot(once, optimizers[1]), snapshot(twice, optimizers[0])
    for key, value in expected.items():
        assert error(actual[key], value) < 1e-10, key


class Checkpointed(nn.Module):
    def __init__(self, body, reentrant):
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x):
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"pairs": "next_batch"}], ids=str)
def test_activation_checkpointing_changes_nothing(options, reentrant):
    data = batches()
    plain, saving = tanh_network(), Checkpointed(tanh_network(), reentrant)
    one, two = KFQN(plain, lr=0.05, **options), KFQN(saving, lr=0.05, **options)
    train(plain, one, data, 4)
    train(saving, two, data, 4)
    for name, layer in one.layers.items():
        twin = two.layers[f"body.{name}"]
        for key, value in layer.tensors().items():
            assert torch.equal(twin.tensors()[key], value), key


def test_pairs_of_consecutive_mini_batches():
    """s and y are the differences of the means of this mini-batch and the last one, each at its own weights."""
    data, model = batches(), tanh_network()
    optimizer = KFQN(model, lr=0.01, pairs="next_batch", pair_momentum=0.0)
    means = []
    for x, y in data[:3]:
        twin, outputs = copy.deepcopy(model), []
        twin[0].register_forward_hook(lambda module, args, h, outputs=outputs: (h.retain_grad(), outputs.append(h))[1])
        square_loss(twin(x), y).backward()
        means.append((outputs[0].mean(0), outputs[0].grad.sum(0)))
        train(model, optimizer, [(x, y)], 1)
    factor = optimizer.layers["0"].gradient
    assert error(factor.s_mean[0], (means[2][0] - means[1][0]).detach()) < 1e-12
    assert error(factor.y_mean[0], means[2][1] - means[1][1]) < 1e-12


def test_images_of_changing_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    optimizer = KFQN(model, lr=0.05, **presets.KFQN_2022)
    dampings = []
    for size, samples in ((5, 8), (9, 4), (5, 2)):
        x, y = torch.randn(samples, 2, size, size), torch.randint(2, (samples,))
        train(model, optimizer, [(x, y)], 1, nn.CrossEntropyLoss())
        dampings.append(optimizer.layers["0"].activation.damping)
    assert dampings == [pytest.approx((0.3 * T) ** 0.5) for T in (9, 49, 9)]


def test_channels_last_gives_the_same_step():
    data, model = images(), image_network("strided")
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    one, two = KFQN(model, lr=0.05), KFQN(twin, lr=0.05)
    train(model, one, data, 3, nn.CrossEntropyLoss())
    train(twin, two, [(x.to(memory_format=torch.channels_last), y) for x, y in data], 3, nn.CrossEntropyLoss())
    for key, value in snapshot(model, one).items():
        assert error(snapshot(twin, two)[key], value) < 1e-12


def test_batch_norm_moves_by_adam_where_steps_are_normalised_and_nan_leaves_it_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(75, 3)).to(F64)
    optimizer = KFQN(model, lr=0.05)
    loss_fn, data = nn.CrossEntropyLoss(), images()
    twin = copy.deepcopy(model[1])
    adam = torch.optim.Adam(twin.parameters(), lr=0.01, betas=(0.9, 0.99))
    for k in range(3):
        train(model, optimizer, [data[k]], 1, loss_fn)
        for p, q in zip(twin.parameters(), model[1].parameters(), strict=True):
            p.grad = q.grad.clone()
        adam.step()
        assert error(model[1].weight.detach(), twin.weight.detach()) < 1e-12
    x, y = data[0]
    before = {k: v.clone() for k, v in optimizer.state[model[1].weight].items()}
    weight = model[1].weight.detach().clone()
    train(model, optimizer, [(x * torch.nan, y)], 1, loss_fn)
    assert torch.equal(model[1].weight, weight)
    assert all(torch.equal(before[k], v) for k, v in optimizer.state[model[1].weight].items())


def test_a_tiled_image_scales_both_factors():
    """Behind a mean over locations r^2 copies of an image change neither loss nor gradient: A grows with T, y falls."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(convolution, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).to(F64)
    x, y = images()[0]
    layers = []
    for r in (1, 2):
        twin = copy.deepcopy(model)
        optimizer = KFQN(twin, lr=0.0, **{**presets.KFQN_2022, "activation_decay": 0.5})

        def evaluate(twin=twin, optimizer=optimizer, r=r):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(twin(x.repeat(1, 1, r, r)), y)
            loss.backward()
            return loss

        optimizer.step(evaluate)
        layers.append(optimizer.layers["0"])
    one, four = layers
    assert error(four.activation.A, 4 * one.activation.A) < 1e-12
    assert error(four.M, one.M) < 1e-12
    assert four.activation.damping == pytest.approx(2 * one.activation.damping)
    assert four.gradient.damping == pytest.approx(one.gradient.damping / 2)


def test_batch_norm_empties_the_pair_of_the_layer_before_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(75, 3)).to(F64)
    optimizer = KFQN(model, lr=0.1, **presets.KFQN_2022)
    train(model, optimizer, images(), 3, nn.CrossEntropyLoss())
    before, behind = (optimizer.layers[name].gradient for name in ("0", "4"))
    assert before.s_mean.norm() > 1e-6
    assert before.y_mean.norm() < 1e-12 * behind.y_mean.norm()

"""Calls that hooks have not been made for: odd inputs, odd outputs, evaluation mode; a user notices nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfqn_core import KFQN, describe
from tests.field.programs import (
    H_of,
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

# -- hooks that meet something odd


class Mixture(nn.Module):
    """Tokens go to one of three experts; some experts get nothing in some steps."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([make() for _ in range(3)])

    def forward(self, x, which):
        out = torch.zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            out = out.index_add(0, (which == i).nonzero()[:, 0], expert(x[which == i]))
        return out


@pytest.mark.parametrize("pairs", [None, "next_batch", "second_pass"])
@pytest.mark.parametrize("without", [0, 1])
def test_an_expert_without_tokens_contributes_nothing(pairs, without):
    model = Mixture(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)))
    optimizer, x = KFQN(model, pairs=pairs, refresh=1, lr=0.01), randn(12, 5)
    for step in range(8):
        which = torch.arange(12) % 3
        empty = step % 2 == without
        if empty:
            which[which == 1] = 2

        def closure(which=which):
            optimizer.zero_grad()
            loss = model(x, which).square().mean()
            loss.backward()
            return loss

        with silence():
            before = optimizer.layers["experts.1.0"].activation.H.clone()
            optimizer.step(closure)
        if empty:
            assert torch.equal(optimizer.layers["experts.1.0"].activation.H, before)
    assert all(layer.started for layer in optimizer.layers.values())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(0, 3, 6, 6), (0, 3, 9, 6)])
def test_zero_images_count_as_nothing(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    optimizer = KFQN(model, activation_factor="action")
    x = randn(8, 3, 6, 6)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 3)
        H = H_of(optimizer, "0").clone()
        train(optimizer, lambda: model(torch.zeros(shape)).square().sum(), 2)
        assert torch.equal(H, H_of(optimizer, "0"))
        train(optimizer, lambda: model(x).square().mean() + model(torch.zeros(shape)).sum(), 2)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_scripted_module_beside_a_layer():
    """Its tables are not those of Python: its parameters are Adam's."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"scripted": torch.jit.script(nn.Linear(5, 8)), "fc": nn.Linear(8, 4)})
    with heard() as messages:
        optimizer = KFQN(model)
    x, before = randn(8, 5), values(model)
    with silence():
        train(optimizer, lambda: model["fc"](torch.tanh(model["scripted"](x))).square().mean(), 4)
    assert len(messages) == 1  # less than half is covered
    assert not still(model, before)
    assert set(optimizer.layers) == {"fc"}


EMPTY = {
    "no inputs": lambda: nn.Linear(0, 3),
    "no outputs": lambda: nn.Linear(4, 0),
    "no bias either": lambda: nn.Linear(4, 0, bias=False),
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_a_layer_without_weights_is_no_reason_to_stop(make):
    """As models are built from numbers, one of which is zero: no additional features, no auxiliary classes."""
    with pytest.warns(UserWarning, match="no-op"):
        model = nn.ModuleDict({"fc": nn.Linear(4, 3), "odd": make()})
    model.register_parameter("nothing", nn.Parameter(torch.empty(0)))
    optimizer, x, before = KFQN(model), randn(8, 4), values(model)
    with silence():
        for _ in range(25):
            optimizer.zero_grad()
            odd = model["odd"](x[:, : model["odd"].in_features])
            (model["fc"](x).square().mean() + (odd - 1).square().sum() + model.nothing.sum()).backward()
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert still(model, before) == {name for name, p in model.named_parameters() if not p.numel()}
    assert describe(model).state_bytes <= describe(model).adam_bytes + 5


def test_an_unbatched_sample_is_one_sample():
    """As agents act: one observation at a time, an image without its batch dimension."""
    runs = []
    for batched in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"see": nn.Conv2d(2, 3, 3), "act": nn.Linear(12, 4)})
        optimizer = KFQN(model, activation_factor="action")
        for step in range(5):
            x = randn(2, 4, 4, seed=step)
            optimizer.zero_grad()
            with silence():
                h = model["see"](x[None] if batched else x)
                model["act"](h.flatten(1) if batched else h.flatten()).square().mean().backward()
                optimizer.step()
        runs.append(model)
    assert difference(*runs) < 1e-6


def test_an_unbatched_sequence_is_one_sequence():
    torch.manual_seed(0)
    one = nn.ModuleDict({"read": nn.Conv1d(4, 8, 3), "mix": nn.MultiheadAttention(8, 2, batch_first=True)})
    two, x = twins(one)[1], randn(1, 4, 7)
    for model, batched in ((one, False), (two, True)):
        optimizer = KFQN(model, lr=0.003)  # steps that rounding errors hardly turn
        for _ in range(4):
            optimizer.zero_grad()
            with silence():
                h = model["read"](x if batched else x[0]).mT
                model["mix"](h, h, h)[0].square().mean().backward()
                optimizer.step()
    assert difference(one, two) < 1e-5


def sparse_input(layer):
    return layer(randn(6, 5).relu().to_sparse()).square().mean()


def nested_input(layer):
    parts = torch.nested.nested_tensor([randn(2, 5), randn(3, 5)], layout=torch.jagged)
    return layer(parts).values().square().mean()


def subclass_input(layer):
    return layer(randn(6, 5).as_subclass(Labelled)).square().mean()


class Labelled(torch.Tensor):
    """A tensor that somebody has derived, as fastai and monai do."""


ODD = {"sparse": sparse_input, "nested": nested_input, "subclass of a tensor": subclass_input}


@pytest.mark.parametrize("run", ODD.values(), ids=ODD)
@pytest.mark.parametrize("step", [0, 3, 26])
def test_odd_inputs_never_stop_a_forward(run, step):
    torch.manual_seed(0)
    model = nn.ModuleDict({"odd": nn.Linear(5, 3), "plain": nn.Linear(5, 3)})
    optimizer, x, before = KFQN(model), randn(8, 5), values(model)
    with heard() as messages:
        for i in range(step + 2):
            optimizer.zero_grad()
            odd = run(model["odd"]) if i >= step else model["odd"](x).square().mean()
            (odd + model["plain"](x).square().mean()).backward()
            optimizer.step()
    assert not still(model, before)
    assert len(messages) == 0 or ["odd" in text for text in messages] == [True]


@pytest.mark.parametrize("device", ["complex", "half and float"])
def test_inputs_of_another_dtype(device):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"a": nn.Linear(5, 5, dtype=torch.cfloat if device == "complex" else None), "b": nn.Linear(5, 3)}
    )
    optimizer, before = KFQN(model), values(model)
    x = randn(8, 5)
    for _ in range(3):
        optimizer.zero_grad()
        with heard(), torch.autocast("cpu", torch.bfloat16, enabled=device != "complex"):
            h = model["a"](x.cfloat()).abs() if device == "complex" else model["a"](x)
            model["b"](h).float().square().mean().backward()
        with silence():
            optimizer.step()
    assert not still(model, before)
    assert optimizer.layers["b"].started


# -- evaluation mode

FROZEN_NORMS = {
    "images": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(64, 3)
    ),
    "attention": lambda: nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(36, 2, 20, dropout=0.3), nn.Flatten(), nn.Linear(108, 3)
    ),
}


@pytest.mark.parametrize("make", FROZEN_NORMS.values(), ids=FROZEN_NORMS)
@pytest.mark.parametrize("pairs", [None, "second_pass"])
def test_training_in_evaluation_mode_is_training(make, pairs):
    torch.manual_seed(0)
    model = make().eval()
    optimizer, x, y = KFQN(model, pairs=pairs, lr=0.01), randn(8, 3, 6, 6), torch.arange(8) % 3
    before, buffers = values(model), [b.clone() for b in model.buffers()]

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with silence():
        losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    assert not still(model, before)
    assert all(map(torch.equal, buffers, model.buffers()))
    assert all(layer.started for layer in optimizer.layers.values())


def test_a_backbone_in_evaluation_mode_under_a_head_in_training_mode():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), "head": nn.Linear(8, 3)})
    same = twins(model)[1]
    model["body"].eval()
    x, runs = randn(16, 5), []
    for net in (model, same):
        optimizer = KFQN(net)
        if net is same:  # what evaluation mode computes, written out
            layer, norm = net["body"]
            settings = norm.running_mean, norm.running_var, norm.weight, norm.bias
            run = lambda net=net, layer=layer, settings=settings: (  # noqa: E731
                net["head"](functional.batch_norm(layer(x), *settings)).square().mean()
            )
        else:
            run = lambda net=net: net["head"](net["body"](x)).square().mean()  # noqa: E731
        with silence():
            train(optimizer, run, 10)
        runs.append(net)
    assert difference(*runs) < 1e-6


# -- sequences of several lengths, and tensors of inference mode


def sequences(*lengths, make=lambda n: randn(n, 5, seed=n)):
    return torch.nested.nested_tensor([make(n) for n in lengths], layout=torch.jagged)


@pytest.mark.parametrize("pairs", [None, "next_batch", "second_pass"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_sequences_of_several_lengths_are_their_positions_one_after_the_other(pairs, micro_batches):
    batches = [sequences(3, 4, 7), sequences(2, 5)][:micro_batches]
    nested, flat = twins(mlp(5, 8, 3))
    steps = KFQN(nested, pairs=pairs), KFQN(flat, pairs=pairs)

    def closure(optimizer, loss):
        optimizer.zero_grad()
        for batch in batches:
            (loss(batch) / micro_batches).backward()
        return 0.0

    with silence():
        for _ in range(12):
            steps[0].step(lambda: closure(steps[0], lambda b: (nested(b).values() - 1).square().mean()))
            steps[1].step(lambda: closure(steps[1], lambda b: (flat(b.values()) - 1).square().mean()))
    assert difference(nested, flat) < 1e-6


def test_tokens_of_several_lengths():
    nested, flat = twins(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)))
    tokens = sequences(3, 2, 6, make=lambda n: torch.arange(n))
    one, other = KFQN(nested), KFQN(flat)
    with silence():
        one.warm_start([tokens])
        other.warm_start([tokens.values()])
        train(one, lambda: nested(tokens).values().square().mean(), 12)
        train(other, lambda: flat(tokens.values()).square().mean(), 12)
    assert difference(nested, flat) < 1e-6
    assert {row.T for row in describe(nested, tokens).rows} == {1}


@pytest.mark.parametrize("factors", ["auto", "inverse"])
def test_a_warm_start_on_features_from_inference_mode(factors):
    model = mlp(5, 8, 3)
    with torch.inference_mode():
        features = torch.tanh(randn(16, 5))
    optimizer = KFQN(model, activation_factor=factors)
    with silence():
        optimizer.warm_start([features])
    assert error(H_of(optimizer, "0"), inverse_of(features.clone())) < 1e-4

"""Layers whose forward was not seen, was called in another way, or saw something odd."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

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
    values,
)


class Reads(nn.Module):
    """Two layers, the second of which is used in some way of its own."""

    def __init__(self, use, make=lambda: nn.Linear(8, 3)):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.use = nn.Linear(5, 8), make(), use

    def forward(self, x):
        return self.use(self.second, torch.tanh(self.first(x)))


def by_replica(layer, h):
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight * 1.0, layer.bias * 1.0
    return replica(h)


BEHIND_ITS_BACK = {
    "functional.linear": lambda layer, h: functional.linear(h, layer.weight, layer.bias),
    "matmul of slices": lambda layer, h: torch.cat([h @ w.T for w in layer.weight.split(1)], 1) + layer.bias,
    "einsum": lambda layer, h: torch.einsum("ni,oi->no", h, layer.weight) + layer.bias,
    "forward": lambda layer, h: layer.forward(h),
    "type(layer).forward": lambda layer, h: type(layer).forward(layer, h),
    "vmap": lambda layer, h: torch.vmap(layer)(h),
    "functional_call": lambda layer, h: functional_call(layer, {n: 1.0 * p for n, p in layer.named_parameters()}, h),
    "replica": by_replica,
}


@pytest.mark.parametrize("use", BEHIND_ITS_BACK.values(), ids=BEHIND_ITS_BACK)
def test_a_weight_that_something_else_reads_moves_by_adam_with_one_warning(use):
    model = Reads(use)
    optimizer, x = KFQN(model), randn(16, 5)
    shadow = Shadow(model.second.weight, model.second.bias)
    with heard() as messages:
        for _ in range(6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            shadow.step()
            optimizer.step()
    assert [("second" in text, "first" in text) for text in messages] == [(True, False)]
    assert shadow.error < 1e-6
    assert set(optimizer.layers) == {"first"}
    assert error(H_of(KFQN_after_one_step(x), "first"), inverse_of(x)) < 1e-4


def KFQN_after_one_step(x):
    model = Reads(BEHIND_ITS_BACK["functional.linear"])
    optimizer = KFQN(model, activation_factor="action")
    with heard():
        train(optimizer, lambda: model(x).square().mean(), 1)
    return optimizer


def windows(layer, x):
    """As shifted-window attention in torchvision reads its weights: functional, from a module's child."""
    return functional.multi_head_attention_forward(
        x, x, x, 8, 2, layer.qkv.weight, layer.qkv.bias, None, None, False, 0.0, layer.proj.weight, layer.proj.bias
    )[0]


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.proj, self.head = nn.Linear(4, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(windows(self, self.embed(x)).mean(0))


def test_shifted_windows_train_and_the_table_says_what_the_step_does():
    model, x = Windows(), randn(7, 3, 4)
    table = describe(model, x)
    assert {row.name for row in table.rows if row.kind == "Adam"} == {
        f"{layer}.{p}" for layer in ("qkv", "proj") for p in ("weight", "bias")
    }
    optimizer, before = KFQN(model), values(model)
    with heard() as messages:
        losses = train(optimizer, lambda: functional.cross_entropy(model(x), torch.tensor([0, 1, 1])), 30)
    assert len(messages) == 1
    assert "qkv" in messages[0]
    assert "proj" in messages[0]
    assert not still(model, before)
    assert losses[-1] < 0.5 * losses[0]
    assert table.state_bytes == describe_state(optimizer)


def describe_state(optimizer):
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())


ATTENTION = {
    "encoder, time first": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), lambda m, x: m(x)),
    "decoder": (lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0), lambda m, x: m(x, x[:3])),
    "norm first, no bias": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, bias=False), lambda m, x: m(x),
    ),
    "whole transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True), lambda m, x: m(x, x[:, :2]),
    ),
    "keys of another size": (
        lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=4), lambda m, x: m(x, x[:4, :, :5], x[:4, :, 4:])[0],
    ),
    "keywords": (lambda: nn.MultiheadAttention(8, 2), lambda m, x: m(key=x, query=x, value=x, need_weights=False)[0]),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_of_torch_trains_in_silence(case):
    make, run = ATTENTION[case]
    torch.manual_seed(0)
    model = make()
    x, before = randn(6, 4, 8), values(model)
    with silence():
        optimizer = KFQN(model)
        losses = train(optimizer, lambda: (run(model, x) - 1).square().mean(), 20)
    assert still(model, before) <= {"in_proj_bias"}  # of which the keys' third has no gradient
    assert losses[-1] < losses[0]


def test_queries_keys_and_values_have_the_curvature_of_their_inputs():
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), randn(5, 6, 8)
    optimizer = KFQN(model, activation_factor="action", lr=0.0)
    with silence():
        train(optimizer, lambda: model(x, x, x)[0].square().mean(), 1)
    H = optimizer.layers["in_proj"].activation.H
    assert all(error(H[i], inverse_of(x)) < 1e-4 for i in range(3))


@pytest.mark.parametrize("start", [0, 3])
def test_a_state_that_is_assigned_is_what_trains(start):
    model, twin = mlp(5, 8, 3), mlp(5, 8, 3)
    optimizer, of_twin, x = KFQN(model), KFQN(twin), randn(16, 5)
    given = {name: p.clone() for name, p in mlp(5, 8, 3, seed=7).state_dict().items()}
    with silence():
        train(optimizer, lambda: model(x).square().mean(), start)
        train(of_twin, lambda: twin(x).square().mean(), start)
        model.load_state_dict(given, assign=True)
        twin.load_state_dict({name: p.clone() for name, p in given.items()})
        before = values(model)
        train(optimizer, lambda: model(x).square().mean(), 1)
        train(of_twin, lambda: twin(x).square().mean(), 1)
        assert not still(model, before)
        if start:
            assert difference(model, twin) < 1e-5
        losses = train(optimizer, lambda: model(x).square().mean(), 20)
    assert losses[-1] < losses[0]
    assert all(layer.started for layer in optimizer.layers.values())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))


@pytest.mark.parametrize("own", [True, False])
def test_an_inner_loop_through_functional_call_beside_a_layer_that_is_called(own):
    """Meta-learning: the head adapts inside, from its own weights or from copies, and the body is called."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(5, 8), "head": nn.Linear(8, 1)})
    optimizer, x, before = KFQN(model, activation_factor="action"), randn(16, 5), values(model)
    shadow = Shadow(*model["head"].parameters())
    with heard() as messages:
        for step in range(5):
            optimizer.zero_grad()
            h = torch.tanh(model["body"](x))
            fast = {n: p if own else 1.0 * p for n, p in model["head"].named_parameters()}
            inner = (functional_call(model["head"], fast, h[:8]) - 1).square().mean()
            slopes = torch.autograd.grad(inner, fast.values(), create_graph=True)
            fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), slopes, strict=True)}
            (functional_call(model["head"], fast, h[8:]) - 1).square().mean().backward()
            shadow.step()
            optimizer.step()
            if own and step == 0:
                assert error(H_of(optimizer, "head"), inverse_of(h[:8])) < 1e-4
    assert ["head" in text for text in messages] == ([] if own else [True])
    assert own or shadow.error < 1e-6
    assert not still(model, before)


def test_where_no_layer_was_ever_seen_nothing_moves():
    model = mlp(5, 8, 3)
    optimizer, before = KFQN(model), values(model)
    parameters = {name: 1.0 * p for name, p in model.named_parameters()}
    functional_call(model, parameters, randn(8, 5)).square().mean().backward()
    with pytest.raises(RuntimeError, match="forward"):
        optimizer.step()
    assert len(still(model, before)) == 4
    train(optimizer, lambda: model(randn(8, 5)).square().mean(), 2)  # and it goes on when one is
    assert not still(model, before)


@pytest.mark.parametrize("tie", ["transposed", "same"])
def test_tied_weights_train_in_silence(tie):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.code, self.twin, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            if tie == "same":
                self.twin.weight = self.code.weight

        def forward(self, x):
            h = torch.tanh(self.code(x))
            h = functional.linear(h, self.code.weight.T) if tie == "transposed" else self.twin(h)
            return self.out(h + self.twin(x))

    model, x = Tied(), randn(16, 6)
    before = values(model)
    with heard() as at_construction:
        optimizer = KFQN(model)
    with silence():
        losses = train(optimizer, lambda: (model(x) - x).square().mean(), 40)
    assert len(at_construction) == (tie == "same")  # less than half of the weights have curvature
    assert not still(model, before)
    assert losses[-1] < 0.5 * losses[0]


# -- other ways of calling


class Keywords(nn.Module):
    def __init__(self, by_keyword):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv, self.fc = nn.Embedding(9, 4), nn.Conv1d(4, 6, 3), nn.Linear(6, 3)
        self.by_keyword = by_keyword

    def forward(self, x):
        call = (lambda m, x: m(input=x)) if self.by_keyword else (lambda m, x: m(x))
        return call(self.fc, call(self.conv, call(self.table, x).mT).mean(-1))


class Named(nn.Linear):
    """A subclass that is called by keyword, beside another argument that means nothing."""


@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_a_keyword_call_is_seen_like_a_positional_one(pairs):
    x = torch.arange(24).view(4, 6) % 9
    runs = []
    for by_keyword in (False, True):
        model = Keywords(by_keyword)
        optimizer = KFQN(model, pairs=pairs)
        with silence():
            train(optimizer, lambda: model(x).square().mean(), 8)  # noqa: B023 - called at once
        runs.append((model, optimizer))
    (one, optimizer), (two, by_keyword) = runs
    assert difference(one, two) == 0
    assert set(by_keyword.layers) == {"table", "conv", "fc"} == set(optimizer.layers)
    assert all(layer.started for layer in by_keyword.layers.values())


def test_a_keyword_call_of_a_subclass_and_a_transposed_convolution():
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(3, 4, 2), "fc": Named(4, 2)})
    x = randn(8, 3, 5)
    optimizer = KFQN(model, activation_factor="action", lr=0.0)
    with silence():
        h = model["up"](input=x, output_size=None).mT
        model["fc"](input=h).square().mean().backward()
        optimizer.step()
    assert error(H_of(optimizer, "fc"), inverse_of(h)) < 1e-4


def test_a_keyword_call_in_the_warm_start():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(5, 5)

        def forward(self, image, scale=1.0):
            return self.fc(input=scale * image)

    model, x = Net(), randn(16, 5)
    optimizer = KFQN(model, activation_factor="action", lr=0.0)
    with silence():
        optimizer.warm_start([{"image": x, "scale": 2.0}])
    assert error(H_of(optimizer, "fc"), inverse_of(2.0 * x)) < 1e-4

"""Attention without samples, and in a warm start, where its out-projection shows no input."""

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from kfqn_core.layers import parts
from tests.field.programs import H_of, difference, error, inverse_of, newer_torch, randn, silence, still, twins, values
from tests.test_attention_views import BATCHED, E, Opened, attention, sequences

F64 = torch.float64
# PyTorch's own: it compiles a derivative with a deprecated tool.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def blocks(kind=nn.TransformerEncoderLayer, **options):
    torch.manual_seed(0)
    return nn.ModuleList(kind(8, 2, 16, **{"batch_first": True, "dropout": 0.0} | options) for _ in range(2))


# -- attention without samples


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("factors", ["auto", "action"])
def test_attention_without_samples_adds_nothing(kind, batch_first, factors):
    """As an expert without tokens: the other block learns what it learns alone, and this one when its turn comes."""
    model, alone = twins(blocks(kind, batch_first=batch_first))
    optimizer = KFQN(model, activation_factor=factors, lr=0.02)
    of_alone = KFQN(alone, activation_factor=factors, lr=0.02)
    x = randn(6, 6, 8)

    def use(block, some):
        arguments = (some,) if kind is nn.TransformerEncoderLayer else (some, some.flip(0))
        return block(*arguments)

    empty, before = x[:0] if batch_first else x[:, :0], values(model[1])
    for _ in range(2):
        for steps in (optimizer, of_alone):
            steps.zero_grad()
        with silence():
            none = use(model[1], empty)
            assert none.shape == empty.shape
            (use(model[0], x).square().mean() + none.sum()).backward()
            use(alone[0], x).square().mean().backward()
            optimizer.step()
            of_alone.step()
    assert difference(model[0], alone[0]) < 1e-5
    assert still(model[1], before) == before.keys()
    assert not any(layer.started for name, layer in optimizer.layers.items() if name.startswith("1."))
    optimizer.zero_grad()
    with silence():
        use(model[1], x).square().mean().backward()
        optimizer.step()
    assert all(layer.started for layer in optimizer.layers.values())
    assert not still(model[1], before)


@pytest.mark.parametrize("kind", [*BATCHED, "other unbatched"])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 4, "vdim": 7}])
def test_every_part_of_attention_without_rows_shows_none(kind, sizes):
    module = attention(**sizes if "other" in kind else {})
    inputs = sequences(module, kind)
    q, k, v = (x[:0] for x in inputs) if "unbatched" not in kind else (inputs[0][:0], *inputs[1:])
    output = module(q, k, v)
    for part in parts(module):
        call = part.call(module, (q, k, v), {}, output)
        rows = part.view.batched(call.x)
        if "unbatched" not in kind or part.name in (
            "q_proj",
            "out_proj",
        ):  # there, keys and values are not without rows
            assert rows.shape[0] == 0
        assert rows.shape[-1] in (part.view.d_in, part.view.d_in - 1)


# -- the out-projection of attention in a warm start


class Attends(nn.Module):
    """Attention, and a layer behind it, which notes what it was given."""

    def __init__(self, **options):
        super().__init__()
        self.attention, self.last = attention(**options), nn.Linear(E, 2, dtype=F64)
        self.graphs, self.options = [], {}

    def forward(self, *inputs):
        y = self.attention(*inputs, **self.options)[0]
        self.graphs.append(y.requires_grad)
        return self.last(y)


def means(rows):
    """The mean of `a a^T` over rows, with the 1 of the bias."""
    a = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return a.T @ a / len(a)


@pytest.mark.parametrize("kind", [*BATCHED, "self unbatched"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("factors", ["action", "diagonal"])
def test_a_warm_start_sees_the_input_of_the_out_projection(kind, training, need_weights, factors):
    """The mean over all mini-batches of o o^T, o from the module in the open; also where PyTorch has a faster way."""
    model = Attends().train(training)
    model.options = {"need_weights": need_weights}
    inputs = sequences(model.attention, kind)
    batches = [tuple(scale * x for x in inputs) for scale in (1.0, 0.5, 2.0)]
    if kind.startswith("self"):
        batches = [(x, x, x) for x, *_ in batches]  # one tensor, as the faster way wants it
    optimizer = KFQN(model, activation_factor=factors)
    with silence():
        optimizer.warm_start(batches)
    A = torch.stack([means(Opened(model.attention, *each).o.detach().reshape(-1, E)) for each in batches]).mean(0)
    H = H_of(optimizer, "attention.out_proj")
    if factors == "action":
        assert error(H, torch.linalg.inv(A + 0.03 * torch.eye(E + 1, dtype=F64))) < 1e-10  # the inverse of 49 numbers
    else:
        assert error(H.diagonal(), 1 / (A.diagonal() + 0.03)) < 1e-12
    assert all(layer.started for layer in optimizer.layers.values())
    model(*batches[0]).square().mean().backward()
    with silence():
        optimizer.step()


def test_a_warm_start_leaves_the_module_of_attention_as_it_was():
    """Nothing else sees that it ran with a graph, and nothing of it stays, even if a forward fails."""
    model = Attends(dropout=0.5)
    x = sequences(model.attention, "self")[0]
    optimizer = KFQN(model)
    hooks, ways = list(model.attention._forward_hooks), set(vars(model.attention))
    stream = torch.get_rng_state()
    optimizer.warm_start([(x, x, x)])
    with pytest.raises(AssertionError):
        optimizer.warm_start([(x, x, x[..., :-1])])
    assert model.graphs == [False]
    assert list(model.attention._forward_hooks) == hooks
    assert set(vars(model.attention)) == ways
    assert torch.equal(stream, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())

    def own(*args, **kwargs):
        return nn.MultiheadAttention.forward(model.attention, *args, **kwargs)

    model.attention.forward = own  # as some trainers replace it
    optimizer.warm_start([(x, x, x)])
    assert model.attention.forward is own
    assert model.graphs == [False, False]


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("training", [True, False])
def test_layers_of_a_transformer_take_a_warm_start(kind, training):
    model, x = blocks(kind)[0].train(training), randn(4, 5, 8)
    optimizer = KFQN(model, lr=0.02)
    with silence():
        optimizer.warm_start([x] if kind is nn.TransformerEncoderLayer else [(x, x.flip(0))])
    assert all(layer.started for layer in optimizer.layers.values())


@newer_torch
def test_an_out_projection_whose_input_stays_hidden_starts_from_its_first_mini_batch():
    """Whoever keeps autograd's tensors in a way of their own may give them out only once. The other layers start."""
    model, x = blocks()[0], randn(4, 5, 8)
    optimizer = KFQN(model, activation_factor="action", lr=0.0)
    with torch.autograd.graph.save_on_cpu(), silence():
        optimizer.warm_start([x])
    started = {name: bool(layer.started) for name, layer in optimizer.layers.items()}
    assert [name for name in started if not started[name]] == ["self_attn.out_proj"]
    inputs = []
    part = next(part for part in parts(model.self_attn) if part.name == "out_proj")

    def look(module, args, kwargs, output):
        call = part.call(module, args, kwargs, output)
        call.h.register_hook(lambda _: inputs.append(call.x().clone()))

    model.self_attn.register_forward_hook(look, with_kwargs=True)
    model(x).square().mean().backward()
    with silence():
        optimizer.step()
    assert error(H_of(optimizer, "self_attn.out_proj"), inverse_of(inputs[0])) < 1e-4
    assert all(layer.started for layer in optimizer.layers.values())


def test_a_layer_that_a_warm_start_does_not_use_is_still_refused():
    model, x = blocks(), randn(4, 5, 8)
    model.forward = lambda x: model[0](x)
    with pytest.raises(RuntimeError, match=r"layer '1\.self_attn\.in_proj' was not used"):
        KFQN(model).warm_start([x])

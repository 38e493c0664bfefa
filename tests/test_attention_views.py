"""The matrices of `nn.MultiheadAttention`: what a call shows of them, against the module computed anew in the open."""

import copy
import gc
import math
import pickle
import re
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfqn_core.layers import InProjectionView, LinearView, UnsupportedLayer, parts, view
from kfqn_core.truth import exact
from kfqn_core.truth.ladder import structured_hessian
from tests.measures import relative

F64 = torch.float64
E, HEADS, N, L, S = 6, 2, 4, 5, 3


def attention(dtype=F64, **options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, HEADS, **{"batch_first": True} | options, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)  # PyTorch begins with biases of zero
    return module


def sequences(module: nn.MultiheadAttention, kind: str, dtype=F64) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value; unbatched ones where `kind` says so."""
    generator = torch.Generator().manual_seed(1)

    def randn(length, size=E):
        shape = (length, size) if "unbatched" in kind else (N, length, size)
        x = torch.randn(shape, generator=generator, dtype=dtype)
        return x if module.batch_first or "unbatched" in kind else x.transpose(0, 1).contiguous()

    x = randn(L)
    if "self" in kind:
        return x, x, x
    if "same length" in kind:
        return x, randn(L), randn(L)
    if "memory" in kind:
        memory = randn(S)
        return x, memory, memory
    return x, randn(S, module.kdim), randn(S, module.vdim)


class Opened:
    """The module's formula, with everything that it keeps to itself: `q, k, v, o` and `y`, samples first."""

    def __init__(self, module: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None):
        if q.dim() == 2:
            q, k, v = (x[None] for x in (q, k, v))
        elif not module.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        self.inputs = q, k, v
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        biases = module.in_proj_bias.chunk(3) if module.in_proj_bias is not None else [None] * 3
        self.projected = [nn.functional.linear(*each) for each in zip(self.inputs, weights, biases, strict=True)]
        for h in self.projected:
            h.retain_grad()
        heads = [h.unflatten(-1, (HEADS, -1)).transpose(1, 2) for h in self.projected]
        if module.bias_k is not None:
            more = [bias.reshape(1, HEADS, 1, -1).expand(len(q), -1, -1, -1) for bias in (module.bias_k, module.bias_v)]
            heads[1:] = [torch.cat(pair, dim=2) for pair in zip(heads[1:], more, strict=True)]
        scores = heads[0] @ heads[1].mT / math.sqrt(E / HEADS)
        if mask is not None:
            scores = scores.masked_fill(mask, -math.inf)
        self.o = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        self.y = module.out_proj(self.o)
        self.y.retain_grad()


def shown(module, *args, loss=lambda y: y.sin().sum(), **kwargs):
    """What a call of the module shows of each part, inputs as they are during backward, and the output."""
    seen = {}

    def hook(module, args, kwargs, output):
        for part in parts(module):
            call = part.call(module, args, kwargs, output)
            if call is not None:
                seen[part.name] = call.x if isinstance(call.x, Tensor) else None
                assert not call.shows_h
                assert call.h is output[0]

                def reached(_, name=part.name, x=call.x):
                    seen[name] = x if isinstance(x, Tensor) else x().clone()

                call.h.register_hook(reached)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    y = module(*args, **kwargs)[0]
    handle.remove()
    loss(y).backward()
    return seen, y


def by_name(module):
    return {part.name: part for part in parts(module)}


def gradient(module, part):
    weight = module.get_parameter(part.weight).grad
    return part.view.to_matrix(weight, module.get_parameter(part.bias).grad if part.bias else None)


# PyTorch's own: it compiles a derivative with a deprecated tool.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]
BATCHED = ["self", "memory", "other", "same length"]


@pytest.mark.parametrize("kind", [*BATCHED, "self unbatched", "other unbatched"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_are_scores_times_the_inputs_that_are_shown(kind, batch_first, bias, need_weights):
    """Mean over samples of the sum over locations of g a^T, a from the call, g from the module in the open."""
    module = attention(batch_first=batch_first, bias=bias)
    inputs = sequences(module, kind)
    opened = Opened(module, *inputs)
    opened.y.sin().sum().backward()
    samples = len(opened.y)
    module.zero_grad()

    seen, y = shown(module, *inputs, need_weights=need_weights)
    y = y[None] if y.dim() == 2 else y if batch_first else y.transpose(0, 1)
    assert relative(y, opened.y) < 1e-13
    assert set(seen) == {"in_proj", "out_proj"}
    part = by_name(module)["in_proj"]
    assert part.view.groups == 3
    a = part.view.patches(seen["in_proj"])
    longest = max(L, opened.inputs[1].shape[1])
    assert a.shape == (samples, 3, longest, E + bias)
    for group, (x, h) in enumerate(zip(opened.inputs, opened.projected, strict=True)):
        T = x.shape[1]
        assert torch.equal(a[:, group, :T, :E], x)
        assert a[:, group, T:].count_nonzero() == 0  # locations that are not there see nothing, not even the bias's 1
        expected = torch.einsum("nto,nti->oi", h.grad, a[:, group, :T])
        assert relative(gradient(module, part)[group], expected) < 1e-12  # a few dozen float64 roundings, and a softmax

    part = by_name(module)["out_proj"]
    assert type(part.view) is LinearView
    x = seen["out_proj"]
    assert x.shape == (samples * L, E)
    order = opened.o.transpose(0, 1).reshape(-1, E)  # the module puts locations before samples
    assert relative(x, order) < 1e-13
    g = opened.y.grad.transpose(0, 1).reshape(-1, E)
    assert relative(gradient(module, part)[0], g.mT @ part.view.patches(x)[:, 0, 0]) < 1e-12


@pytest.mark.parametrize("kind", BATCHED)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_statistics_of_in_proj_are_those_of_its_patches(kind, batch_first, bias):
    module = attention(batch_first=batch_first, bias=bias)
    (part, _), inputs = parts(module), sequences(module, kind)
    v: InProjectionView = part.view
    x = part.call(module, inputs, {}, (torch.zeros(N, L, E, dtype=F64), None)).x
    probe, probes = torch.randn(3, v.d_in, dtype=F64), torch.randn(3, v.d_in, 2, dtype=F64)
    # Rows as samples, as the optimizer takes them, are the same but for the scale of A.
    for each, T in ((x, L), (v.batched(x), 1)):
        a = v.patches(each)
        A = torch.einsum("ngti,ngtj->gij", a, a) / len(each)
        assert v.locations(each) == T == a.shape[2]
        assert relative(v.second_moment(each), A) < 1e-13
        assert relative(v.activation_action(each, probe), torch.einsum("gij,gj->gi", A, probe)) < 1e-13
        assert relative(v.activation_action(each, probes), A @ probes) < 1e-13
        assert relative(v.mean_input(each), a.mean(dim=(0, 2))) < 1e-13
        assert relative(v.diagonal(each), A.diagonal(dim1=1, dim2=2)) < 1e-13
    assert relative(v.second_moment(v.batched(x)), v.second_moment(x) / L) < 1e-13
    frozen = v.without_bias()
    a = frozen.patches(x)
    assert a.shape[-1] == frozen.d_in == E
    A = torch.einsum("ngti,ngtj->gij", a, a) / N
    assert relative(frozen.activation_action(x, probes[:, :E]), A @ probes[:, :E]) < 1e-13
    assert relative(frozen.mean_input(x), a.mean(dim=(0, 2))) < 1e-13
    assert relative(frozen.second_moment(x), A) < 1e-13

    W = v.to_matrix(module.in_proj_weight, module.in_proj_bias)
    h = torch.cat([a[:, g] @ W[g, :, :E].mT for g in range(3)], dim=-1)
    assert relative(v.outputs(h), a @ W[:, :, :E].mT) < 1e-13
    assert relative(v.sum_output(h), (a @ W[:, :, :E].mT).sum((0, 2))) < 1e-13
    weight, b = v.from_matrix(W)
    assert torch.equal(weight, module.in_proj_weight)
    assert torch.equal(b, module.in_proj_bias) if bias else b is None


def test_self_attention_is_kept_as_one_tensor():
    """Not as three copies of it, in whatever order its axes are."""
    for batch_first in (True, False):
        module = attention(batch_first=batch_first)
        x = sequences(module, "self")[0]
        call = parts(module)[0].call(module, (), {"value": x, "key": x, "query": x}, (x, None))
        rows = parts(module)[0].view.batched(call.x)
        assert rows.shape == (N * L, 3, E)
        assert call.x.data_ptr() == rows.data_ptr() == x.data_ptr()


def test_masks_dropout_and_causality_leave_the_inputs_what_they_are():
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[:, -1] = True
    for options, mask in (
        ({"attn_mask": causal}, causal),
        ({"attn_mask": causal, "is_causal": True, "need_weights": False}, causal),
        ({"key_padding_mask": padding}, padding[:, None, None]),
        ({"key_padding_mask": padding, "attn_mask": causal, "need_weights": False}, causal | padding[:, None, None]),
    ):
        module = attention()
        inputs = sequences(module, "self")
        opened = Opened(module, *inputs, mask)
        seen, y = shown(module, *inputs, **options)
        assert relative(y, opened.y) < 1e-13
        assert relative(seen["out_proj"], opened.o.transpose(0, 1).reshape(-1, E)) < 1e-13
    module = attention(dropout=0.5)
    seen, y = shown(module, *inputs)
    assert relative(module.out_proj(seen["out_proj"]).reshape(L, N, E).transpose(0, 1), y) < 1e-13


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_more_keys_and_values_come_behind_the_projections(options):
    module = attention(**options)
    inputs = sequences(module, "other")
    seen, y = shown(module, *inputs)
    in_proj, out_proj = parts(module)
    assert relative(module.out_proj(seen["out_proj"]).reshape(L, N, E).transpose(0, 1), y) < 1e-13
    a = in_proj.view.patches(seen["in_proj"])
    assert a.shape == (N, 3, L, E + 1)
    assert a[:, 1:, S:].count_nonzero() == 0
    if module.bias_k is not None:
        opened = Opened(module, *inputs)
        module.zero_grad()
        opened.y.sin().sum().backward()
        for group, h in enumerate(opened.projected):
            expected = torch.einsum("nto,nti->oi", h.grad, a[:, group, : h.shape[1]])
            assert relative(gradient(module, in_proj)[group], expected) < 1e-12
    assert {in_proj.weight, in_proj.bias, out_proj.weight, out_proj.bias}.isdisjoint({"bias_k", "bias_v"})


@pytest.mark.parametrize("need_weights", [True, False])
def test_other_sizes_of_keys_and_values_are_three_weights(need_weights):
    module = attention(kdim=4, vdim=7)
    inputs = sequences(module, "other")
    opened = Opened(module, *inputs)
    opened.y.sin().sum().backward()
    module.zero_grad()
    seen, _ = shown(module, *inputs, need_weights=need_weights)
    assert list(seen) == ["q_proj", "k_proj", "v_proj", "out_proj"]
    named = by_name(module)
    for name, x, h in zip(seen, opened.inputs, opened.projected, strict=False):
        assert named[name].bias is None  # one for all three: the fallback's
        expected = torch.einsum("nto,nti->oi", h.grad, x)
        assert torch.equal(seen[name], x)
        g = named[name].view.patches(seen[name])[:, 0]
        assert torch.equal(g, x)
        assert relative(gradient(module, named[name])[0], expected) < 1e-12
    assert relative(seen["out_proj"], opened.o.transpose(0, 1).reshape(-1, E)) < 1e-13


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast_keeps_half_a_tensor_and_shows_it(bias, need_weights):
    module = attention(torch.float32, bias=bias)
    inputs = sequences(module, "self", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        seen, y = shown(module, *inputs, need_weights=need_weights)
        expected = module.out_proj(seen["out_proj"]).reshape(L, N, E).transpose(0, 1)
    assert seen["out_proj"].dtype == torch.bfloat16
    assert torch.equal(expected, y)
    out_proj = by_name(module)["out_proj"]
    assert out_proj.view.mean_input(seen["out_proj"]).dtype == torch.float32
    in_proj = by_name(module)["in_proj"]
    half, single = seen["in_proj"].bfloat16(), seen["in_proj"].bfloat16().float()
    for statistic in (in_proj.view.mean_input, in_proj.view.second_moment, in_proj.view.diagonal):
        assert statistic(half).dtype == torch.float32
        assert relative(statistic(half), statistic(single)) < 1e-6  # float32 sums; bfloat16 ones would miss by 1e-2
    probe = torch.randn(3, E + bias)
    assert relative(in_proj.view.activation_action(half, probe), in_proj.view.activation_action(single, probe)) < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_activation_checkpointing_computes_the_input_once_and_gradients_are_what_they_are(reentrant, last):
    """Checkpointing gives out each tensor once; a second reader of `out_proj`'s input would be refused."""
    module = attention()
    x = sequences(module, "self")[0].requires_grad_()
    runs, seen = [], []

    def block(x):
        runs.append(1)
        y = module(x, x, x)[0]
        return y if last else y.tanh().square()

    def hook(module, args, kwargs, output):
        call = by_name(module)["out_proj"].call(module, args, kwargs, output)
        if call is not None:
            call.h.register_hook(lambda _: seen.append(call.x().clone()))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    checkpoint(block, x, use_reentrant=reentrant).sin().sum().backward()
    handle.remove()
    assert len(runs) == 2
    # An older PyTorch does not tell who keeps the tensor, and nothing is read.
    readable = reentrant or hasattr(torch._C._autograd.SavedTensor, "unpack_hook")
    assert len(seen) == readable
    actual = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    block(x).sin().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(actual, module.parameters(), strict=True))
    for o in seen:
        assert relative(o, Opened(module, x, x, x).o.transpose(0, 1).reshape(-1, E)) < 1e-13


def test_tensors_saved_in_a_way_of_ones_own_are_not_read():
    """Some hooks give out what they keep only once."""
    module = attention()
    x = sequences(module, "self")[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = module(x, x, x)
    assert by_name(module)["out_proj"].call(module, (x, x, x), {}, y) is None
    assert by_name(module)["in_proj"].call(module, (x, x, x), {}, y) is not None


def test_what_does_not_match_shows_nothing():
    module = attention()
    in_proj, out_proj = parts(module)
    q, k, v = sequences(module, "other")
    y = module(q, k, v)
    for args, kwargs, output in [
        ((q, k), {}, y),  # no value
        ((q, k, None), {}, y),
        ((q, k, v), {}, None),
        ((q, k, v), {}, ()),
        ((q, k[1:], v[1:]), {}, y),  # no samples of one batch
    ]:
        assert in_proj.call(module, args, kwargs, output) is None
    ragged = torch.nested.nested_tensor([torch.zeros(2, E), torch.zeros(3, E)])
    assert in_proj.call(module, (ragged, ragged, ragged), {}, y) is None  # the fast path's, which has no gradients
    other = nn.Linear(E, E, dtype=F64)
    for tensor in (
        q,  # no graph
        y[0].detach(),
        other(q),  # another weight's product
        nn.functional.linear(q.reshape(-1, E), module.out_proj.weight, module.out_proj.bias),  # the product itself
        y[0].tanh(),  # a product, and then something
        (y[0] + q).view(N, L, E),
        nn.functional.linear(q.reshape(-1, E), 2 * module.out_proj.weight).view(N, L, E),
    ):
        assert out_proj.call(module, (q, k, v), {}, (tensor, None)) is None
    with torch.no_grad():
        assert out_proj.call(module, (q, k, v), {}, module(q, k, v)) is None
    module.out_proj.weight.requires_grad_(False)
    assert out_proj.call(module, (q, k, v), {}, module(q, k, v)) is None


def test_a_hook_that_holds_the_call_does_not_hold_the_graph_for_ever():
    module = attention()
    x = sequences(module, "self")[0].clone()
    freed = weakref.ref(x)
    y = module(x, x, x)
    call = by_name(module)["out_proj"].call(module, (x, x, x), {}, y)
    call.h.register_hook(lambda _, x=call.x: x())
    gc.disable()
    try:
        call = y = x = None
        assert freed() is None
    finally:
        gc.enable()


class Block(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.attention, self.last = module, nn.Linear(E, 2, dtype=F64)

    def forward(self, x):
        return self.last((x + self.attention(x, x, x, need_weights=False)[0]).tanh().mean(1))


def wave(z, y):
    """Neither convex nor a likelihood."""
    return (z * y).sin().sum(1).mean()


@pytest.mark.parametrize("training", [True, False])
def test_exact_blocks_of_a_part_are_those_of_the_network(training):
    model = Block(attention()).train(training)
    x, y = torch.randn(3, L, E, dtype=F64), torch.randn(3, 2, dtype=F64)
    network = exact.network_hessian(model, wave, x, y)
    offset = 0
    positions = {}
    for name, p in model.named_parameters():
        positions[name] = torch.arange(offset, offset + p.numel(), dtype=F64).reshape(p.shape)
        offset += p.numel()
    for part in parts(model.attention):
        weight, bias = (positions[f"attention.{name}"] for name in (part.weight, part.bias))
        order = part.view.to_matrix(weight, bias).mT.reshape(-1).long()  # vec, group by group
        H = exact.layer_hessian(model, wave, x, y, f"attention.{part.name}")
        assert relative(H, network[order][:, order]) < 1e-12
    last = exact.cross_hessian(model, wave, x, y, "attention.out_proj", "last")
    assert last.shape == (E * (E + 1), 2 * (E + 1))
    assert (
        relative(structured_hessian(model, wave, x, y, "last"), exact.layer_hessian(model, wave, x, y, "last")) < 1e-13
    )
    with pytest.raises(ValueError, match=r"'attention.in_proj' does not show its input and its pre-activation"):
        structured_hessian(model, wave, x, y, "attention.in_proj")
    with pytest.raises(ValueError, match=r"several matrices; name one of 'attention.in_proj', 'attention.out_proj'"):
        exact.layer_hessian(model, wave, x, y, model.attention)


def test_out_proj_is_a_part_of_the_module_and_no_layer():
    module = attention()
    with pytest.raises(UnsupportedLayer, match=r"out_proj of an nn\.MultiheadAttention.*fallback"):
        parts(module.out_proj)
    with pytest.raises(UnsupportedLayer, match="holds in_proj, out_proj, which are not the weight of a layer"):
        view(module)
    assert [part.weight for part in parts(module)] == ["in_proj_weight", "out_proj.weight"]
    for part in parts(copy.deepcopy(module)):
        again = pickle.loads(pickle.dumps(part))
        assert (again.name, again.call) == (part.name, part.call)
        assert vars(again.view) == vars(part.view)


class LoudAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)[0].exp(), None


def test_attention_of_another_kind_is_left_out():
    with pytest.raises(UnsupportedLayer, match=r"LoudAttention replaces the forward of nn\.MultiheadAttention"):
        parts(LoudAttention(E, HEADS))
    module = nn.utils.parametrizations.weight_norm(attention(), "in_proj_weight")
    assert [part.name for part in parts(module)] == ["out_proj"]
    nn.utils.parametrizations.weight_norm(module.out_proj)
    with pytest.raises(UnsupportedLayer, match="computes its weights"):
        parts(module)
    replaced = attention()
    replaced.out_proj = nn.Linear(E, E)  # a layer by itself, as far as anybody knows
    assert [part.name for part in parts(replaced)] == ["in_proj"]


def test_nothing_is_read_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # any .item() or bool(tensor) raises here
        module = attention()
        v = parts(module)[0].view
        for kind in ("self", "other"):
            inputs = [torch.empty(N, L, E, dtype=F64)] * 3
            if kind == "other":
                inputs[1:] = [torch.empty(N, S, E, dtype=F64) for _ in range(2)]
            x = parts(module)[0].call(module, tuple(inputs), {}, (inputs[0], None)).x
            for each in (x, v.batched(x)):
                assert v.activation_action(each, v.mean_input(each)).shape == v.diagonal(each).shape == (3, E + 1)
                assert v.second_moment(each).shape == (3, E + 1, E + 1)
        v.from_matrix(v.to_matrix(module.in_proj_weight, module.in_proj_bias))


def test_bad_input_is_refused():
    v = parts(attention())[0].view
    for bad in (torch.zeros(4, E), torch.zeros(4, 3, E - 1), torch.zeros(4, 2, E), torch.zeros(0, 3, E)):
        with pytest.raises(ValueError, match=re.escape(f"{tuple(bad.shape)}, but [N, ..., 3, 6]")):
            v.mean_input(bad)
    with pytest.raises(TypeError, match="floating-point"):
        v.patches(torch.zeros(4, 3, E, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[groups, d_in\] = \(3, 7\)"):
        v.activation_action(torch.zeros(4, 3, E), torch.zeros(3, E))
    assert v.batched(torch.zeros(0, 5, 3, E)).shape == (0, 3, E)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_layers_of_a_transformer_show_their_attention_in_training(kind):
    torch.manual_seed(0)
    layer = kind(E, HEADS, 8, batch_first=True, dtype=F64)
    x, memory = torch.randn(N, L, E, dtype=F64), torch.randn(N, S, E, dtype=F64)
    arguments = (x,) if kind is nn.TransformerEncoderLayer else (x, memory)
    found = []
    for module in layer.modules():
        if isinstance(module, nn.MultiheadAttention):

            def hook(module, args, kwargs, output):
                found.extend(part.call(module, args, kwargs, output) for part in parts(module))

            module.register_forward_hook(hook, with_kwargs=True)
    layer(*arguments)
    assert len(found) == 2 * len(arguments)
    assert all(call is not None for call in found)

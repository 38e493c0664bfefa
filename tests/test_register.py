"""The table of kinds: which class decides, kinds that users add, and those of packages that are not imported."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from kfqn_core import layers
from kfqn_core.layers import Call, LinearView, TransposedLinearView, UnsupportedLayer, parts, register, view
from kfqn_core.truth import exact
from kfqn_core.truth.ladder import structured_hessian

# PyTorch's own: it compiles a derivative with a deprecated tool.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
F64 = torch.float64


@pytest.fixture(autouse=True)
def _table(monkeypatch):
    """What a test registers is gone behind it."""
    monkeypatch.setattr("kfqn_core.layers.kinds.SUPPORTED", dict(layers.SUPPORTED))


def relative(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


class EqualizedLinear(nn.Linear):
    """`h = W (c x) + b`, c the scale that a weight of size one lacks (StyleGAN)."""

    def forward(self, x):
        return linear(x * self.in_features**-0.5, self.weight, self.bias)


def scaled_input(module, args, kwargs, h):
    """`a` is what the weight multiplies."""
    return Call(args[0] * module.in_features**-0.5, h)


class Dense(nn.Module):
    """`h = x W + b`, with other names and the weight transposed."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, values):
        return values @ self.kernel + self.shift


def dense(layer):
    return TransposedLinearView.of(layer.kernel, has_bias=True)


def sequence_model(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)).double()


def wave(z, y):
    """Neither convex nor a likelihood."""
    return (z * y).sin().sum(1).mean()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 2, 3, generator=generator, dtype=F64), torch.randn(4, 3, generator=generator, dtype=F64)


def check(model, weight, bias):
    """Statistics against products in the open, the structured Hessian against the exact one."""
    layer, (x, y) = model[2], data()
    part = parts(layer)[0]
    assert (part.weight, part.bias) == (weight, bias)
    call = exact.layer_call(model, x, "2")
    a, v = part.view.patches(call.input), part.view
    W = v.to_matrix(layer.get_parameter(weight), layer.get_parameter(bias))
    assert relative(a @ W.mT, v.outputs(call.output)) < 1e-13  # h = W a: a few dozen float64 roundings
    A = torch.einsum("ngti,ngtj->gij", a, a) / len(x)
    probe = torch.randn(1, v.d_in, dtype=F64)
    assert relative(v.activation_action(call.input, probe), (A @ probe[..., None])[..., 0]) < 1e-13
    assert relative(v.mean_input(call.input), a.mean((0, 2))) < 1e-13
    H = exact.layer_hessian(model, wave, x, y, "2")
    assert relative(structured_hessian(model, wave, x, y, "2"), H) < 1e-13
    G = exact.layer_gauss_newton(model, wave, x, y, layer)
    assert G.shape == H.shape
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    positions = {n: p.reshape(model.get_parameter(n).shape) for n, p in
                 zip(names, torch.arange(sum(sizes), dtype=F64).split(sizes), strict=True)}  # fmt: skip
    order = v.to_matrix(positions[f"2.{weight}"], positions[f"2.{bias}"]).mT.reshape(-1).long()
    network = exact.network_hessian(model, wave, x, y)
    assert relative(H, network[order][:, order]) < 1e-13


def test_a_kind_of_ones_own_is_a_layer_like_any_other():
    model = sequence_model(EqualizedLinear(4, 5))
    with pytest.raises(UnsupportedLayer, match="EqualizedLinear replaces the forward"):
        view(model[2])
    register(EqualizedLinear, LinearView, call=scaled_input)
    check(model, "weight", "bias")


def test_a_kind_with_other_names_and_another_order():
    model = sequence_model(Dense(4, 5))
    with pytest.raises(UnsupportedLayer, match=r"Dense is not a layer.*or register its kind"):
        view(model[2])
    register(Dense, TransposedLinearView)
    with pytest.raises(UnsupportedLayer, match="Dense has no parameter 'weight'"):
        view(model[2])
    register(Dense, dense, weight="kernel", bias="shift")  # replaces
    check(model, "kernel", "shift")
    v = view(model[2])
    W = v.to_matrix(model[2].kernel, model[2].shift)
    weight, bias = v.from_matrix(W)
    assert torch.equal(weight, model[2].kernel)
    assert torch.equal(bias, model[2].shift)


def test_a_preactivation_that_is_not_the_output_cannot_be_shifted():
    """Adding to the output of such a layer would give derivatives in another place."""

    class Positive(nn.Linear):
        def forward(self, x):
            self.h = super().forward(x)
            return self.h.exp()

    register(Positive, LinearView, call=lambda module, args, kwargs, output: Call(args[0], module.h))
    model, (x, y) = sequence_model(Positive(4, 5)), data()
    with pytest.raises(ValueError, match="'2' does not show its input and its pre-activation"):
        structured_hessian(model, wave, x, y, "2")
    assert exact.layer_hessian(model, wave, x, y, "2").shape == (25, 25)


def test_a_weight_may_belong_to_a_child():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ParameterDict({"W": torch.randn(5, 4), "b": torch.randn(5)})

        def forward(self, x):
            return linear(x, self.inner["W"], self.inner["b"])

    register(Wrapped, lambda layer: LinearView.of(layer.inner["W"], has_bias=True), weight="inner.W", bias="inner.b")
    check(sequence_model(Wrapped()), "inner.W", "inner.b")


def test_the_most_derived_class_decides():
    class Base(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    class Derived(Base):
        pass

    class Loud(Derived):
        def forward(self, x):
            return super().forward(x).exp()

    def twice(module, args, kwargs, h):
        return Call(2 * args[0], h)

    register(Base, LinearView, call=twice)
    assert parts(Derived(3, 2))[0].call is twice  # keeps the forward of what was registered
    with pytest.raises(UnsupportedLayer, match="Loud replaces the forward of Base"):
        parts(Loud(3, 2))
    register(Derived, LinearView)
    assert parts(Derived(3, 2))[0].call is not twice
    assert parts(Base(3, 2))[0].call is twice
    assert parts(nn.Linear(3, 2))[0].call is not twice


def test_what_cannot_be_registered_is_refused():
    for bad in (nn.Linear(3, 2), "Linear", int, torch.Tensor):
        with pytest.raises(TypeError, match=r"a kind of layer is a subclass of nn\.Module"):
            register(bad, LinearView)
    with pytest.raises(TypeError, match="function from a module to a LayerView"):
        register(Dense, None)
    register(EqualizedLinear, lambda layer: 3)
    with pytest.raises(TypeError, match="the view of EqualizedLinear is 3"):
        parts(EqualizedLinear(3, 2))


class Conv1D(nn.Module):
    """Hugging Face's, of GPT-2, by its name and its code."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


Conv1D.__module__ = "transformers.pytorch_utils"


def test_conv1d_of_gpt2_is_known_by_its_name():
    check(sequence_model(Conv1D(5, 4)), "weight", "bias")
    v = view(Conv1D(5, 4))
    assert type(v) is TransposedLinearView
    assert (v.d_out, v.d_in, v.weight_shape) == (5, 5, (4, 5))
    W = torch.zeros(1, 5, 5)
    weight, bias = v.from_matrix(W)
    weight.add_(1)  # a view of the matrix, as the bias is
    assert W.sum() == 20
    assert bias.shape == (5,)


def test_a_conv1d_of_another_package_is_another_class():
    class Other(Conv1D):
        pass

    Other.__qualname__ = "Conv1D"
    assert type(view(Other(5, 4))) is TransposedLinearView  # keeps the forward of its base

    class Stranger(nn.Module):
        forward = Conv1D.forward

    Stranger.__qualname__ = "Conv1D"
    with pytest.raises(UnsupportedLayer, match="is not a layer"):
        view(Stranger())


def test_the_real_conv1d_of_gpt2():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D as Real

    check(sequence_model(Real(5, 4)), "weight", "bias")


def test_the_message_lists_every_kind_that_is_supported():
    with pytest.raises(UnsupportedLayer) as caught:
        view(nn.Bilinear(2, 3, 4))
    kinds = (
        "nn.Linear nn.Conv1d nn.ConvTranspose3d nn.Embedding nn.MultiheadAttention transformers.pytorch_utils.Conv1D"
    )
    assert all(kind in str(caught.value) for kind in kinds.split())
    assert "NonDynamically" not in str(caught.value)

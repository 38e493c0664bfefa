"""`layers`: every fast path against the patches, and the patches against the layer itself."""

import pytest
import torch
from torch import nn

from kfqn_core.layers import LayerView, UnsupportedLayer, parts, view

F64 = torch.float64
CASES = [((7, 5), True), ((7, 5), False), ((4, 3, 5), True), ((4, 3, 5), False), ((2, 3, 2, 5), True), ((1, 5), True)]


def case(shape: tuple[int, ...], bias: bool, dtype: torch.dtype = F64) -> tuple[nn.Linear, LayerView, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(shape[-1], 4, bias=bias, dtype=dtype)
    return layer, view(layer), torch.randn(shape, dtype=dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-13) -> bool:
    """A few dozen float64 roundings."""
    return actual.shape == expected.shape and bool((actual - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize(("shape", "bias"), CASES)
def test_layer_is_the_matrix_times_patches(shape, bias):
    layer, v, x = case(shape, bias)
    a, W = v.patches(x), v.to_matrix(layer.weight, layer.bias)
    T = x[0, ..., 0].numel()
    assert a.shape == (shape[0], 1, T, v.d_in)
    assert W.shape == (1, v.d_out, v.d_in)
    assert v.d_in == 5 + bias  # the bias is a coordinate of a
    assert close(a @ W.mT, v.outputs(layer(x)))


@pytest.mark.parametrize(("shape", "bias"), CASES)
def test_statistics_are_those_of_the_patches(shape, bias):
    layer, v, x = case(shape, bias)
    a, probe = v.patches(x), torch.randn(1, v.d_in, dtype=F64)
    A = torch.einsum("ngti,ngtj->gij", a, a) / len(x)  # mean over samples, sum over locations
    assert close(v.second_moment(x), A)
    assert close(v.activation_action(x, probe), (A @ probe[..., None])[..., 0])
    assert close(v.mean_input(x), a.mean(dim=(0, 2)))
    assert close(v.sum_output(layer(x)), v.outputs(layer(x)).sum(dim=(0, 2)))


@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_the_last_column(bias):
    layer, v, x = case((7, 5), bias)
    W = v.to_matrix(layer.weight, layer.bias)
    if bias:
        assert torch.equal(W[0, :, -1], layer.bias)
        assert torch.equal(v.patches(x)[..., -1], torch.ones(7, 1, 1, dtype=F64))
        assert v.mean_input(x)[0, -1] == 1
    weight, back = v.from_matrix(W)
    assert torch.equal(weight, layer.weight)
    assert (back is None) if not bias else torch.equal(back, layer.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_go_through_the_same_door(bias):
    """to_matrix of the gradients is the gradient with respect to [W | b]: mean of g a^T."""
    layer, v, x = case((6, 3, 5), bias)
    h = layer(x)
    h.retain_grad()
    h.sin().sum().div(len(x)).backward()
    gradient = v.to_matrix(layer.weight.grad, layer.bias.grad if bias else None)
    g = v.outputs(h.grad * len(x))  # per sample, not divided by the batch
    assert close(gradient, torch.einsum("ngto,ngti->goi", g, v.patches(x)) / len(x))


def test_half_precision_is_raised_before_it_is_summed():
    layer, v, x = case((4096, 5), True, torch.bfloat16)
    _, exact, _ = case((4096, 5), True)
    probe = torch.randn(1, v.d_in)
    assert v.patches(x).dtype == torch.bfloat16
    for actual, expected in [
        (v.mean_input(x), exact.mean_input(x.double())),
        (v.second_moment(x), exact.second_moment(x.double())),
        (v.activation_action(x, probe), exact.activation_action(x.double(), probe.double())),
        (v.sum_output(layer(x)), exact.sum_output(layer(x).double())),
    ]:
        assert actual.dtype == torch.float32
        assert close(actual.double(), expected, 1e-5)  # float32 sums of 4096 terms; bfloat16 sums would miss by 1e-2
    assert v.activation_action(x.float(), probe.double()).dtype == F64


def test_non_contiguous_inputs():
    _, v, x = case((4, 3, 5), True)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert close(v.second_moment(strided), v.second_moment(x))
    assert close(v.mean_input(strided), v.mean_input(x))


def test_nothing_is_read_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # any .item() or bool(tensor) raises here
        layer = nn.Linear(5, 4)
        v, x = view(layer), torch.randn(6, 3, 5)
        assert v.activation_action(x, v.mean_input(x)).shape == (1, 6)
        assert v.second_moment(x).shape == (1, 6, 6)
        assert v.sum_output(layer(x)).shape == (1, 4)
        v.from_matrix(v.to_matrix(layer.weight, layer.bias))


def test_sums_of_half_precision_are_not_ends_of_its_range():
    """float16 ends at 65504."""
    layer, v, x = case((4096, 5), True, torch.float16)
    x = 100 * x
    for statistic in (v.mean_input, v.second_moment, v.diagonal, lambda x: v.activation_action(x, torch.ones(1, 6))):
        assert statistic(x).dtype == torch.float32
        assert close(statistic(x).double(), statistic(x.double()), 1e-5)  # float32 sums of 4096 terms
    h = layer.float()(x.float()).half()
    assert close(v.sum_output(h).double(), v.sum_output(h.double()), 1e-5)


def test_rows_are_samples_to_the_optimizer():
    _, v, x = case((4, 3, 5), True)
    assert v.batched(x).shape == (12, 5)
    assert v.batched(x[0, 0]).shape == (1, 5)
    assert v.batched(x[:0]).shape == v.batched(x[:, :0]).shape == (0, 5)  # no samples: nobody's statistics, no error
    assert close(v.second_moment(v.batched(x)), v.second_moment(x) / 3)
    image = view(nn.Conv2d(2, 3, 3))
    assert image.batched(torch.zeros(2, 6, 5)).shape == (1, 2, 6, 5)
    assert image.batched(torch.zeros(0, 2, 6, 5)).shape == (0, 2, 6, 5)


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv1d(5, 4, 1), nn.ConvTranspose1d(5, 4, 1)])
def test_a_call_shows_input_and_output_however_it_is_made(layer):
    part, x = parts(layer)[0], torch.randn(2, 5, 5)
    h = layer(x)
    for args, kwargs in (((x,), {}), ((), {"input": x})):
        call = part.call(layer, args, kwargs, h)
        assert call.x is x
        assert call.h is h
        assert call.shows_h
    for args, kwargs, output in (((), {}, h), ((3,), {}, h), ((x,), {}, (h,)), ((), {"input": None}, h)):
        assert part.call(layer, args, kwargs, output) is None


class PlainSubclass(nn.Linear):
    pass


class LoudSubclass(nn.Linear):
    def forward(self, x):
        return super().forward(x).exp()


def test_subclass_that_keeps_the_forward_is_a_linear_layer():
    assert view(PlainSubclass(3, 2)).d_in == 4


@pytest.mark.parametrize("module", [nn.LayerNorm(3), nn.Bilinear(2, 3, 4), nn.Sequential(nn.Linear(2, 2)), nn.ReLU()])
def test_other_layers_are_refused_by_name(module):
    with pytest.raises(UnsupportedLayer, match=rf"{type(module).__name__}.*fallback") as caught:
        view(module)
    assert isinstance(caught.value, TypeError)


def test_layers_that_are_not_linear_in_their_own_weight_are_refused():
    with pytest.raises(UnsupportedLayer, match="LoudSubclass replaces the forward"):
        view(LoudSubclass(3, 2))
    patched = nn.Linear(3, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(UnsupportedLayer, match="replaces the forward"):
        view(patched)
    with pytest.raises(UnsupportedLayer, match="computes its weight"):
        view(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(UnsupportedLayer, match="run one forward"):
        view(nn.LazyLinear(2))


@pytest.mark.parametrize("bad", [torch.zeros(5), torch.zeros(7, 6), torch.zeros(0, 5), torch.zeros(2, 0, 5)])
def test_bad_shapes_are_refused_with_the_shape(bad):
    _, v, _ = case((7, 5), True)
    for method in (v.patches, v.mean_input, v.second_moment):
        with pytest.raises(ValueError, match=rf"\({', '.join(map(str, bad.shape))},?\).*\[N, \.\.\., 5\]"):
            method(bad)


@pytest.mark.parametrize("bad", [torch.zeros(7, 5, dtype=torch.long), torch.zeros(7, 5, dtype=torch.complex64), [1.0]])
def test_bad_types_are_refused(bad):
    _, v, _ = case((7, 5), True)
    with pytest.raises(TypeError, match="floating-point"):
        v.patches(bad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer, v, x: v.activation_action(x, [1.0]), "layer's vector v must be .* tensor, not list"),
        (lambda layer, v, x: v.from_matrix(None), "matrix W .* not NoneType"),
        (lambda layer, v, x: v.to_matrix(None, layer.bias), "weight .* not NoneType"),
        (lambda layer, v, x: v.to_matrix(layer.weight, [1.0]), "bias .* not list"),
    ],
)
def test_what_is_no_tensor_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call(*case((7, 5), True))


def test_wrong_matrices_and_vectors_are_refused():
    layer, v, x = case((7, 5), True)
    with pytest.raises(ValueError, match="last entry belongs to the bias"):
        v.activation_action(x, torch.zeros(1, 5, dtype=F64))
    with pytest.raises(ValueError, match=r"\[groups, d_out, d_in\] = \(1, 4, 6\)"):
        v.from_matrix(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="has a bias but None"):
        v.to_matrix(layer.weight, None)
    with pytest.raises(ValueError, match=r"\(5, 4\)"):
        v.to_matrix(layer.weight.mT, layer.bias)
    with pytest.raises(ValueError, match="bias has shape"):
        v.to_matrix(layer.weight, torch.zeros(3))
    with pytest.raises(ValueError, match="no bias but one"):
        view(nn.Linear(5, 4, bias=False)).to_matrix(layer.weight, layer.bias)

"""`layers.EmbeddingView`: counting against one-hot vectors, one-hot vectors against the layer itself."""

import pytest
import torch
from torch import nn

from kfqn_core.layers import EmbeddingView, UnsupportedLayer, view
from kfqn_core.truth import exact
from kfqn_core.truth.ladder import rungs, structured_hessian

# PyTorch's own: it compiles a derivative with a deprecated tool.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
F64 = torch.float64
SHAPES = [(6,), (6, 4), (3, 2, 4)]


def case(shape=(6, 4), padding=None, dtype=F64) -> tuple[nn.Embedding, EmbeddingView, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Embedding(7, 3, padding_idx=padding, dtype=dtype)
    return layer, view(layer), torch.randint(7, shape)


def close(actual, expected, tolerance=1e-14):
    """A few float64 roundings: counts are exact."""
    return actual.shape == expected.shape and bool((actual - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [None, 2, -1])
def test_layer_is_the_matrix_times_one_hot_vectors(shape, padding):
    layer, v, x = case(shape, padding)
    a, W = v.patches(x), v.to_matrix(layer.weight, None)
    T = x[0].numel()
    assert a.shape == (shape[0], 1, T, 7)
    assert (v.groups, v.d_in, v.d_out, v.has_bias) == (1, 7, 3, False)
    assert torch.equal(a @ W.mT, v.outputs(layer(x)))  # the padding row is zero
    weight, bias = v.from_matrix(W)
    assert torch.equal(weight, layer.weight)
    assert bias is None
    assert weight.data_ptr() == layer.weight.data_ptr()  # views


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [None, 2])
def test_statistics_are_those_of_the_one_hot_vectors(shape, padding):
    layer, v, x = case(shape, padding)
    x.view(-1)[1] = 2  # there is some padding
    a, probe, probes = v.patches(x), torch.randn(1, 7, dtype=F64), torch.randn(1, 7, 3, dtype=F64)
    A = torch.einsum("ngti,ngtj->gij", a, a) / len(x)  # mean over samples, sum over locations
    assert close(v.second_moment(x), A)
    assert close(torch.diag_embed(v.diagonal(x)), A)  # diagonal_only
    assert EmbeddingView.diagonal_only
    assert close(v.activation_action(x, probe), (A @ probe[..., None])[..., 0])
    assert close(v.activation_action(x, probes), A @ probes)
    assert close(v.mean_input(x), a.mean(dim=(0, 2)))
    assert close(v.sum_output(layer(x)), v.outputs(layer(x)).sum(dim=(0, 2)))
    assert (v.diagonal(x)[0, 2] == 0) == (padding == 2)
    assert v.mean_input(x.int()).equal(v.mean_input(x))


@pytest.mark.parametrize("padding", [None, 2])
def test_gradients_go_through_the_same_door(padding):
    """rows_of the gradient is the mean of g a^T; zero for padding, whatever its row holds."""
    layer, v, x = case((6, 4), padding)
    x[0, 0] = 2
    nn.init.normal_(layer.weight)  # the padding row too
    h = layer(x)
    h.retain_grad()
    h.sin().sum().div(len(x)).backward()
    g = v.outputs(h.grad * len(x))
    expected = torch.einsum("ngto,ngti->goi", g, v.patches(x)) / len(x)
    assert close(v.to_matrix(layer.weight.grad, None), expected)


class Sequence(nn.Module):
    """Locations meet, and not linearly."""

    def __init__(self, layer):
        super().__init__()
        self.table, self.last = layer, nn.Linear(3, 2, dtype=F64)

    def forward(self, x):
        return self.last(self.table(x).tanh().mean(1).exp())


def wave(z, y):
    """Neither convex nor a likelihood."""
    return (z * y).sin().sum(1).mean()


def relative(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def test_structured_hessian_is_the_exact_one():
    layer, _, x = case((5, 4))
    model, y = Sequence(layer), torch.randn(5, 2, dtype=F64)
    H = exact.layer_hessian(model, wave, x, y, "table")
    assert H.shape == (21, 21)
    assert relative(structured_hessian(model, wave, x, y, "table"), H) < 1e-13
    assert rungs(model, wave, x, y, layer)["homogeneity"].error > 0.1  # no rounding: the rungs below are other matrices
    order = torch.arange(21).reshape(7, 3).reshape(-1)  # vec of W [3, 7] is the weight [7, 3] as it is stored
    assert relative(exact.network_hessian(model, wave, x, y)[:21, :21], H[order][:, order]) < 1e-13


def test_of_the_padding_row_there_is_no_curvature():
    """It does not train, and neither row nor column of the block is its; between the others nothing changes."""
    layer, _, x = case((5, 4), padding=2)
    x[:, 0] = 2
    model, y = Sequence(layer), torch.randn(5, 2, dtype=F64)
    H, network = exact.layer_hessian(model, wave, x, y, "table"), exact.network_hessian(model, wave, x, y)
    assert relative(structured_hessian(model, wave, x, y, "table"), H) < 1e-13
    for each in (H, network):
        assert relative(each, each.mT) < 1e-13  # autograd by itself forgets the row and keeps the column
        assert each[6:9].count_nonzero() == each[:, 6:9].count_nonzero() == 0
    layer.padding_idx = None
    others = torch.arange(21).reshape(7, 3)[[j for j in range(7) if j != 2]].reshape(-1)
    unpadded = exact.layer_hessian(model, wave, x, y, "table")
    assert relative(H[others][:, others], unpadded[others][:, others]) < 1e-13
    assert unpadded[6:9].count_nonzero() > 0


def test_half_precision_is_raised_and_counts_are_exact():
    for dtype in (torch.bfloat16, torch.float16):
        layer, v, x = case((40_000,), dtype=dtype)  # counts in bfloat16 end at 256
        for statistic in (v.mean_input(x), v.second_moment(x), v.sum_output(layer(x)), v.diagonal(x)):
            assert statistic.dtype == torch.float32
        counts = torch.bincount(x, minlength=7).double()[None]
        assert close(v.mean_input(x).double(), counts / len(x), 1e-7)  # one rounding to float32
        h = layer(x)
        assert close(v.sum_output(h).double(), v.sum_output(h.double()), 1e-5)  # float32 sums of 40,000 terms
        assert v.activation_action(x, torch.ones(1, 7, dtype=F64)).dtype == F64


def test_many_of_one_index_are_counted_one_by_one():
    """Ones added up in float32 end at 2^24 of them."""
    _, v, _ = case(dtype=torch.float32)
    x = torch.full((2**24 + 2**20,), 3)
    assert v.mean_input(x)[0, 3] == 1


def test_nothing_is_read_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # any .item() or bool(tensor) raises here
        layer = nn.Embedding(7, 3, padding_idx=1)
        v, x = view(layer), torch.zeros(6, 4, dtype=torch.long)
        assert v.activation_action(x, v.mean_input(x)).shape == v.diagonal(x).shape == (1, 7)
        assert v.second_moment(x).shape == (1, 7, 7)
        assert v.sum_output(layer(x)).shape == (1, 3)
        v.from_matrix(v.to_matrix(layer.weight, None))


def test_every_index_is_a_sample_to_the_optimizer():
    layer, v, x = case((6, 4))
    assert torch.equal(v.batched(x), x.reshape(-1))
    assert v.batched(torch.tensor(3)).shape == (1,)
    assert v.batched(x[:0]).shape == (0,)
    assert v.batched(layer(x)).shape == (24, 3)  # outputs as well
    assert close(v.diagonal(v.batched(x)), v.diagonal(x) / 4)


@pytest.mark.parametrize("option", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_that_are_no_matrix_are_refused(option):
    with pytest.raises(UnsupportedLayer, match=rf"Embedding with {next(iter(option))}.*fallback"):
        view(nn.Embedding(7, 3, **option))


def test_bad_input_is_refused():
    _, v, x = case()
    for bad in (torch.zeros(0, 4, dtype=torch.long), torch.tensor(3)):
        with pytest.raises(ValueError, match=r"\[N, \.\.\.\] with at least one sample"):
            v.mean_input(bad)
    for bad in (torch.zeros(6, 4), [1]):
        with pytest.raises(TypeError, match="tensor of indices"):
            v.mean_input(bad)
    with pytest.raises(ValueError, match=r"\[groups, d_in\] = \(1, 7\)"):
        v.activation_action(x, torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"output has shape \(6, 4\)"):
        v.outputs(torch.zeros(6, 4))

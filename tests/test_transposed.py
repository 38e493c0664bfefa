"""`layers.TransposedConvView` on hundreds of randomly drawn layers: against the Jacobian of the layer's output in its
weight, which knows nothing of patches, and its structured Hessian against the exact one."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacfwd

from kfqn_core.layers import TransposedConvView, UnsupportedLayer, parts, view
from kfqn_core.truth import exact
from kfqn_core.truth.ladder import structured_hessian
from tests.measures import LargestTensor, relative

F64 = torch.float64
KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# PyTorch's own: it compiles a derivative with a deprecated tool.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
many = settings(derandomize=True, deadline=None, database=None)


@dataclass(frozen=True)
class Drawn:
    """A layer and the size of its input; the seed fixes the numbers in both."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    inputs: int  # channels per group
    outputs: int  # channels per group
    bias: bool
    samples: int
    sizes: tuple[int, ...]
    seed: int

    @property
    def options(self) -> set[str]:
        """What this layer exercises, by name."""
        return {
            f"{len(self.kernel)}-d",
            "bias" if self.bias else "no bias",
            *(["stride"] if max(self.stride) > 1 else []),
            *(
                ["stride beyond the kernel"]
                if any(s > k for s, k in zip(self.stride, self.kernel, strict=True))
                else []
            ),
            *(["padding"] if any(self.padding) else []),
            *(["output padding"] if any(self.output_padding) else []),
            *(["dilation"] if max(self.dilation) > 1 else []),
            *(["groups"] if self.groups > 1 else []),
            *(["axes differ"] if len(set(zip(self.kernel, self.stride, self.dilation, strict=True))) > 1 else []),
        }

    def make(self) -> tuple[nn.Module, TransposedConvView, Tensor]:
        torch.manual_seed(self.seed)
        layer = KINDS[len(self.kernel)](
            self.groups * self.inputs,
            self.groups * self.outputs,
            self.kernel,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.bias,
            self.dilation,
            dtype=F64,
        )
        x = torch.randn(self.samples, self.groups * self.inputs, *self.sizes, dtype=F64)
        return layer, view(layer), x


@st.composite
def drawn_layers(draw, small: bool = False) -> Drawn:
    """Any layer that PyTorch accepts; `small` ones have few weights and few outputs, so that Hessians are cheap."""

    def per_axis(*values: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(rank))

    rank = draw(st.sampled_from((2, 1) if small else (2, 3, 1)))
    kernel, stride = per_axis(2, 3, 1), per_axis(2, 1, 3)
    dilation, padding = per_axis(1, 2), per_axis(1, 0, 2)
    output_padding = tuple(
        draw(st.sampled_from(range(max(s, d)))) for s, d in zip(stride, dilation, strict=True)
    )  # PyTorch wants it smaller than the one or the other
    groups, inputs, outputs = draw(st.sampled_from(((2, 1, 2), (2, 2, 1), (1, 2, 2), (1, 1, 1), (1, 3, 2), (3, 1, 1))))
    sizes = []
    for axis in zip(kernel, stride, padding, output_padding, dilation, strict=True):
        k, s, p, o, d = axis
        size = 1
        while (size - 1) * s - 2 * p + d * (k - 1) + o + 1 < 1:
            size += 1
        sizes.append(size + draw(st.sampled_from((1, 0) if small else (2, 1, 0))))
    return Drawn(
        kernel,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        inputs,
        outputs,
        bias=draw(st.booleans()),
        samples=draw(st.sampled_from((2, 1, 3))),
        sizes=tuple(sizes),
        seed=draw(st.integers(0, 10_000)),
    )


def jacobians(layer: nn.Module, v: TransposedConvView, x: Tensor) -> Tensor:
    """Derivatives of the layer's output in `[W | b]`, `[N, groups, d_out, T, groups, d_out, d_in]`.

    The weight is `[groups * c, d_out, *kernel]`: its inputs stand before its outputs.
    """
    N, groups, d_out = len(x), v.groups, v.d_out
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    J = jacfwd(lambda p: functional_call(layer, p, (x,)))(parameters)
    K = layer.weight[0, 0].numel()
    of_weight = J["weight"].reshape(N, groups, d_out, -1, groups, layer.in_channels // groups, d_out, K)
    pieces = [of_weight.transpose(5, 6).flatten(6)]
    if "bias" in J:
        pieces.append(J["bias"].reshape(N, groups, d_out, -1, groups, d_out, 1))
    return torch.cat(pieces, dim=-1)


def test_patches_and_statistics_of_random_layers():
    seen: Counter[str] = Counter()
    layers_seen: set[Drawn] = set()

    @settings(many, max_examples=400)
    @given(drawn_layers())
    def check(drawn: Drawn) -> None:
        layer, v, x = drawn.make()
        seen.update(drawn.options)
        layers_seen.add(drawn)
        J = jacobians(layer, v, x)
        # One patch stands in the Jacobian once for each output of its group, and nothing else does.
        a = J[:, :, 0, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        groups, outputs = torch.eye(v.groups, dtype=F64), torch.eye(v.d_out, dtype=F64)
        assert relative(torch.einsum("ngti,gG,oO->ngotGOi", a, groups, outputs), J) < 1e-13
        assert v.locations(x) == a.shape[2]
        assert torch.equal(v.patches(x), a)  # copies of entries of x, zeros and ones

        h, W = layer(x), v.to_matrix(layer.weight, layer.bias)
        assert relative(a @ W.mT, v.outputs(h)) < 1e-12
        probe, probes = torch.randn(v.groups, v.d_in, dtype=F64), torch.randn(v.groups, v.d_in, 3, dtype=F64)
        A = torch.einsum("ngti,ngtj->gij", a, a) / len(x)
        assert relative(v.second_moment(x), A) < 1e-12
        assert relative(v.activation_action(x, probe), torch.einsum("gij,gj->gi", A, probe)) < 1e-12
        assert relative(v.activation_action(x, probes), A @ probes) < 1e-12
        assert relative(v.mean_input(x), a.mean(dim=(0, 2))) < 1e-12
        assert relative(v.diagonal(x), A.diagonal(dim1=1, dim2=2)) < 1e-12
        assert relative(v.sum_output(h), (a @ W.mT).sum(dim=(0, 2))) < 1e-12

        weight, bias = v.from_matrix(W)
        assert torch.equal(weight, layer.weight)
        assert torch.equal(bias, layer.bias) if drawn.bias else bias is None

    check()
    options = {"1-d", "2-d", "3-d", "bias", "no bias", "stride", "stride beyond the kernel", "padding"}
    options |= {"output padding", "dilation", "groups", "axes differ"}
    assert len(layers_seen) >= 200
    assert {option: n for option in options if (n := seen[option]) < 10} == {}


def wave(z, y):
    """Neither convex nor a likelihood."""
    return (z * y).sin().sum(1).mean()


def network(layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The layer, and behind it something in which all locations and all groups meet; with targets."""
    features = layer(x)[0].numel()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3, dtype=F64))
    return model, torch.randn(len(x), 3, dtype=F64)


def test_structured_hessian_of_random_layers():
    layers_seen: set[Drawn] = set()

    @settings(many, max_examples=60)
    @given(drawn_layers(small=True))
    def check(drawn: Drawn) -> None:
        layer, _, x = drawn.make()
        model, y = network(layer, x)
        layers_seen.add(drawn)
        expected = exact.layer_hessian(model, wave, x, y, layer)
        assert relative(structured_hessian(model, wave, x, y, layer), expected) < 1e-10  # observed below 1e-14

    check()
    assert len(layers_seen) >= 40


def example(dtype: torch.dtype = F64, bias: bool = True) -> tuple[nn.ConvTranspose2d, TransposedConvView, Tensor]:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2, bias=bias, dilation=(2, 1), dtype=dtype)
    return layer, view(layer), torch.randn(5, 4, 6, 5, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_go_through_the_same_door(bias):
    """to_matrix of the gradients is the gradient in [W | b]: mean over samples of sum_t g_t a_t^T, for each group."""
    layer, v, x = example(bias=bias)
    h = layer(x)
    h.retain_grad()
    h.sin().sum().div(len(x)).backward()
    g = v.outputs(h.grad * len(x))  # per sample, not divided by the batch
    expected = torch.einsum("ngto,ngti->goi", g, v.patches(x)) / len(x)
    gradient = v.to_matrix(layer.weight.grad, layer.bias.grad if bias else None)
    assert relative(gradient, expected) < 1e-13  # a few dozen float64 roundings


def test_statistics_need_no_patches_and_no_zeros_between():
    layer, v, x = example()
    scores = len(x) * v.groups * v.locations(x)  # one number per location and group: less than the layer's own output
    assert v.patches(x).numel() > 5 * scores
    assert scores < layer(x).numel()
    probe = torch.ones(2, v.d_in, dtype=F64)
    for method in (lambda: v.activation_action(x, probe), lambda: v.mean_input(x), lambda: v.diagonal(x)):
        with LargestTensor() as largest:
            method()
        assert 0 < largest.entries <= max(scores, x.numel())


def test_half_precision_is_raised_before_it_is_summed():
    layer, v, x = example(torch.bfloat16)
    layer, probe = layer.float(), torch.randn(2, v.d_in)
    for statistic in (v.mean_input, v.second_moment, v.diagonal, lambda x: v.activation_action(x, probe)):
        actual = statistic(x)
        assert actual.dtype == torch.float32
        assert relative(actual.double(), statistic(x.double())) < 1e-6  # float32 sums; bfloat16 ones would miss by 1e-2
    large = 1000 * layer(x.float()).half()  # the sums are beyond float16, which ends at 65504
    assert relative(v.sum_output(large).double(), v.sum_output(large.double())) < 1e-6


def test_nothing_is_read_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # any .item() or bool(tensor) raises here
        layer, v, x = example()
        assert v.activation_action(x, v.mean_input(x)).shape == v.diagonal(x).shape == (2, 13)
        assert v.second_moment(x).shape == (2, 13, 13)
        assert v.sum_output(layer(x)).shape == (2, 3)
        v.from_matrix(v.to_matrix(layer.weight, layer.bias))


def test_unbatched_inputs_are_a_batch_of_one():
    layer, v, x = example()
    assert v.batched(x[0]).shape == (1, *x.shape[1:])
    assert v.batched(x) is x
    assert v.batched(x[:0]).shape == x[:0].shape  # nobody's statistics, but no error either
    assert relative(v.outputs(v.batched(layer(x[0]))), v.outputs(layer(x[:1]))) < 1e-14


@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_call_of_another_output_size_shows_nothing(by_keyword):
    """Its locations are not those of the layer's own output padding."""
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1, dtype=F64)
    part, x = parts(layer)[0], torch.randn(2, 2, 4, 5, dtype=F64)
    T = part.view.locations(x)

    def call(**size):
        h = layer(x, **size)
        args = () if by_keyword else (x, *size.values())
        return part.call(layer, args, size | {"input": x} if by_keyword else {}, h)

    assert T == 8 * 10
    assert call().x is x
    assert call(output_size=[8, 10]).x is x
    assert call(output_size=None).x is x
    assert call(output_size=[7, 10]) is None
    assert call(output_size=torch.Size([2, 3, 8, 9])) is None


class Upsampling(nn.Module):
    """Asks for an output size that is not the layer's own."""

    def __init__(self):
        super().__init__()
        self.up, self.last = nn.ConvTranspose1d(2, 2, 3, stride=2), nn.Linear(2 * 10, 3)

    def forward(self, x):
        return self.last(self.up(input=x, output_size=[10]).tanh().flatten(1))


def test_a_call_of_another_output_size_has_a_block_but_shows_no_preactivation():
    torch.manual_seed(0)
    model, x, y = Upsampling().double(), torch.randn(2, 2, 4, dtype=F64), torch.randn(2, 3, dtype=F64)
    H = exact.layer_hessian(model, wave, x, y, "up")
    assert relative(H, H.mT) < 1e-13
    with pytest.raises(ValueError, match="'up' does not show its input and its pre-activation; layer_hessian"):
        structured_hessian(model, wave, x, y, "up")


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, 6, 5), torch.zeros(5, 3, 6, 5), torch.zeros(0, 4, 6, 5), torch.zeros(5, 4, 0, 5)]
)
def test_bad_shapes_are_refused_with_the_shape(bad):
    _, v, _ = example()
    for method in (v.patches, v.mean_input, v.second_moment, v.locations):
        with pytest.raises(
            ValueError, match=rf"\({', '.join(map(str, bad.shape))}\).*\[N, 4, at least 1, at least 1\]"
        ):
            method(bad)
    with pytest.raises(ValueError, match=r"output has shape \(5, 3, 2, 2\), but \[N, 6, "):
        v.outputs(torch.zeros(5, 3, 2, 2))
    with pytest.raises(TypeError, match="floating-point"):
        v.patches(torch.zeros(5, 4, 6, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "smallest"), [({}, 1), ({"padding": 2}, 3), ({"padding": 5, "stride": 3}, 4), ({"padding": 3}, 5)]
)
def test_inputs_too_small_for_the_layer_are_refused_and_the_smallest_is_accepted(options, smallest):
    layer = nn.ConvTranspose1d(2, 3, 2, dilation=2, dtype=F64, **options)
    v, probe = view(layer), torch.ones(1, 5, dtype=F64)
    x = torch.ones(1, 2, smallest, dtype=F64)
    assert v.patches(x).shape[2] == v.locations(x) == layer(x).shape[2]
    if smallest == 1:
        return
    for method in (v.patches, v.mean_input, v.second_moment, v.locations, lambda x: v.activation_action(x, probe)):
        with pytest.raises(ValueError, match=rf"\[N, 2, at least {smallest}\]"):
            method(x[:, :, 1:])
    with pytest.raises(RuntimeError):  # PyTorch refuses it too
        layer(x[:, :, 1:])


class LoudTransposed(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x).exp()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (LoudTransposed(3, 2, 3), "LoudTransposed replaces the forward of nn.ConvTranspose2d"),
        (nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(3, 2, 3)), "computes its weight"),
        (nn.LazyConvTranspose3d(2, 3), "run one forward"),
    ],
)
def test_transposed_convolutions_of_another_kind_are_refused_by_name(layer, reason):
    with pytest.raises(UnsupportedLayer, match=reason):
        view(layer)

"""`layers.ConvView` on hundreds of randomly drawn layers: against the Jacobian of the layer's output in its weight,
which knows nothing of patches, and its structured Hessian against the exact one."""

import importlib
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacfwd
from torch.utils._python_dispatch import TorchDispatchMode

from kfqn_core.layers import ConvView, UnsupportedLayer, view
from kfqn_core.truth import exact
from kfqn_core.truth.ladder import structured_hessian
from tests.measures import LargestTensor, relative

F64 = torch.float64
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ("zeros", "reflect", "replicate", "circular")
pytestmark = [
    # PyTorch's own: it may copy the input of such a layer, and it compiles a derivative with a deprecated tool.
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]
many = settings(derandomize=True, deadline=None, database=None)


@dataclass(frozen=True)
class Drawn:
    """A layer and the size of its input; the seed fixes the numbers in both."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    mode: str
    groups: int
    inputs: int  # channels per group
    outputs: int  # channels per group
    bias: bool
    samples: int
    sizes: tuple[int, ...]
    seed: int

    @property
    def reach(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def options(self) -> set[str]:
        """What this layer exercises, by name."""
        kind = self.padding if isinstance(self.padding, str) else "numbers" if any(self.padding) else "none"
        depthwise = self.groups > 1 and self.inputs == 1
        return {
            f"{len(self.kernel)}-d",
            f"padding {kind}",
            f"{self.mode} in use" if kind in ("numbers", "same") else "no padding mode",
            "bias" if self.bias else "no bias",
            *(["stride"] if max(self.stride) > 1 else []),
            *(["dilation"] if any(r >= k > 1 for r, k in zip(self.reach, self.kernel, strict=True)) else []),
            *(["groups"] if self.groups > 1 else []),
            *(["depthwise with multiplier"] if depthwise and self.outputs > 1 else []),
            *(["uneven sides of same"] if kind == "same" and any(r % 2 for r in self.reach) else []),
            *(["axes differ"] if len(set(zip(self.kernel, self.stride, self.dilation, strict=True))) > 1 else []),
        }

    def make(self) -> tuple[nn.Module, ConvView, Tensor]:
        torch.manual_seed(self.seed)
        layer = CONVOLUTIONS[len(self.kernel)](
            self.groups * self.inputs,
            self.groups * self.outputs,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.mode,
            dtype=F64,
        )
        x = torch.randn(self.samples, self.groups * self.inputs, *self.sizes, dtype=F64)
        return layer, view(layer), x


@st.composite
def drawn_layers(draw, small: bool = False) -> Drawn:
    """Any layer that PyTorch accepts; `small` ones have few weights and few outputs, so that Hessians are cheap."""

    def per_axis(*values: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(rank))

    # Hypothesis prefers the first of several values, so the more telling ones stand first.
    rank = draw(st.sampled_from((2, 3, 1)))
    kernel = per_axis(2, 1) if small and rank == 3 else per_axis(3, 2, 1)
    dilation = per_axis(1, 2) if small else per_axis(2, 1, 3)
    kind = draw(st.sampled_from(("numbers", "same", "none", "valid")))
    stride = (1,) * rank if kind == "same" else per_axis(1, 2) if small else per_axis(2, 1, 3)
    numbers = per_axis(1, 2, 0) if kind == "numbers" else (0,) * rank
    padding = kind if kind in ("same", "valid") else numbers
    mode = draw(st.sampled_from(MODES))
    channels = ((2, 1, 2), (1, 2, 2), (2, 2, 1), (2, 1, 1), (1, 1, 1), (1, 3, 2), (3, 1, 2), (2, 2, 2))
    groups, inputs, outputs = draw(st.sampled_from(channels[:-1] if small else channels))

    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if kind == "same":
        sides, fits = [(r + 1) // 2 for r in reach], [1] * rank
    else:
        sides, fits = list(numbers), [r + 1 - 2 * p for r, p in zip(reach, numbers, strict=True)]
    source = {"reflect": 1, "circular": 0}.get(mode, -max(sides))  # what a padding copies must be there
    smallest = [max(1, side + source, least) for side, least in zip(sides, fits, strict=True)]
    more = (1, 0) if small and rank == 3 else (2, 1, 0) if small or rank == 3 else (3, 4, 2, 1, 0)
    sizes = tuple(least + draw(st.sampled_from(more)) for least in smallest)
    return Drawn(
        kernel,
        stride,
        dilation,
        padding,
        mode,
        groups,
        inputs,
        outputs,
        bias=draw(st.booleans()),
        samples=draw(st.sampled_from((1, 2, 3))),
        sizes=sizes,
        seed=draw(st.integers(0, 10_000)),
    )


def jacobians(layer: nn.Module, x: Tensor) -> Tensor:
    """Derivatives of the layer's output in its weight (and bias), `[N, groups, d_out, T, groups, d_out, d_in]`."""
    samples, groups, outputs = len(x), layer.groups, layer.out_channels // layer.groups
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    J = jacfwd(lambda p: functional_call(layer, p, (x,)))(parameters)
    pieces = [
        J[name].reshape(samples, groups, outputs, -1, groups, outputs, p[0].numel()) for name, p in parameters.items()
    ]
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
        J = jacobians(layer, x)
        # One patch stands in the Jacobian once for each output of its group, and nothing else does.
        a = J[:, :, 0, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        groups, outputs = torch.eye(v.groups, dtype=F64), torch.eye(v.d_out, dtype=F64)
        assert relative(torch.einsum("ngti,gG,oO->ngotGOi", a, groups, outputs), J) < 1e-13
        assert v.locations(x) == a.shape[2]
        assert relative(v.patches(x), a) < 1e-13

        h, W = layer(x), v.to_matrix(layer.weight, layer.bias)
        assert relative(a @ W.mT, v.outputs(h)) < 1e-12
        probe = torch.randn(v.groups, v.d_in, dtype=F64)
        A = torch.einsum("ngti,ngtj->gij", a, a) / len(x)
        assert relative(v.second_moment(x), A) < 1e-12
        assert relative(v.activation_action(x, probe), torch.einsum("gij,gj->gi", A, probe)) < 1e-12
        assert relative(v.mean_input(x), a.mean(dim=(0, 2))) < 1e-12
        assert relative(v.sum_output(h), (a @ W.mT).sum(dim=(0, 2))) < 1e-12

        weight, bias = v.from_matrix(W)
        assert torch.equal(weight, layer.weight)
        assert torch.equal(bias, layer.bias) if drawn.bias else bias is None

    check()
    options = set().union(*({f"{d}-d", f"{m} in use"} for d in (1, 2, 3) for m in MODES))
    options |= {"padding none", "padding numbers", "padding same", "padding valid", "bias", "no bias", "stride"}
    options |= {"dilation", "groups", "depthwise with multiplier", "uneven sides of same", "axes differ"}
    assert len(layers_seen) >= 200
    assert {option: n for option in options if (n := seen[option]) < 10} == {}


def wave(z, y):
    """Neither convex nor a likelihood."""
    return (z * y).sin().sum(1).mean()


def square(z, y):
    return 0.5 * (z - y).square().sum(1).mean()


def cross_entropy(z, y):
    return nn.functional.cross_entropy(z, y.softmax(1))


def network(layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The layer, and behind it something in which all locations and all groups meet; with targets."""
    features = layer(x)[0].numel()
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3, dtype=F64)), torch.randn(
        len(x), 3, dtype=F64
    )


def test_structured_hessian_of_random_layers():
    seen: Counter[str] = Counter()
    layers_seen: set[Drawn] = set()

    @settings(many, max_examples=300)
    @given(drawn_layers(small=True), st.sampled_from((cross_entropy, square, wave)))
    def check(drawn: Drawn, loss_fn) -> None:
        layer, _, x = drawn.make()
        model, y = network(layer, x)
        seen.update({*drawn.options, loss_fn.__name__})
        layers_seen.add(drawn)
        expected = exact.layer_hessian(model, loss_fn, x, y, layer)
        assert relative(structured_hessian(model, loss_fn, x, y, layer), expected) < 1e-10  # observed below 1e-14

    check()
    assert len(layers_seen) >= 200
    assert min(seen[loss] for loss in ("cross_entropy", "square", "wave")) >= 10
    assert min(seen[option] for option in ("groups", "stride", "dilation", "3-d", "no bias")) >= 10


def example(dtype: torch.dtype = F64) -> tuple[nn.Conv2d, ConvView, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, dtype=dtype)
    return layer, view(layer), torch.randn(5, 4, 9, 7, dtype=dtype)


def statistics(v: ConvView, x: Tensor, probe: Tensor) -> dict[str, Tensor]:
    actions = {"action": v.activation_action(x, probe), "mean": v.mean_input(x)}
    return actions | {"A": v.second_moment(x), "patches": v.patches(x)}


def test_groups_and_locations_that_meet_need_the_terms_between_them():
    """Neither is a rounding: the test above is not passed by a sum over single groups or single locations."""
    layer, v, x = example()
    model, y = network(layer, x)
    H = exact.layer_hessian(model, wave, x, y, layer)
    size = len(H) // 2
    groups = torch.block_diag(H[:size, :size], H[size:, size:])
    assert relative(groups, H) > 0.1
    G = exact.preactivation_hessians(model, wave, x, y, layer)[:, :3, :, :3]
    a = v.patches(x)[:, 0]
    same_location = torch.einsum("nti,notpt,ntj->iojp", a, G, a).reshape(size, size) / len(x)
    assert relative(same_location, H[:size, :size]) > 0.1


def calls(method):
    """The names of the operations that `method` runs."""
    names = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Log():
        method()
    return names


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "arguments", "sizes"),
    [
        (nn.Conv1d, {"kernel_size": 3, "padding": 1}, (7,)),
        (nn.Conv1d, {"kernel_size": 4, "padding": "same", "dilation": 3}, (11,)),  # uneven sides
        (nn.Conv2d, {"kernel_size": (3, 2), "padding": (2, 0), "dilation": (1, 2)}, (6, 5)),
        (nn.Conv2d, {"kernel_size": (2, 3), "padding": (0, 1), "groups": 2}, (4, 5)),
        (nn.Conv3d, {"kernel_size": (1, 3, 2), "padding": (0, 1, 1), "bias": False}, (3, 4, 5)),
    ],
)
def test_products_and_shifts_are_the_convolutions(kind, arguments, sizes, mode):
    """Few kernel positions, one vector: matrix products in place of convolutions with one filter, and the same A v."""
    torch.manual_seed(0)
    layer = kind(16, 4, padding_mode=mode, dtype=F64, **arguments)
    v, x = view(layer), torch.randn(3, 16, *sizes, dtype=F64)
    probe = torch.randn(v.groups, v.d_in, dtype=F64)
    by_shifts, by_convolutions = (
        calls(lambda p=p: v.activation_action(x, p)) for p in (probe, torch.stack([probe] * 2, -1))
    )
    assert "convolution" not in by_shifts
    assert "convolution" in by_convolutions
    patches = v.patches(x)
    A = torch.einsum("ngti,ngtj->gij", patches, patches) / len(x)
    assert relative(v.activation_action(x, probe), torch.einsum("gij,gj->gi", A, probe)) < 1e-13
    assert (
        relative(v.activation_action(x, torch.stack([probe, -probe], -1))[..., 1], -(A @ probe[..., None])[..., 0])
        < 1e-13
    )


@pytest.mark.parametrize("arguments", [{}, {"bias": False, "stride": 2}, {"groups": 2, "stride": (1, 3)}], ids=str)
def test_a_kernel_of_one_position_takes_pixels_for_patches(arguments):
    """No convolution for the mean input, `A v` of one vector or of several; and all are those of the patches."""
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 1, dtype=F64, **arguments)
    v, x = view(layer), torch.randn(3, 6, 5, 4, dtype=F64)
    patches = v.patches(x)
    A = torch.einsum("ngti,ngtj->gij", patches, patches) / len(x)
    probes = torch.randn(v.groups, v.d_in, 3, dtype=F64)
    assert not any("convolution" in name for name in calls(lambda: (v.mean_input(x), v.activation_action(x, probes))))
    assert relative(v.mean_input(x), patches.mean((0, 2))) < 1e-13
    assert relative(v.activation_action(x, probes), A @ probes) < 1e-13
    assert relative(v.activation_action(x, probes[..., 0]), (A @ probes)[..., 0]) < 1e-13


def test_gradients_go_through_the_same_door():
    """to_matrix of the gradients is the gradient in [W | b]: mean over samples of sum_t g_t a_t^T, for each group."""
    layer, v, x = example()
    h = layer(x)
    h.retain_grad()
    h.sin().sum().div(len(x)).backward()
    g = v.outputs(h.grad * len(x))  # per sample, not divided by the batch
    expected = torch.einsum("ngto,ngti->goi", g, v.patches(x)) / len(x)
    assert relative(v.to_matrix(layer.weight.grad, layer.bias.grad), expected) < 1e-13


def test_memory_layout_of_the_input_does_not_matter():
    layer, v, x = example()
    probe = torch.randn(2, v.d_in, dtype=F64)
    expected = statistics(v, x, probe)
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.mT.contiguous().mT,
        x.repeat_interleave(2, dim=0)[::2],
    ):
        assert not other.is_contiguous()
        actual = statistics(v, other, probe)
        assert all(relative(actual[name], expected[name]) < 1e-13 for name in expected)
    h = layer(x)
    assert torch.equal(v.outputs(h.contiguous(memory_format=torch.channels_last)), v.outputs(h))


def test_half_precision_is_raised_before_it_is_summed():
    layer, v, x = example(torch.bfloat16)
    layer, probe = layer.float(), torch.randn(2, v.d_in)
    actual, expected = statistics(v, x, probe), statistics(v, x.double(), probe.double())
    assert actual.pop("patches").dtype == torch.bfloat16
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert relative(value.double(), expected[name]) < 1e-6  # float32 sums; bfloat16 ones would miss by 1e-2
    assert v.activation_action(x.float(), probe.double()).dtype == F64
    assert relative(v.diagonal(x).double(), v.diagonal(x.double())) < 1e-6
    large = 1000 * layer(x.float()).half()  # the sums are beyond float16, which ends at 65504
    assert relative(v.sum_output(large).double(), v.sum_output(large.double())) < 1e-6


def test_nothing_is_read_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # any .item() or bool(tensor) raises here
        layer, v, x = example()
        for name, value in statistics(v, x, v.mean_input(x)).items():
            assert value.shape == {"A": (2, 13, 13), "patches": (5, 2, 45, 13)}.get(name, (2, 13))
        assert v.sum_output(layer(x)).shape == (2, 3)
        v.from_matrix(v.to_matrix(layer.weight, layer.bias))


def test_statistics_need_no_patches():
    _, v, x = example()
    padded = 5 * 4 * (9 + 2) * (7 + 4)
    assert v.patches(x).numel() > 2 * padded
    for method in (lambda: v.activation_action(x, torch.ones(2, v.d_in, dtype=F64)), lambda: v.mean_input(x)):
        with LargestTensor() as largest:
            method()
        assert 0 < largest.entries <= padded


def test_second_moment_forms_the_patches_of_few_samples_at_once(monkeypatch):
    _, v, x = example()
    expected, one_sample = v.second_moment(x), v.patches(x[:1]).numel()
    for allowed, samples in ((1, 1), (2 * one_sample, 2), (100 * one_sample, 5)):
        monkeypatch.setattr(importlib.import_module("kfqn_core.layers.view"), "PATCH_ENTRIES", allowed)
        with LargestTensor() as largest:
            actual = v.second_moment(x)
        assert largest.entries <= samples * one_sample
        assert relative(actual, expected) < 1e-14


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, 9, 7), torch.zeros(5, 3, 9, 7), torch.zeros(0, 4, 9, 7), torch.zeros(5, 4, 0, 7)]
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
        v.patches(torch.zeros(5, 4, 9, 7, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "smallest"),
    [
        ({}, 5),  # dilation 2 * (kernel 3 - 1) + 1
        ({"padding": 1}, 3),
        ({"padding": 3}, 1),
        ({"padding": 3, "padding_mode": "replicate"}, 1),
        ({"padding": 3, "padding_mode": "reflect"}, 4),  # the border itself is not repeated
        ({"padding": 3, "padding_mode": "circular"}, 3),
        ({"padding": "same", "padding_mode": "reflect"}, 3),
    ],
)
def test_inputs_too_small_for_the_layer_are_refused_and_the_smallest_is_accepted(options, smallest):
    layer = nn.Conv1d(2, 3, 3, dilation=2, dtype=F64, **options)
    v, probe = view(layer), torch.ones(1, 7, dtype=F64)
    x = torch.ones(1, 2, smallest, dtype=F64)
    assert v.patches(x).shape[2] == v.locations(x) == layer(x).shape[2]
    for method in (v.patches, v.mean_input, v.second_moment, v.locations, lambda x: v.activation_action(x, probe)):
        with pytest.raises(ValueError, match=rf"\[N, 2, at least {smallest}\]"):
            method(x[:, :, 1:])
    if smallest > 1:
        with pytest.raises(RuntimeError):  # PyTorch refuses it too
            layer(x[:, :, 1:])


class LoudConvolution(nn.Conv2d):
    def _conv_forward(self, *arguments):
        return super()._conv_forward(*arguments).exp()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (LoudConvolution(3, 2, 3), "LoudConvolution replaces the forward of nn.Conv2d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 2, 3)), "computes its weight from other parameters"),
        (nn.LazyConv3d(2, 3), "run one forward"),
    ],
)
def test_convolutions_of_another_kind_are_refused_by_name(layer, reason):
    with pytest.raises(UnsupportedLayer, match=reason):
        view(layer)


def test_hessians_of_images_too_large_are_refused_before_any_work_and_by_their_count():
    """Neither the 3,200,000,000 entries of G nor the 28 * 28 of the block, if so few are allowed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = torch.randn(2, 3, 200, 200, dtype=F64), torch.randn(2, 3, dtype=F64)
    model(x)
    with pytest.raises(ValueError, match=r"all samples.* 80000 x 40000 entries, 25,600,000,000 bytes.*smaller images"):
        structured_hessian(model, square, x, y, "0")
    with pytest.raises(ValueError, match=r"layer '0' has 28 x 28 entries"):
        exact.layer_hessian(model, square, x, y, "0", max_bytes=1000)
    with pytest.raises(ValueError, match=r"those it can be are '0', '3'"):
        exact.layer_hessian(model, square, x, y, "1.5")


def test_a_convolution_called_twice_has_a_block_but_no_single_preactivation():
    torch.manual_seed(0)
    layer = nn.Conv1d(2, 2, 3, padding=1)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)).double()
    x, y = torch.randn(2, 2, 5, dtype=F64), torch.randn(2, 3, dtype=F64)
    H, network_block = exact.layer_hessian(model, wave, x, y, layer), exact.network_hessian(model, wave, x, y)
    assert abs(H.trace() - network_block.diagonal()[: len(H)].sum()) < 1e-12 * abs(H.trace())
    with pytest.raises(ValueError, match="called 2 times"):
        structured_hessian(model, wave, x, y, layer)

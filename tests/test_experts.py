"""Mixtures of experts: the statistics of what is routed, against the rows that each expert is given."""

import re

import pytest
import torch
from torch import Tensor, nn

from kfqn_core.layers import ExpertsView, UnsupportedLayer, parts, view
from kfqn_core.truth import exact
from tests.measures import LargestTensor, relative

F64 = torch.float64
# PyTorch's own: it compiles a derivative with a deprecated tool.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
EXPERTS, D, INNER, N, K = 5, 8, 4, 30, 2


class MixtralExperts(nn.Module):
    """As transformers 5 has it, without its other implementations of the same sum."""

    def __init__(self, is_transposed=False, dtype=F64):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (EXPERTS, 2 * INNER, D), (EXPERTS, D, INNER)
        if is_transposed:
            up, down = (EXPERTS, D, 2 * INNER), (EXPERTS, INNER, D)
        self.gate_up_proj = nn.Parameter(torch.randn(up, dtype=dtype))
        self.down_proj = nn.Parameter(torch.randn(down, dtype=dtype))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        self.shown = []
        out = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            row, k = torch.where(top_k_index == expert)
            up, down = self.gate_up_proj[expert], self.down_proj[expert]
            up, down = (up.mT, down.mT) if self.is_transposed else (up, down)
            a = hidden_states[row]
            h = a @ up.mT
            if h.requires_grad and not torch._C._are_functorch_transforms_active():
                h.retain_grad()
            self.shown.append((a, h))
            gate, value = h.chunk(2, dim=-1)
            out = out.index_add(0, row, (gate.sigmoid() * gate * value) @ down.mT * top_k_weights[row, k, None])
        return out


MixtralExperts.__module__ = "transformers.models.mixtral.modeling_mixtral"


def routes(experts=EXPERTS, seed=0) -> tuple[Tensor, Tensor]:
    """To each row its K experts, and their weights; the last expert gets no row."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts - 1, generator=generator)[:K] for _ in range(N)])
    return index, torch.rand(N, K, generator=generator, dtype=F64)


def called(module: nn.Module, *args, **kwargs):
    """The part's call of one forward, and the output."""
    found = []

    def hook(module, args, kwargs, output):
        found.append(parts(module)[0].call(module, args, kwargs, output))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    y = module(*args, **kwargs)
    handle.remove()
    return found[0], y


def case(is_transposed=False):
    torch.manual_seed(0)
    module = MixtralExperts(is_transposed)
    index, weights = routes()
    x = torch.randn(N, D, dtype=F64)
    call, y = called(module, x, index, weights)
    return module, parts(module)[0].view, call, y


@pytest.mark.parametrize("is_transposed", [False, True])
def test_gradients_are_scores_times_the_rows_that_are_routed(is_transposed):
    """Mean over all rows of g a^T, where a row that is not routed to an expert is zero."""
    module, v, call, y = case(is_transposed)
    assert call.h is y
    assert not call.shows_h
    y.sin().sum().div(N).backward()
    assert (v.groups, v.d_out, v.d_in, v.has_bias) == (EXPERTS, 2 * INNER, D, False)
    a = v.patches(call.x)
    assert a.shape == (N, EXPERTS, 1, D)
    gradient = v.to_matrix(module.gate_up_proj.grad, None)
    for expert, (rows, h) in enumerate(module.shown):
        assert relative(a[:, expert, 0].square().sum(), rows.square().sum()) < 1e-14
        assert relative(gradient[expert], h.grad.mT @ rows) < 1e-13  # a few dozen float64 roundings
    assert gradient[-1].count_nonzero() == 0
    weight, bias = v.from_matrix(v.to_matrix(module.gate_up_proj, None))
    assert torch.equal(weight, module.gate_up_proj)
    assert bias is None


def test_statistics_are_those_of_the_rows_that_are_routed():
    module, v, call, _ = case()
    x = call.x
    assert x.shape == (N, D + EXPERTS)
    a, probe, probes = v.patches(x), torch.randn(EXPERTS, D, dtype=F64), torch.randn(EXPERTS, D, 3, dtype=F64)
    A = torch.stack([rows.mT @ rows / N for rows, _ in module.shown])
    assert relative(torch.einsum("ngti,ngtj->gij", a, a) / N, A) < 1e-13
    assert relative(v.second_moment(x), A) < 1e-13
    assert relative(v.activation_action(x, probe), torch.einsum("gij,gj->gi", A, probe)) < 1e-13
    assert relative(v.activation_action(x, probes), A @ probes) < 1e-13
    assert relative(v.diagonal(x), A.diagonal(dim1=1, dim2=2)) < 1e-13
    assert relative(v.mean_input(x), torch.stack([rows.sum(0) / N for rows, _ in module.shown])) < 1e-13
    assert v.locations(x) == 1
    # Sequences [N, T, d + E], whose locations are rows as well.
    sequences = x.reshape(6, 5, -1)
    a = v.patches(sequences)
    assert a.shape == (6, EXPERTS, 5, D)
    assert relative(v.second_moment(sequences), torch.einsum("ngti,ngtj->gij", a, a) / 6) < 1e-13
    assert relative(v.activation_action(sequences, probe), 5 * v.activation_action(x, probe)) < 1e-13
    assert relative(v.mean_input(sequences), v.mean_input(x)) < 1e-13
    assert torch.equal(v.batched(sequences), x)
    h = torch.einsum("ngti,goi->ntgo", v.patches(sequences), v.to_matrix(module.gate_up_proj, None)).flatten(2)
    assert relative(v.outputs(h), v.patches(sequences) @ module.gate_up_proj.mT) < 1e-13
    assert relative(v.sum_output(h), v.outputs(h).sum((0, 2))) < 1e-13


def test_statistics_need_no_masked_copies():
    """Nothing larger than x with its mask; E copies of x, or those of its rows that are routed, would be."""
    v, x = ExpertsView(torch.empty(EXPERTS, 2, 50), transposed=False), torch.ones(N, 50 + EXPERTS)
    for method in (
        lambda: v.activation_action(x, torch.ones(EXPERTS, 50)),
        lambda: v.mean_input(x),
        lambda: v.diagonal(x),
    ):
        with LargestTensor() as largest:
            method()
        assert 0 < largest.entries <= x.numel()


def test_half_precision_is_raised_before_it_is_summed():
    _, v, call, _ = case()
    x, probe = call.x.bfloat16(), torch.randn(EXPERTS, D)
    for statistic in (v.mean_input, v.second_moment, v.diagonal, lambda x: v.activation_action(x, probe)):
        assert statistic(x).dtype == torch.float32
        assert relative(statistic(x).double(), statistic(x.double())) < 1e-6  # bfloat16 sums would miss by 1e-2


def test_nothing_is_read_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # any .item() or bool(tensor) raises here
        module = MixtralExperts()
        part = parts(module)[0]
        v, rows = part.view, torch.empty(N, D)
        x = part.call(module, (rows, torch.zeros(N, K, dtype=torch.long)), {}, rows).x
        assert v.activation_action(x, v.mean_input(x)).shape == v.diagonal(x).shape == (EXPERTS, D)
        assert v.second_moment(x).shape == (EXPERTS, D, D)


def test_calls_by_keyword_and_experts_on_other_ranks():
    module, _, call, y = case()
    index, weights = routes()
    by_keyword, _ = called(module, hidden_states=call.x[:, :D], top_k_index=index, top_k_weights=weights)
    assert torch.equal(by_keyword.x, call.x)
    index[3] = EXPERTS  # an expert on another rank
    elsewhere = parts(module)[0].call(module, (call.x[:, :D], index), {}, y)
    assert elsewhere.x[3, D:].count_nonzero() == 0
    assert elsewhere.x[:, D:].sum() == K * (N - 1)
    for args, output in [((call.x,), y), ((call.x, index[1:]), y), ((call.x, index), (y,)), ((call.x[None], index), y)]:
        assert parts(module)[0].call(module, args, {}, output) is None


class Mixture(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts, self.last = experts, nn.Linear(D, 2, dtype=F64)
        self.index, self.weights = routes()

    def forward(self, x):
        return self.last(self.experts(x, self.index[: len(x)], self.weights[: len(x)]).tanh())


def test_exact_block_is_that_of_the_network_and_experts_do_not_see_each_other():
    torch.manual_seed(0)
    model = Mixture(MixtralExperts(is_transposed=True))
    x, y = torch.randn(4, D, dtype=F64), torch.randn(4, 2, dtype=F64)

    def wave(z, y):
        return (z * y).sin().sum(1).mean()

    H = exact.layer_hessian(model, wave, x, y, "experts.gate_up_proj")
    v = parts(model.experts)[0].view
    size = model.experts.gate_up_proj.numel()
    positions = torch.arange(size, dtype=F64).reshape(model.experts.gate_up_proj.shape)
    order = v.to_matrix(positions, None).mT.reshape(-1).long()
    network = exact.network_hessian(model, wave, x, y)[:size, :size]
    assert relative(H, network[order][:, order]) < 1e-13
    assert H[-size // EXPERTS :].count_nonzero() == 0  # nothing is routed to the last one


def test_other_experts_are_left_out():
    class Experts(nn.ModuleList):
        pass

    Experts.__module__, Experts.__qualname__ = "transformers.models.other", "OtherExperts"
    with pytest.raises(UnsupportedLayer, match="does not hold its experts as one parameter"):
        parts(Experts())
    with pytest.raises(UnsupportedLayer, match="holds gate_up_proj"):
        view(MixtralExperts())

    class Subclass(MixtralExperts):
        def forward(self, *args):
            return super().forward(*args).exp()

    with pytest.raises(UnsupportedLayer, match="Subclass replaces the forward of MixtralExperts"):
        parts(Subclass())
    v = parts(MixtralExperts())[0].view
    for bad in (torch.zeros(N, D), torch.zeros(0, D + EXPERTS)):
        with pytest.raises(ValueError, match=re.escape(f"{tuple(bad.shape)}, but [N, ..., 8 + 5]")):
            v.mean_input(bad)
    with pytest.raises(ValueError, match=re.escape("(4, 8), but [N, ..., 5 * 8]")):
        v.outputs(torch.zeros(4, 8))
    with pytest.raises(TypeError, match="floating-point"):
        v.mean_input(torch.zeros(4, D + EXPERTS, dtype=torch.long))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_experts_of_transformers_are_these(implementation):
    transformers = pytest.importorskip("transformers", minversion="5")
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts as Real

    config = transformers.MixtralConfig(hidden_size=D, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    dtype = torch.float32 if implementation == "grouped_mm" else F64  # it has no other
    real, ours = Real(config).to(dtype), MixtralExperts(dtype=dtype)
    for parameter in real.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(real.state_dict())
    index, weights = routes()
    x = torch.randn(N, D, dtype=dtype)
    weights = weights.to(dtype)
    call, y = called(real, x, index, weights)
    reference, expected = called(ours, x, index, weights)
    assert torch.equal(call.x, reference.x)
    assert relative(y, expected) < 100 * torch.finfo(dtype).eps  # sums in another order
    assert parts(real)[0].weight == "gate_up_proj"

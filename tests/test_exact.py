"""`exact` against two references that share nothing with it: double backward, and finite differences of gradients."""

import pytest
import torch
from torch import nn

from kfqn_core.layers import UnsupportedLayer, view
from kfqn_core.maths.algebra import vec
from kfqn_core.truth import exact

F64 = torch.float64


def square(z, y):
    return 0.5 * (z - y).square().flatten(1).sum(1).mean()


def wave(z, y):
    """Neither convex nor a likelihood."""
    return (z * y).sin().flatten(1).sum(1).mean()


class MeanOverSequence(nn.Module):
    """Locations meet, and not linearly: the Hessian couples t and t'."""

    def forward(self, h):
        return h.tanh().mean(1).exp()


def mlp(bias=True, activation=nn.Tanh, sizes=(5, 4, 3)):
    torch.manual_seed(0)
    first, hidden, last = sizes
    layers = [nn.Linear(first, hidden, bias=bias), activation(), nn.Linear(hidden, last, bias=bias)]
    return nn.Sequential(*layers).double()


def sequence_model(bias=True):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3, bias=bias), nn.Tanh(), nn.Linear(3, 3, bias=bias)]
    return nn.Sequential(*layers, MeanOverSequence(), nn.Linear(3, 3, bias=bias)).double()


def data(*shape, outputs=3, labels=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=F64)
    y = torch.randn(shape[0], outputs, generator=generator, dtype=F64)
    return x, (y.argmax(1) if labels else y)


PROBLEMS = {"square": (square, False), "cross-entropy": (nn.CrossEntropyLoss(), True), "non-convex": (wave, False)}


def relative(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def double_backward(loss, rows, columns):
    """d^2 loss / d rows d columns by torch.autograd, one backward pass per entry of rows."""
    gradient = torch.autograd.grad(loss, rows, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    out = [torch.autograd.grad(entry, columns, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([c.reshape(-1) for c in row]) for row in out])


def book_order(layer):
    """Positions of `vec([W | b])` in the layer's parameters as PyTorch stores them, one after the other."""
    sizes = [p.numel() for p in layer.parameters()]
    numbers = torch.arange(sum(sizes), dtype=F64).split(sizes)
    shaped = [n.reshape(p.shape) for n, p in zip(numbers, layer.parameters(), strict=True)]
    return vec(view(layer).to_matrix(shaped[0], shaped[1] if len(shaped) > 1 else None)).reshape(-1).long()


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("bias", [True, False])
def test_hessians_are_those_of_double_backward(problem, bias):
    loss_fn, labels = PROBLEMS[problem]
    model, (x, y) = mlp(bias), data(6, 5, labels=labels)
    parameters = list(model.parameters())
    reference = double_backward(loss_fn(model(x), y), parameters, parameters)
    assert relative(exact.network_hessian(model, loss_fn, x, y), reference) < 1e-13  # roundings of one small network
    for name in ("0", "2"):
        own = list(model[int(name)].parameters())
        order = book_order(model[int(name)])
        reference = double_backward(loss_fn(model(x), y), own, own)[order][:, order]
        assert relative(exact.layer_hessian(model, loss_fn, x, y, name), reference) < 1e-13


def test_layer_hessian_is_the_difference_of_gradients():
    model, (x, y) = mlp(), data(6, 5)
    layer = model[0]
    H = exact.layer_hessian(model, square, x, y, layer)

    def gradient(W):
        weight, bias = view(layer).from_matrix(W)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        model.zero_grad()
        square(model(x), y).backward()
        return vec(view(layer).to_matrix(layer.weight.grad, layer.bias.grad))[0]

    W, step = view(layer).to_matrix(layer.weight, layer.bias).detach().clone(), 1e-5
    for j in (0, 7, H.shape[0] - 1):
        E = torch.zeros_like(W)
        E[0, j % layer.out_features, j // layer.out_features] = step
        column = (gradient(W + E) - gradient(W - E)) / (2 * step)
        assert relative(H[:, j], column) < 1e-8  # central differences: step^2 = 1e-10, and eps / step = 1e-11


def test_network_hessian_is_made_of_layer_and_cross_blocks():
    model, (x, y) = mlp(), data(6, 5)
    H = exact.network_hessian(model, wave, x, y)
    first, last = book_order(model[0]), book_order(model[2])
    last = last + len(first)
    assert relative(exact.layer_hessian(model, wave, x, y, "0"), H[first][:, first]) < 1e-13
    assert relative(exact.layer_hessian(model, wave, x, y, "2"), H[last][:, last]) < 1e-13
    assert relative(exact.cross_hessian(model, wave, x, y, "0", "2"), H[first][:, last]) < 1e-13
    assert relative(exact.cross_hessian(model, wave, x, y, "2", "0"), H[last][:, first]) < 1e-13


@pytest.mark.parametrize("bias", [True, False])
def test_cross_block_is_a_kronecker_term_and_a_gradient_term(bias):
    """(a_l a_k^T) (x) (G J) + (a_k^T (x) D) (x) g, per sample, with D = da_l/dh_k and J = dh_l/dh_k."""
    model, (x, y) = mlp(bias), data(6, 5)
    a, h = x, model[0](x)
    slope = 1 - h.tanh().square()
    z = model[2](h.tanh())
    g = z - y
    a, b = (torch.cat([v, torch.ones(6, 1, dtype=F64)], 1) if bias else v for v in (a, h.tanh()))
    blocks = []
    for i in range(6):
        D = torch.cat([torch.diag(slope[i]), torch.zeros(int(bias), 4, dtype=F64)])
        J = model[2].weight @ torch.diag(slope[i])
        first = torch.kron(torch.outer(b[i], a[i]), J)  # G is the identity for the square loss
        blocks.append(first + torch.kron(torch.kron(a[i][None], D), g[i][:, None]))
    expected = torch.stack(blocks).mean(0)
    assert relative(exact.cross_hessian(model, square, x, y, "2", "0"), expected) < 1e-13


@pytest.mark.parametrize(("problem", "name"), [(p, n) for p in PROBLEMS for n in ("0", "2", "4")])
def test_preactivation_hessians_are_those_of_single_samples(problem, name):
    loss_fn, labels = PROBLEMS[problem]
    model, (x, y) = sequence_model(), data(4, 3, 4, labels=labels)
    actual = exact.preactivation_hessians(model, loss_fn, x, y, name)
    layer, T = int(name), 1 if name == "4" else 3
    assert actual.shape == (4, 3, T, 3, T)
    for i in range(4):
        h = model[: layer + 1](x[i : i + 1]).detach().requires_grad_()
        loss = loss_fn(model[layer + 1 :](h), y[i : i + 1])
        reference = double_backward(loss, [h], [h]).reshape(T, 3, T, 3).permute(1, 0, 3, 2)
        assert relative(actual[i], reference) < 1e-13


@pytest.mark.parametrize("name", ["0", "2"])
def test_gauss_newton_is_jacobian_times_output_hessian_times_jacobian(name):
    loss_fn, labels = PROBLEMS["cross-entropy"]
    model, (x, y) = mlp(), data(6, 5, labels=labels)
    order = book_order(model[int(name)])
    z = model(x)
    rows = [torch.autograd.grad(e, model[int(name)].parameters(), retain_graph=True) for e in z.reshape(-1)]
    J = torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])[:, order]
    z = z.detach().requires_grad_()
    H_z = double_backward(loss_fn(z, y), [z], [z])
    assert relative(exact.layer_gauss_newton(model, loss_fn, x, y, name), J.mT @ H_z @ J) < 1e-13


@pytest.mark.parametrize("name", ["0", "2"])
def test_fisher_is_gauss_newton_for_a_likelihood_and_not_otherwise(name):
    model = mlp()
    x, labels = data(6, 5, labels=True)
    _, y = data(6, 5)
    for loss_fn, target, distribution in [
        (nn.CrossEntropyLoss(), labels, exact.categorical),
        (square, y, exact.unit_gaussian),
    ]:
        gauss_newton = exact.layer_gauss_newton(model, loss_fn, x, target, name)
        assert relative(exact.layer_fisher(model, loss_fn, x, distribution, name), gauss_newton) < 1e-13

    def observed(_z):
        return labels[None], torch.ones(1, 6, dtype=F64)

    gauss_newton = exact.layer_gauss_newton(model, nn.CrossEntropyLoss(), x, labels, name)
    empirical = exact.layer_fisher(model, nn.CrossEntropyLoss(), x, observed, name)
    assert relative(empirical, gauss_newton) > 0.1


def test_gaussian_points_have_the_mean_and_covariance_of_the_gaussian():
    z = data(5, 3)[0]
    points, weights = exact.unit_gaussian(z)
    deviation = points - z
    assert relative((weights[..., None] * points).sum(0), z) < 1e-14
    covariance = torch.einsum("kn,kni,knj->nij", weights, deviation, deviation)
    assert relative(covariance, torch.eye(3, dtype=F64).expand(5, 3, 3)) < 1e-14


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.InstanceNorm1d(3, track_running_stats=True), nn.Linear(4, 3)).double()
    x, y = data(6, 3, 5)[0], torch.zeros(6, 3, 3, dtype=F64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact.layer_hessian(model.eval(), square, x, y, "0")
    model.train()
    exact.layer_call(model, x, "0")
    with pytest.raises(ZeroDivisionError):
        exact.preactivation_hessians(model, lambda z, y: 1 / 0, x, y, "0")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_with_two_names_keeps_its_parameters():
    """PyTorch's functional_call puts them back only once."""
    torch.manual_seed(0)
    shared, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
    tied = nn.Linear(3, 3)
    model = nn.Sequential(shared, norm, nn.Tanh(), shared, norm, tied, nn.Tanh(), nn.Linear(3, 3)).double()
    model[7].weight = tied.weight
    x, y = data(6, 3)
    before = [(p, p.clone()) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    for layer in ("0", "5"):
        own = list(dict(model.named_modules())[layer].parameters())
        order = book_order(model[0])
        actual = exact.layer_hessian(model.eval(), wave, x, y, layer)
        assert relative(actual, double_backward(wave(model(x), y), own, own)[order][:, order]) < 1e-12
        exact.layer_fisher(model, nn.CrossEntropyLoss(), x, exact.categorical, layer)
        model.train()
        exact.network_hessian(model, wave, x, y)
    assert all(p is q and torch.equal(p, value) for p, (q, value) in zip(model.parameters(), before, strict=True))
    assert all(b is c and torch.equal(b, value) for b, (c, value) in zip(model.buffers(), buffers, strict=True))


class Attention(nn.Module):
    """Its fused kernels have no second derivatives."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(4, 4), nn.Linear(in_features=4, out_features=3)

    def forward(self, x):
        q = self.q(input=x)[:, None]
        return self.o(input=nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]).mean(1)


def test_attention_is_differentiated_by_its_formula_and_layers_may_be_called_by_keyword():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    model, (x, y) = Attention().double(), data(5, 3, 4)
    for layer in (model.q, model.o):
        own, order = list(layer.parameters()), book_order(layer)
        with sdpa_kernel(SDPBackend.MATH):
            reference = double_backward(wave(model(x), y), own, own)[order][:, order]
        assert relative(exact.layer_hessian(model, wave, x, y, layer), reference) < 1e-12
        call = exact.layer_call(model, x, layer)
        assert relative(layer(call.input), call.output) < 1e-14
        assert exact.preactivation_hessians(model, wave, x, y, layer).shape[0] == 5
    assert exact.layer_fisher(model, nn.CrossEntropyLoss(), x, exact.categorical, "q").shape == (20, 20)
    assert exact.network_hessian(model, wave, x, y).shape == (35, 35)


def test_results_carry_no_graph():
    model, (x, y) = mlp(), data(6, 5, labels=True)
    loss_fn = nn.CrossEntropyLoss()
    for result in (
        exact.network_hessian(model, loss_fn, x, y),
        exact.layer_hessian(model, loss_fn, x, y, "0"),
        exact.cross_hessian(model, loss_fn, x, y, "0", "2"),
        exact.preactivation_hessians(model, loss_fn, x, y, "0"),
        exact.layer_gauss_newton(model, loss_fn, x, y, "0"),
        exact.layer_fisher(model, loss_fn, x, exact.categorical, "0"),
        *exact.layer_call(model, x, "2")[1:],
    ):
        assert not result.requires_grad


def test_layers_that_have_no_single_preactivation_are_refused():
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared).double()
    x, y = data(4, 3)
    with pytest.raises(ValueError, match="layer '0' is called 2 times"):
        exact.preactivation_hessians(model, square, x, y, shared)
    own = list(shared.parameters())
    order = book_order(shared)
    reference = double_backward(square(model(x), y), own, own)[order][:, order]
    assert relative(exact.layer_hessian(model, square, x, y, shared), reference) < 1e-13  # this one is well defined

    model = mlp()
    model.spare = nn.Linear(3, 3).double()
    model.forward = lambda x: model[:3](x)
    for function in (exact.layer_hessian, exact.preactivation_hessians, exact.layer_gauss_newton):
        with pytest.raises(ValueError, match="'spare' is never called"):
            function(model, square, *data(4, 5), "spare")
    x, y = data(4, 5)
    for layers in (("0", "spare"), ("spare", "0")):
        with pytest.raises(ValueError, match="'spare' is never called"):
            exact.cross_hessian(model, square, x, y, *layers)
    with pytest.raises(ValueError, match="'spare' is never called"):
        exact.layer_fisher(model, square, x, exact.unit_gaussian, "spare")
    with pytest.raises(ValueError, match="'9' is not a layer of the model; those it can be are '0', '2'"):
        exact.layer_hessian(mlp(), square, *data(4, 5), "9")
    with pytest.raises(ValueError, match="this Linear is not a layer"):
        exact.layer_hessian(mlp(), square, *data(4, 5), shared)
    with pytest.raises(UnsupportedLayer, match="Tanh"):
        exact.layer_hessian(mlp(), square, *data(4, 5), "1")
    with pytest.raises(ValueError, match="both layers are '0'"):
        exact.cross_hessian(mlp(), square, *data(4, 5), "0", "0")


def test_losses_that_are_no_mean_over_samples_are_refused():
    x, y = data(6, 5)
    with pytest.raises(ValueError, match=r"mean of the 6 per-sample losses.*reduction='mean'"):
        exact.preactivation_hessians(mlp(), nn.MSELoss(reduction="sum"), x, y, "0")
    with pytest.raises(ValueError, match="reduce it by a mean"):
        exact.layer_hessian(mlp(), nn.MSELoss(reduction="none"), x, y, "0")
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) is in training mode.*model.eval"):
        exact.preactivation_hessians(normed, square, x, y, "0")
    assert exact.preactivation_hessians(normed.eval(), square, x, y, "0").shape == (6, 4, 1, 4, 1)
    with pytest.raises(ValueError, match="mean of the 6 per-sample losses"):
        exact.preactivation_hessians(mlp(activation=nn.Dropout), square, x, y, "0")
    with pytest.raises(ValueError, match="mean of the 6 per-sample losses"):
        exact.layer_fisher(mlp(), nn.CrossEntropyLoss(reduction="sum"), x, exact.categorical, "0")


def test_bad_input_is_refused_before_any_work():
    x, y = data(6, 5)
    with pytest.raises(ValueError, match=r"24 x 24 entries, 4,608 bytes, and max_bytes is 4,607"):
        exact.layer_hessian(mlp(), square, x, y, "0", max_bytes=4607)
    with pytest.raises(ValueError, match="39 x 39 entries"):
        exact.network_hessian(mlp(), square, x, y, max_bytes=8)
    with pytest.raises(ValueError, match="24 x 15 entries"):
        exact.cross_hessian(mlp(), square, x, y, "0", "2", max_bytes=8)
    with pytest.raises(ValueError, match="24 x 4 entries"):
        exact.preactivation_hessians(mlp(), square, x, y, "0", max_bytes=8)
    with pytest.raises(ValueError, match=r"\(6, 5\).*\(5, 3\).*same, positive number"):
        exact.network_hessian(mlp(), square, x, y[:5])

    class Pair(nn.Linear):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="must return one tensor, not tuple"):
        exact.network_hessian(Pair(5, 3).double(), square, x, y)


MATRICES = {
    "network_hessian": lambda model, x, y, loss: exact.network_hessian(model, loss, x, y),
    "layer_hessian": lambda model, x, y, loss: exact.layer_hessian(model, loss, x, y, "0"),
    "cross_hessian": lambda model, x, y, loss: exact.cross_hessian(model, loss, x, y, "0", "2"),
    "layer_call": lambda model, x, y, loss: exact.layer_call(model, x, "0"),
    "preactivation_hessians": lambda model, x, y, loss: exact.preactivation_hessians(model, loss, x, y, "0"),
    "layer_gauss_newton": lambda model, x, y, loss: exact.layer_gauss_newton(model, loss, x, y, "0"),
    "layer_fisher": lambda model, x, y, loss: exact.layer_fisher(model, loss, x, exact.unit_gaussian, "0"),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_every_matrix_says_what_is_wrong_with_its_arguments(matrix):
    x, y = data(6, 5)
    with pytest.raises(ValueError, match=r"x has shape \(0, 5\), but \[N, ...\] with at least one.*not empty"):
        matrix(mlp(), x[:0], y[:0], square)
    with pytest.raises(ValueError, match=r"x has shape \(\), but \[N, ...\].*add a batch dimension"):
        matrix(mlp(), x[0, 0], y[0, 0], square)
    with pytest.raises(TypeError, match=r"x is a list, but a tensor \[N, ...\] is needed; convert it"):
        matrix(mlp(), x.tolist(), y, square)
    with pytest.raises(TypeError, match=r"model is a method, but an nn.Module is needed; wrap"):
        matrix(mlp().forward, x, y, square)


@pytest.mark.parametrize("name", [name for name in MATRICES if name not in ("layer_call", "layer_fisher")])
def test_targets_and_losses_of_another_kind_are_refused(name):
    x, y = data(6, 5)
    with pytest.raises(ValueError, match=r"\(6, 5\).*\(5, 3\).*same, positive number"):
        MATRICES[name](mlp(), x, y[:5], square)
    with pytest.raises(TypeError, match=r"y is a list, but a tensor \[N, ...\] is needed; convert it"):
        MATRICES[name](mlp(), x, y.tolist(), square)
    with pytest.raises(TypeError, match=r"loss_fn returned a float, but a scalar tensor is needed; leave out .item"):
        MATRICES[name](mlp(), x, y, lambda z, y: 3.0)


def test_a_network_without_parameters_has_no_hessian():
    with pytest.raises(ValueError, match=r"Tanh has no parameters, .* pass a model with a layer"):
        exact.network_hessian(nn.Tanh(), square, *data(6, 5))


@pytest.mark.parametrize("distribution", [exact.categorical, exact.unit_gaussian])
def test_distributions_are_of_outputs_in_rows(distribution):
    for shape in ((3,), (2, 3, 4), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match=r"\[N, K\] is needed with at least one sample and one output"):
            distribution(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"must be a real floating-point tensor, not torch\.int64"):
        distribution(torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("shapes", [((0, 6), (0, 6)), ((1, 6), (2, 6)), ((1, 6), (1, 4)), ((1, 3), (1, 3)),
                                    ((1, 6), (6,)), ((6,), (6,))])  # fmt: skip
def test_a_distribution_of_the_readers_own_has_a_row_for_every_target(shapes):
    x, _ = data(6, 5)
    targets, probabilities = torch.zeros(shapes[0], dtype=torch.long), torch.ones(shapes[1]).double()
    with pytest.raises(ValueError, match=r"but \[K, 6, ...\] and \[K, 6\] with at least one target a sample"):
        exact.layer_fisher(mlp(), nn.CrossEntropyLoss(), x, lambda z: (targets, probabilities), "0")
    for other in (None, targets, (targets, 1)):
        with pytest.raises(TypeError, match="but a pair of tensors, targets and probabilities, is needed"):
            exact.layer_fisher(mlp(), nn.CrossEntropyLoss(), x, lambda z, other=other: other, "0")

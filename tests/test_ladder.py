"""`ladder`: the structure of a layer's Hessian against the Hessian itself, which knows nothing of the structure."""

import pytest
import torch
from torch import nn

from kfqn_core import layers
from kfqn_core.maths.algebra import rearrange
from kfqn_core.truth import exact
from kfqn_core.truth.ladder import backward_step, block_from_samples, rungs, structured_hessian

F64 = torch.float64
TOLERANCE = 1e-10  # observed 1e-15; the contract of the book


def square(z, y):
    return 0.5 * (z - y).square().flatten(1).sum(1).mean()


def wave(z, y):
    return (z * y).sin().flatten(1).sum(1).mean()


class MeanOverSequence(nn.Module):
    def forward(self, h):
        return h.tanh().mean(1).exp()


PROBLEMS = {"square": (square, False), "cross-entropy": (nn.CrossEntropyLoss(), True), "non-convex": (wave, False)}


def data(*shape, labels=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=F64)
    y = torch.randn(shape[0], 3, generator=generator, dtype=F64)
    return x, (y.argmax(1) if labels else y)


def mlp(bias=True, activation=nn.Tanh):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4, bias=bias), activation(), nn.Linear(4, 4, bias=bias), activation()]
    return nn.Sequential(*layers, nn.Linear(4, 3, bias=bias)).double()


def sequence_model(bias=True):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 3, bias=bias), nn.Tanh(), nn.Linear(3, 3, bias=bias), MeanOverSequence()]
    return nn.Sequential(*layers, nn.Linear(3, 3, bias=bias)).double()


def relative(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def error(model, loss_fn, x, y, name):
    expected = exact.layer_hessian(model, loss_fn, x, y, name)
    return relative(structured_hessian(model, loss_fn, x, y, name), expected)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_structure_is_the_exact_block_of_an_mlp(problem, bias, activation):
    loss_fn, labels = PROBLEMS[problem]
    x, y = data(6, 5, labels=labels)
    for name in ("0", "2", "4"):
        assert error(mlp(bias, activation), loss_fn, x, y, name) < TOLERANCE


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 3, 5)])
def test_structure_is_the_exact_block_on_sequences(problem, bias, shape):
    loss_fn, labels = PROBLEMS[problem]
    x, y = data(*shape, labels=labels)
    for name in ("0", "2", "4"):
        assert error(sequence_model(bias), loss_fn, x, y, name) < TOLERANCE


def test_locations_that_interact_need_the_terms_between_them():
    """Dropping t != t' is no rounding: the test above is not passed by a sum over single locations."""
    model, (x, y) = sequence_model(), data(4, 3, 5)
    G = exact.preactivation_hessians(model, square, x, y, "0")
    a = layers.view(model[0]).patches(x)[:, 0]
    diagonal = torch.einsum("nti,notpt,ntj->iojp", a, G, a).reshape(18, 18) / 4
    assert relative(diagonal, exact.layer_hessian(model, square, x, y, "0")) > 0.1


def test_two_location_dimensions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3), nn.Tanh()).double()
    assert error(model, wave, *data(4, 2, 3, 5), "0") < TOLERANCE


def test_a_lost_bias_column_is_seen(monkeypatch):
    """Without the trailing 1 of a, or with the bias in another place, the structure is not the Hessian."""
    model, (x, y) = mlp(), data(6, 5)
    patches = layers.LinearView.patches
    zeros, ones = torch.zeros(6, 1, 1, 1, dtype=F64), torch.ones(6, 1, 1, 1, dtype=F64)
    for broken in (
        lambda view, x: torch.cat([patches(view, x)[..., :-1], zeros], -1),
        lambda view, x: torch.cat([ones, patches(view, x)[..., :-1]], -1),
    ):
        monkeypatch.setattr(layers.LinearView, "patches", broken)
        assert error(model, square, x, y, "0") > 0.05
    monkeypatch.undo()
    assert error(model, square, x, y, "0") < TOLERANCE


@pytest.mark.parametrize("problem", PROBLEMS)
def test_backward_step_gives_every_preactivation_hessian(problem):
    loss_fn, labels = PROBLEMS[problem]
    model, (x, y) = mlp(), data(6, 5, labels=labels)
    z = model(x).detach().requires_grad_()
    g = torch.autograd.grad(6 * loss_fn(z, y), z)[0]
    G = exact.preactivation_hessians(model, loss_fn, x, y, "4")[:, :, 0, :, 0]
    gauss_newton = G
    for layer in (2, 0):
        h = exact.layer_call(model, x, str(layer)).output
        slope = 1 - h.tanh().square()
        curvature = -2 * h.tanh() * slope
        W = model[layer + 2].weight.detach()
        _, gauss_newton = backward_step(W, g, gauss_newton, slope, torch.zeros_like(slope))
        g, G = backward_step(W, g, G, slope, curvature)
        expected = exact.preactivation_hessians(model, loss_fn, x, y, str(layer))[:, :, 0, :, 0]
        assert relative(G, expected) < TOLERANCE
        a = layers.view(model[layer]).patches(exact.layer_call(model, x, str(layer)).input)[:, 0, 0]
        block = torch.stack([torch.kron(torch.outer(u, u), M) for u, M in zip(a, gauss_newton, strict=True)]).mean(0)
        assert relative(block, exact.layer_gauss_newton(model, loss_fn, x, y, str(layer))) < TOLERANCE


def test_backward_step_takes_any_number_of_leading_axes():
    generator = torch.Generator().manual_seed(2)
    W, g, G = (torch.randn(shape, generator=generator, dtype=F64) for shape in ((3, 4), (2, 5, 3), (2, 5, 3, 3)))
    slope, curvature = torch.randn(2, 2, 5, 4, generator=generator, dtype=F64)
    several = backward_step(W, g, G, slope, curvature)
    one = backward_step(W, g[1, 2], G[1, 2], slope[1, 2], curvature[1, 2])
    assert all(relative(many[1, 2], single) < TOLERANCE for many, single in zip(several, one, strict=True))


def test_layers_that_share_parameters_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[0].weight = model[2].weight
    with pytest.raises(ValueError, match="this Linear shares a parameter with '2'"):
        structured_hessian(model, square, *data(6, 3), "0")


def test_backward_step_refuses_shapes_that_do_not_fit():
    W, g, G = torch.zeros(3, 5), torch.zeros(6, 3), torch.zeros(6, 3, 3)
    slope = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"W \(3, 5\).*do not fit.*without its bias column"):
        backward_step(W, g, G, slope, slope)
    with pytest.raises(ValueError, match=r"W \(3,\)"):
        backward_step(W[:, 0], g, G, slope, slope)


# ---------------------------------------------------------------------------------------------------------------------
# The rungs, against their definitions


NAMES = [
    "exact",
    "separate groups",
    "uncorrelated locations",
    "independence",
    "homogeneity",
    "common curvature",
    "mean patch",
    "best product",
]
PRODUCTS = ("homogeneity", "mean patch")


class MeanOverLocations(nn.Module):
    def forward(self, h):
        return h.flatten(2).mean(2)


def images(n=5, channels=4, size=5, outputs=3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, size, size, generator=generator, dtype=F64)
    return x, torch.randn(n, outputs, generator=generator, dtype=F64)


def cnn(*behind, groups=1, bias=True, outputs=6, **options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, outputs, 3, groups=groups, bias=bias, **options)
    return nn.Sequential(conv, *(module() if isinstance(module, type) else module for module in behind)).double()


def head(features=54):
    torch.manual_seed(1)
    return nn.Linear(features, 3)


def layer_cases():
    sequence, grouped = sequence_model(), cnn(nn.Tanh, nn.Flatten, head(), groups=2)
    depthwise = cnn(nn.Tanh, nn.Flatten, head(36), groups=4, bias=False, outputs=4)
    torch.manual_seed(0)
    volume = nn.Sequential(nn.Conv1d(3, 4, 2, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    generator = torch.Generator().manual_seed(4)
    signal = torch.randn(5, 3, 6, generator=generator, dtype=F64)
    return {
        "linear": (mlp(), *data(6, 5), "2"),
        "sequence": (sequence, *data(4, 3, 5), "2"),
        "convolution": (cnn(nn.Tanh, nn.Flatten, head()), *images(), "0"),
        "convolution of a signal": (volume, signal, images()[1], "0"),
        "grouped": (grouped, *images(), "0"),
        "depthwise": (depthwise, *images(), "0"),
    }


LAYERS = list(layer_cases())


def by_loops(a, G, groups, keep):
    """Sum of Kronecker products, one at a time. `keep(left, right)` filters pairs of (group, location)."""
    samples, _, T, d_in = a.shape
    d_out = G.shape[1] // groups
    n = d_in * d_out
    H = torch.zeros(groups * n, groups * n, dtype=F64)
    places = [(group, t) for group in range(groups) for t in range(T)]
    for i in range(samples):
        for left in places:
            for right in (place for place in places if keep(left, place)):
                (g, t), (h, u) = left, right
                G_tt = G[i, g * d_out : (g + 1) * d_out, t, h * d_out : (h + 1) * d_out, u]
                H[g * n : (g + 1) * n, h * n : (h + 1) * n] += (
                    torch.kron(torch.outer(a[i, g, t], a[i, h, u]), G_tt) / samples
                )
    return H


@pytest.mark.parametrize("name", LAYERS)
def test_rungs_are_their_definitions(name):
    """Every rung once more, as sums of `torch.kron` written from the text of chapter 5."""
    model, x, y, layer = layer_cases()[name]
    ladder = rungs(model, wave, x, y, layer)
    assert list(ladder) == NAMES
    call = exact.layer_call(model, x, layer)
    v = layers.view(call.module)
    a, G = v.patches(call.input), exact.preactivation_hessians(model, wave, x, y, layer)
    groups, T, d_out = v.groups, a.shape[2], v.d_out
    expected = {
        "exact": exact.layer_hessian(model, wave, x, y, layer),
        "separate groups": by_loops(a, G, groups, lambda left, right: left[0] == right[0]),
        "uncorrelated locations": by_loops(a, G, groups, lambda left, right: left == right),
    }
    A, independence, homogeneity, common, mean_patch = v.second_moment(call.input), [], [], [], []
    for g in range(groups):
        own = slice(g * d_out, (g + 1) * d_out)
        G_own = G[:, own][:, :, :, own]
        moments = [torch.einsum("ni,nj->ij", a[:, g, t], a[:, g, t]) / len(a) for t in range(T)]
        curvatures = [G_own[:, :, t, :, t].mean(0) for t in range(T)]
        independence.append(sum(torch.kron(M, C) for M, C in zip(moments, curvatures, strict=True)))
        homogeneity.append(torch.kron(A[g], sum(curvatures) / T))
        mean = a[:, g].mean(1)
        G_common = G_own.mean((2, 4))
        common.append(
            T**2 * sum(torch.kron(torch.outer(u, u), C) for u, C in zip(mean, G_common, strict=True)) / len(a)
        )
        mean_patch.append(torch.kron(T * mean.mT @ mean / len(a), T * G_common.mean(0)))
    expected |= {
        "independence": torch.block_diag(*independence),
        "homogeneity": torch.block_diag(*homogeneity),
        "common curvature": torch.block_diag(*common),
        "mean patch": torch.block_diag(*mean_patch),
    }
    for rung, matrix in expected.items():
        assert relative(ladder[rung].matrix, matrix) < TOLERANCE, rung
        error = relative(matrix, expected["exact"])
        assert abs(ladder[rung].error - error) < 1e-12, rung  # a difference of O(1) numbers


@pytest.mark.parametrize("name", LAYERS)
def test_no_product_beats_the_best_one(name):
    """Van Loan's floor per group, from singular values that the ladder does not see."""
    model, x, y, layer = layer_cases()[name]
    ladder = rungs(model, wave, x, y, layer)
    v = layers.view(exact.layer_call(model, x, layer).module)
    block, n = exact.layer_hessian(model, wave, x, y, layer), v.d_in * v.d_out
    squared = block.square().sum()
    for g in range(v.groups):
        own = slice(g * n, (g + 1) * n)
        squared -= torch.linalg.svdvals(rearrange(block[own, own], v.d_in, v.d_out))[0].square()
    floor = (squared.sqrt() / block.norm()).item()
    assert abs(ladder["best product"].error - floor) < 1e-10
    assert floor > 0.05  # or the next line says nothing
    for rung in PRODUCTS:
        assert ladder[rung].error > floor
        # Nor does any multiple of it, nor a perturbed best product.
        K = ladder[rung].matrix
        assert relative((block * K).sum() / K.square().sum() * K, block) > floor
    best = ladder["best product"].matrix
    assert relative(1.01 * best, block) > floor


@pytest.mark.parametrize("name", LAYERS)
def test_gauss_newton_rungs(name):
    """The same formulas with another curvature: exact against the definition, and positive semi-definite throughout."""
    model, x, y, layer = layer_cases()[name]
    ladder = rungs(model, square, x, y, layer, curvature=exact.preactivation_gauss_newton)
    assert relative(ladder["exact"].matrix, exact.layer_gauss_newton(model, square, x, y, layer)) < TOLERANCE
    for rung, (matrix, _) in ladder.items():
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] > -1e-12 * values[-1], rung
    hessian = rungs(model, square, x, y, layer)["exact"].matrix
    assert relative(ladder["exact"].matrix, hessian) > 0.01  # tanh behind the layer: two matrices


def test_what_is_lost_below_uncorrelated_locations_is_a_covariance():
    """Within locations (independence) and between them (homogeneity): the law of total covariance."""
    model, x, y, layer = layer_cases()["convolution"]
    ladder = rungs(model, wave, x, y, layer)
    a = layers.view(model[0]).patches(x)[:, 0]
    G = exact.preactivation_hessians(model, wave, x, y, layer).diagonal(dim1=2, dim2=4).permute(0, 3, 1, 2)
    u, v = torch.einsum("nti,ntj->ntij", a, a).flatten(2), G.flatten(2)
    T = u.shape[1]
    within = torch.einsum("ntu,ntv->uv", u - u.mean(0), v - v.mean(0)) / len(u)
    between = torch.einsum("tu,tv->uv", u.mean(0) - u.mean((0, 1)), v.mean(0) - v.mean((0, 1)))
    total = torch.einsum("ntu,ntv->uv", u - u.mean((0, 1)), v - v.mean((0, 1))) / len(u)
    steps = [ladder[rung].matrix for rung in ("uncorrelated locations", "independence", "homogeneity")]
    for lost, expected in (
        (steps[0] - steps[1], within),
        (steps[1] - steps[2], between),
        (steps[0] - steps[2], total),
    ):
        assert relative(rearrange(lost, a.shape[-1], G.shape[-1]), expected) < TOLERANCE
    assert relative(total / T, (within + between) / T) < TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# Regimes in which a rung is exact, and their neighbours just outside


EXACT, WRONG = 1e-10, 0.05  # observed: below 1e-14 inside, 0.1 and more outside


def errors(model, loss_fn, x, y, layer="0"):
    return {name: rung.error for name, rung in rungs(model, loss_fn, x, y, layer).items()}


def two_samples_apart():
    """Two samples whose curvatures differ: with one location, the least that independence can fail on."""
    x, y = data(2, 5)
    return torch.stack([x[0], 3 * x[1]]), y


def test_one_sample_at_one_location():
    x, y = two_samples_apart()
    inside, outside = errors(mlp(), wave, x[:1], y[:1]), errors(mlp(), wave, x, y)
    assert max(inside.values()) < EXACT
    for rung in ("independence", "homogeneity", "mean patch", "best product"):
        assert outside[rung] > WRONG
    assert outside["uncorrelated locations"] < EXACT  # one location: there is nothing to correlate


def test_one_sample_at_several_locations():
    """Independence is free for one sample; homogeneity and uncorrelated locations are not."""
    x, y = data(1, 3, 5)
    inside, outside = rungs(sequence_model(), wave, x, y, "0"), rungs(sequence_model(), wave, *data(2, 3, 5), "0")
    assert inside["uncorrelated locations"].error > WRONG
    for above, below in (("uncorrelated locations", "independence"), ("common curvature", "mean patch")):
        assert relative(inside[below].matrix, inside[above].matrix) < EXACT
        assert relative(outside[below].matrix, outside[above].matrix) > WRONG
    assert relative(inside["homogeneity"].matrix, inside["independence"].matrix) > WRONG


def test_linear_network_with_square_loss():
    """G is the same for every sample: with one location, one product is the block."""
    x, y = data(6, 5)
    linear = mlp(activation=nn.Identity)
    assert max(errors(linear, square, x, y).values()) < EXACT
    for neighbour in ((mlp(), square), (linear, wave)):  # a curved activation, another loss
        assert errors(*neighbour, x, y)["homogeneity"] > WRONG


def test_linear_network_with_square_loss_at_several_locations():
    """Independence is still free; that the locations interact is another matter."""
    x, y = images()
    linear, curved = (
        rungs(cnn(activation, nn.Flatten, head()), square, x, y, "0") for activation in (nn.Identity, nn.Tanh)
    )
    assert relative(linear["independence"].matrix, linear["uncorrelated locations"].matrix) < EXACT
    assert relative(curved["independence"].matrix, curved["uncorrelated locations"].matrix) > WRONG
    assert linear["uncorrelated locations"].error > WRONG


def test_a_loss_of_its_own_at_every_location():
    x = images()[0]
    y = torch.randn(5, 6, 3, 3, generator=torch.Generator().manual_seed(5), dtype=F64)
    last = cnn()
    inside = errors(last, square, x, y)
    for rung in ("uncorrelated locations", "independence", "homogeneity"):
        assert inside[rung] < EXACT  # G_tt' is the identity for t = t' and zero otherwise
    assert inside["mean patch"] > WRONG
    other_loss = errors(last, wave, x, y)  # still one loss per location, but curvature differs
    assert other_loss["uncorrelated locations"] < EXACT
    assert other_loss["independence"] > WRONG
    torch.manual_seed(2)
    followed = nn.Sequential(*last, nn.Conv2d(6, 6, 3, padding=1).double())  # the next layer mixes locations
    assert errors(followed, square, x, y)["uncorrelated locations"] > WRONG


def test_white_inputs():
    """Pixels without correlation, patches without overlap, no bias, G constant: `E[a_t a_t'^T] = 0` for t != t'."""
    signs = torch.tensor([[(k >> bit & 1) * 2.0 - 1 for bit in range(8)] for k in range(256)], dtype=F64)
    x, y = signs.reshape(256, 2, 4), torch.zeros(256, 3, dtype=F64)

    def model(bias=False, stride=2):
        torch.manual_seed(0)
        conv = nn.Conv1d(2, 3, 2, stride=stride, bias=bias)
        return nn.Sequential(conv, nn.Flatten(), nn.Linear(3 * (2 if stride == 2 else 3), 3)).double()

    inside = errors(model(), square, x, y)
    for rung in ("uncorrelated locations", "independence", "homogeneity"):
        assert inside[rung] < EXACT
    for neighbour in (model(bias=True), model(stride=1)):  # the constant 1, or overlap, correlates the patches
        assert errors(neighbour, square, x, y)["uncorrelated locations"] > WRONG


def test_constant_patches():
    """A constant image shows every location the same patch: the curvatures may be summed before anything else."""
    x, y = images()
    constant = x[..., :1, :1].expand_as(x)
    model = cnn(nn.Tanh, nn.Flatten, head())
    inside = rungs(model, wave, constant, y, "0")
    assert inside["common curvature"].error < EXACT
    assert relative(inside["homogeneity"].matrix, inside["independence"].matrix) < EXACT
    assert inside["mean patch"].error > WRONG  # several samples: independence is still an assumption
    assert errors(model, wave, constant[:1], y[:1])["mean patch"] < EXACT
    padded = cnn(nn.Tanh, nn.Flatten, head(150), padding=1)  # zeros at the border make the patches differ
    for outside in (errors(model, wave, x, y), errors(padded, wave, constant, y)):
        assert outside["common curvature"] > WRONG


def test_global_pooling():
    """Locations that meet in a mean have one curvature for all pairs; the mean patch is then all that matters."""
    x, y = images()
    inside = errors(cnn(MeanOverLocations, head(6)), square, x, y)
    assert inside["common curvature"] < EXACT
    assert inside["mean patch"] < EXACT  # linear network, square loss: G is constant, too
    assert inside["homogeneity"] > 0.5  # eight ninths of the pairs of locations are gone
    curved_head = errors(cnn(MeanOverLocations, nn.Tanh, head(6)), square, x, y)
    assert curved_head["common curvature"] < EXACT
    assert curved_head["mean patch"] > WRONG
    curved_locations = errors(cnn(nn.Tanh, MeanOverLocations, head(6)), square, x, y)
    assert curved_locations["common curvature"] > WRONG


def test_location_independent_curvature():
    """Homogeneity alone: with one curvature everywhere the last step of the ladder is free."""
    x, y = images()
    pooled, flat = (
        rungs(cnn(*behind), square, x, y, "0") for behind in ((MeanOverLocations, head(6)), (nn.Flatten, head()))
    )
    assert relative(pooled["homogeneity"].matrix, pooled["independence"].matrix) < EXACT
    assert relative(flat["homogeneity"].matrix, flat["independence"].matrix) > WRONG


def test_groups_that_never_meet():
    x = images()[0]
    y = torch.randn(5, 6, 3, 3, generator=torch.Generator().manual_seed(5), dtype=F64)
    assert errors(cnn(nn.Tanh, groups=2), wave, x, y)["separate groups"] < EXACT
    meeting = cnn(nn.Tanh, nn.Conv2d(6, 6, 1), groups=2)
    assert errors(meeting, wave, x, y)["separate groups"] > WRONG


def test_mean_pair_measures_the_curvature_of_the_mean_patch():
    """All locations moved alike: the change of the mean gradient is `G' dh` with `G' = sum_{t,t'} G_tt' / T`."""
    model, (x, y) = cnn(nn.Tanh, nn.Flatten, head()), images()
    h = model[0](x).detach()
    shift = torch.randn(1, 6, 1, 1, generator=torch.Generator().manual_seed(6), dtype=F64)

    def mean_gradient(h):
        h = h.clone().requires_grad_()
        return torch.autograd.grad(len(x) * wave(model[1:](h), y), h)[0].mean((0, 2, 3))

    step = 1e-5  # central differences: an error of about step^2
    change = (mean_gradient(h + step * shift) - mean_gradient(h - step * shift)) / (2 * step)
    G = exact.preactivation_hessians(model, wave, x, y, "0")
    T = G.shape[2]
    assert relative(G.sum((2, 4)).mean(0) / T @ shift.flatten(), change) < 1e-7
    assert relative(G.diagonal(dim1=2, dim2=4).mean((0, -1)) @ shift.flatten(), change) > 0.1


def test_error_of_a_block_that_is_zero():
    """A layer that the loss does not depend on to second order has nothing to be wrong about."""
    model, (x, y) = mlp(activation=nn.Identity), data(6, 5)
    assert set(errors(model, lambda z, y: (z * y).sum(1).mean(), x, y).values()) == {0.0}


def test_samples_that_do_not_fit_are_refused():
    a = torch.zeros(5, 2, 3, 4)
    for G in (torch.zeros(5, 6, 3, 6, 2), torch.zeros(5, 5, 3, 5, 3), torch.zeros(4, 6, 3, 6, 3), torch.zeros(5, 6)):
        with pytest.raises(ValueError, match=r"a \(5, 2, 3, 4\).*do not fit"):
            block_from_samples(a, G)

"""What enters the statistics: what entered `p.grad`, whoever called what, and nothing that is not finite."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kfqn_core import KFQN
from tests.field.programs import H_of, difference, error, heard, inverse_of, mlp, randn, silence, still, train, values


def factor(program, make=lambda: mlp(5, 8, 1), layer="0", **options):
    """`H_a` of a layer after the first step of a program."""
    model = make()
    optimizer = KFQN(model, lr=0.0, activation_factor="action", **options)
    with silence():
        program(model, optimizer)
        optimizer.step()
    return H_of(optimizer, layer)


x, far = randn(24, 5), 5 + randn(16, 5, seed=2)

# -- what is called


class Autoencoder(nn.Module):
    """Its parts are called; the whole has no forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = mlp(5, 8, 2), mlp(2, 8, 5)

    def loss(self, x):
        return (self.decoder(self.encoder(x)) - x).square().mean()


CALLS = {
    "a method": lambda m, part: m.loss(part),
    "parts": lambda m, part: (m.decoder(m.encoder(part)) - part).square().mean(),
    "layers": lambda m, part: (
        m.decoder[2](torch.tanh(m.decoder[0](m.encoder[2](torch.tanh(m.encoder[0](part)))))) - part
    ).square().mean(),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_micro_batches_are_samples_whichever_part_is_called(call, k):
    def program(model, optimizer):
        for part in x.chunk(k):
            (call(model, part) / k).backward()

    assert error(factor(program, Autoencoder, "encoder.0"), inverse_of(x)) < 1e-4


def test_actor_and_critic_in_a_dictionary():
    def program(agents, optimizer):
        for part in x.split(8):
            agents["actor"](100 * part)  # a rollout, with gradients on
            with torch.no_grad():
                agents["critic"](100 * part)
            h = agents["body"](part)
            ((agents["actor"](h).square().mean() + agents["critic"](h).square().mean()) / 3).backward()

    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(5, 5), "actor": nn.Linear(5, 3), "critic": nn.Linear(5, 1)})

    assert error(factor(program, make, "body"), inverse_of(x)) < 1e-4
    model = make()
    optimizer = KFQN(model, lr=0.0, activation_factor="action")
    program(model, optimizer)
    optimizer.step()
    h = model["body"](x)
    assert error(H_of(optimizer, "critic"), inverse_of(h)) < 1e-4
    assert error(H_of(optimizer, "actor"), inverse_of(h)) < 1e-4


def test_a_layer_used_twice_in_one_forward_and_behind_two_losses():
    def program(model, optimizer):
        h = torch.tanh(model[0](x))
        (model[2](h).square().mean() + model[2](torch.tanh(model[0](far))).mean()).backward()

    assert error(factor(program), inverse_of(torch.cat([x, far]))) < 1e-4


def test_two_forwards_before_one_of_their_backwards():
    def program(model, optimizer):
        one, two = model(x), model(far)
        del two
        one.square().mean().backward()

    assert error(factor(program), inverse_of(x)) < 1e-4


def test_forwards_without_backward_are_not_kept():
    model = mlp(64, 64, 1)
    optimizer = KFQN(model)
    held = []
    for _ in range(20):
        inputs = torch.randn(512, 64)
        held.append(torch.utils.weak.WeakTensorKeyDictionary())
        held[-1][inputs] = True
        model(inputs)
    del inputs
    assert sum(len(entry) for entry in held) == 0
    with silence():
        train(optimizer, lambda: model(torch.randn(8, 64)).square().mean(), 2)


# -- backwards that gave the weights nothing


def generators_loss_through(model, optimizer):
    noise = far.clone().requires_grad_()
    (-model(noise)).mean().backward()
    model.zero_grad()


def saliency(model, optimizer):
    inputs = far.clone().requires_grad_()
    torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)


def projected_gradient_attack(model, optimizer):
    delta = torch.zeros_like(far, requires_grad=True)
    for _ in range(4):
        model(far + delta).square().mean().backward(inputs=[delta])
        delta = (delta.detach() + 0.1 * delta.grad.sign()).requires_grad_()


def integrated_gradients(model, optimizer):
    for scale in (0.25, 0.5, 1.0):
        inputs = (scale * far).requires_grad_()
        torch.autograd.grad(model(inputs).sum(), inputs)


def cleared_by_none(model, optimizer):
    model(far).mean().backward()
    for p in model.parameters():
        p.grad = None


def cleared_in_place(model, optimizer):
    model(far).mean().backward()
    for p in model.parameters():
        p.grad.zero_()
    for p in model.parameters():
        p.grad = None


def cleared_by_the_model_with_zeros(model, optimizer):
    model(far).mean().backward()
    model.zero_grad(set_to_none=False)


def cleared_by_foreach(model, optimizer):
    model(far).mean().backward()
    torch._foreach_zero_([p.grad for p in model.parameters()])


def cleared_by_another_optimizer(model, optimizer):
    other = torch.optim.SGD(model.parameters(), lr=0.0)
    model(far).mean().backward()
    other.step()
    other.zero_grad()


def gradient_norms_only(model, optimizer):
    torch.autograd.grad(model(far).square().mean(), list(model.parameters()))


def power_iteration(model, optimizer):
    """The sharpness, from products with the Hessian."""
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(model(far).square().mean(), parameters, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in slopes), parameters, allow_unused=True)


def jacobian(model, optimizer):
    torch.autograd.functional.jacobian(model, far[:2])
    torch.func.jacrev(model)(far[0])
    torch.func.vmap(torch.func.grad(lambda one: model(one).sum()))(far)


def teacher_by_functional_call(model, optimizer):
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    functional_call(model, average, far)


def sharpness_aware(model, optimizer):
    """SAM: gradients at one point are taken away again, those at another count."""
    model(far).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * p.grad)
            p.grad = None


GRADIENTS_LEFT_ALONE = [
    saliency,
    projected_gradient_attack,
    integrated_gradients,
    gradient_norms_only,
    power_iteration,
    jacobian,
    teacher_by_functional_call,
]
CLEARED = [
    generators_loss_through,
    cleared_by_none,
    cleared_in_place,
    cleared_by_the_model_with_zeros,
    cleared_by_foreach,
    cleared_by_another_optimizer,
    sharpness_aware,
]


@pytest.mark.parametrize("disturb", GRADIENTS_LEFT_ALONE + CLEARED)
def test_what_gave_the_weights_nothing_leaves_no_trace(disturb):
    def program(model, optimizer):
        disturb(model, optimizer)
        model(x).square().mean().backward()

    assert error(factor(program), inverse_of(x)) < 1e-4


@pytest.mark.parametrize("disturb", GRADIENTS_LEFT_ALONE)
def test_nor_after_the_backward_that_counts(disturb):
    def program(model, optimizer):
        model(x).square().mean().backward()
        disturb(model, optimizer)

    assert error(factor(program), inverse_of(x)) < 1e-4


@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_a_gradient_that_is_dropped_and_not_made_again_leaves_no_trace(pairs):
    """A generator's step through a discriminator of the same model, which gives up what it got and stands still."""
    model = nn.ModuleDict({"generator": nn.Linear(5, 5), "critic": mlp(5, 8, 1)})
    optimizer = KFQN(model, pairs=pairs, refresh=1)
    train(optimizer, lambda: model["critic"](model["generator"](x)).square().mean(), 3)
    critic = {name: copy.deepcopy(optimizer.state[p]) for name, p in model["critic"].named_parameters()}
    own = optimizer.layers["generator"].activation.H.clone()
    optimizer.zero_grad()
    model["critic"](model["generator"](far)).mean().backward()
    model["critic"].zero_grad()
    optimizer.step()
    assert not torch.equal(optimizer.layers["generator"].activation.H, own)
    for name, p in model["critic"].named_parameters():
        assert all(torch.equal(value, critic[name][key]) for key, value in optimizer.state[p].items())


@pytest.mark.parametrize("disturb", [saliency, projected_gradient_attack, jacobian])
def test_between_forward_and_backward_too(disturb):
    def program(model, optimizer):
        loss = model(x).square().mean()
        disturb(model, optimizer)
        loss.backward()

    assert error(factor(program), inverse_of(x)) < 1e-4


@pytest.mark.parametrize("disturb", [cleared_by_none, saliency, jacobian, gradient_norms_only])
def test_pairs_are_those_of_an_undisturbed_run(disturb):
    runs = []
    for disturbed in (False, True):
        model = mlp(5, 8, 1)
        optimizer = KFQN(model, pairs="next_batch", lr=0.02)
        for step in range(8):
            optimizer.zero_grad()
            if disturbed:
                disturb(model, optimizer)
            with silence():
                model(x + step).square().mean().backward()
                optimizer.step()
        runs.append(model)
    assert difference(*runs) < 1e-5


# -- losses made of derivatives


def wgan_penalty(model, batch):
    inputs = batch.clone().requires_grad_()
    out = model(inputs)
    slopes = torch.autograd.grad(out.sum(), inputs, create_graph=True)[0]
    return out.mean() + (slopes.norm(dim=1) - 1).square().mean()


def penalty_alone(model, batch):
    inputs = batch.clone().requires_grad_()
    return torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)[0].square().sum(1).mean()


def second_derivative(model, batch):
    inputs = batch.clone().requires_grad_()
    slopes = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)[0]
    twice = torch.autograd.grad(slopes[:, 0].sum(), inputs, create_graph=True)[0]
    return (twice[:, 0] - 1).square().mean()


def contractive(model, batch):
    """Penalises the slope of a hidden layer, beside the loss."""
    h = model[0](batch)
    inner = torch.autograd.grad(torch.tanh(h).sum(), h, create_graph=True)[0]
    return model[2](torch.tanh(h)).square().mean() + inner.square().mean()


@pytest.mark.parametrize("loss", [wgan_penalty, penalty_alone, second_derivative, contractive])
def test_inner_gradients_of_a_penalty_are_no_gradients_of_the_loss(loss):
    """The bias's gradient is the sum over samples of that of h: what `H_g` is to learn from."""
    torch.manual_seed(0)
    model = mlp(5, 8, 1).double()
    optimizer = KFQN(model, lr=0.02, pairs="next_batch", pair_momentum=0.0, refresh=1, activation_factor="action")
    batches, bias, h = [x.double(), far.double()], [], []
    with heard() as messages:
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            bias.append(model[0].bias.grad.clone())
            h.append(model[0](batch).detach().mean(0))
            optimizer.step()
    # Where the loss knows nothing but slopes, no gradient comes to the last layer's h, and yet to its weight.
    assert ["2" in text for text in messages] == ([True] if loss in (penalty_alone, second_derivative) else [])
    layer = optimizer.layers["0"]
    y = bias[1] - bias[0]
    assert error(layer.gradient.y_mean[0], y) < 1e-9
    assert error(layer.gradient.s_mean[0], h[1] - h[0]) < 1e-9


# -- the scale of a loss


def scaled_training(kind, pairs, *, scaler):
    model = mlp(5, 8, 3)
    optimizer = KFQN(model, pairs=pairs, lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaler, growth_interval=3)
    for step in range(10):
        optimizer.zero_grad()
        loss = (model(x + 0.1 * step) - 1).square().mean()
        scaler.scale(loss).backward()
        if kind != "step":
            scaler.unscale_(optimizer)
        if kind == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        with silence():
            scaler.step(optimizer)
        scaler.update()
    return model, optimizer


@pytest.mark.parametrize("kind", ["step", "unscale", "clip"])
@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_the_scale_of_a_scaler_is_in_nothing(kind, pairs):
    (one, with_it), (two, without) = (scaled_training(kind, pairs, scaler=on) for on in (True, False))
    if kind == "clip" and pairs:  # without a scaler pairs are of unclipped gradients
        assert all(p.isfinite().all() for p in one.parameters())
        for name, layer in with_it.layers.items():
            assert layer.gradient.y_mean.abs().max() < 10 * without.layers[name].gradient.y_mean.abs().max()
        return
    assert difference(one, two) < 1e-4
    for name, layer in with_it.layers.items():
        assert error(layer.activation.H, without.layers[name].activation.H) < 1e-4
        if pairs:
            own = without.layers[name].gradient
            assert error(layer.gradient.y_mean, own.y_mean) < 1e-3
            assert error(layer.gradient.inverse.dense(), own.inverse.dense()) < 1e-3


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("first", [0, 2])
def test_a_step_that_a_scaler_skips_changes_nothing(unscale, first):
    model, plain = mlp(5, 8, 3), mlp(5, 8, 3)
    optimizer, of_plain = KFQN(model), KFQN(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with silence():
        for step in range(6):
            bad = step == first
            optimizer.zero_grad()
            loss = model(x).square().mean() * (torch.inf if bad else 1.0)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            before = values(model)
            scaler.step(optimizer)
            scaler.update()
            assert len(still(model, before)) == (4 if bad else 0)
        train(of_plain, lambda: plain(x).square().mean(), 5)
    assert scaler.get_scale() == 32.0
    assert error(H_of(optimizer, "0"), H_of(of_plain, "0")) < 1e-4
    # A skipped step moves nothing; the interval between updates may count it.
    assert difference(model, plain) < 1e-4

"""KFQN against the independent reference, and its contract with users."""

import copy
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kfqn_core import KFQN, presets
from kfqn_core.lab.checks import relative_error
from kfqn_core.maths.algebra import unvec, vec
from kfqn_core.training.options import refreshes
from tests.reference_kbfgs import ReferenceKBFGS, bfgs_formula

WIDTHS = (6, 9, 4, 5)
STEPS = 20
METHODS = {
    "default": {},
    "KBFGS_2020": presets.KBFGS_2020,
    "KBFGS_L_2020": presets.KBFGS_L_2020,
    "KFQN_CNN_2021": presets.KFQN_CNN_2021,
    "KFQN_2022": presets.KFQN_2022,
    "next_batch": {"pairs": "next_batch"},
    "low_rank": {"activation_factor": "low_rank", "rank": 2},
    "inverse": {"activation_factor": "inverse", "activation_decay": 0.9, "step_length": "normalised"},
}
TOLERANCE = 1e-10  # twenty steps of float64 rounding, each amplified by the conditioning of H (about 1e3)


def tanh_network(widths=WIDTHS, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def linear_layers(model):
    return [module for module in model if isinstance(module, nn.Linear)]


def square_loss(output, target):
    return 0.5 * ((output - target) ** 2).sum(1).mean()


def robust_loss(output, target):
    """Non-convex in the output (Geman-McClure), so that negative curvature reaches every layer."""
    squares = (output - target) ** 2
    return (squares / (1 + squares)).sum(1).mean()


def classification_loss(output, target):
    return nn.functional.cross_entropy(output, target.argmax(1))


def batches(count=5, samples=16, widths=WIDTHS, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    teacher = tanh_network(widths, seed=99).to(dtype)
    pairs = []
    for _ in range(count):
        x = torch.randn(samples, widths[0], generator=generator, dtype=dtype)
        noise = torch.randn(samples, widths[-1], generator=generator, dtype=dtype)
        pairs.append((x, (teacher(x) + 0.3 * noise).detach()))
    return pairs


def closure_for(model, optimizer, loss_fn, x, y):
    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, data, steps, loss_fn=square_loss):
    losses = []
    for k in range(steps):
        losses.append(optimizer.step(closure_for(model, optimizer, loss_fn, *data[k % len(data)])).item())
    return losses


def matrices(model):
    return [torch.cat([m.weight, m.bias[:, None]], 1).detach().numpy() for m in linear_layers(model)]


def error(actual, expected):
    return relative_error(torch.as_tensor(actual), torch.as_tensor(expected))


@pytest.mark.parametrize("loss_fn", [square_loss, classification_loss, robust_loss])
@pytest.mark.parametrize("memory", [None, 5, 100])
def test_kbfgs_is_the_2020_method(memory, loss_fn):
    """Parameters, H_a, H_g and averaged pairs after each of twenty steps, dense and limited-memory (window sliding)."""
    data = batches()
    model = tanh_network()
    reference = ReferenceKBFGS(matrices(model), loss_fn, lr=0.3, memory=memory)
    preset = presets.KBFGS_2020 if memory is None else {**presets.KBFGS_L_2020, "memory": memory}
    optimizer = KFQN(model, lr=0.3, **preset)
    reference.warm_start(data)
    optimizer.warm_start(x for x, _ in data)
    for k in range(STEPS):
        x, y = data[k % len(data)]
        loss = optimizer.step(closure_for(model, optimizer, loss_fn, x, y))
        assert loss.item() == pytest.approx(reference.step(x.numpy(), y.numpy()), rel=TOLERANCE)
        for i, (layer, W) in enumerate(zip(optimizer.layers.values(), matrices(model), strict=True)):
            assert error(W, reference.W[i]) < TOLERANCE
            assert error(layer.M[0], reference.M[i]) < TOLERANCE
            assert error(layer.activation.A[0], reference.A[i]) < TOLERANCE
            assert error(layer.activation.H[0], reference.H_a[i]) < TOLERANCE
            assert error(layer.gradient.inverse.dense()[0], reference.H_g[i]) < TOLERANCE
            # The reference takes old minus new.
            assert error(-layer.gradient.s_mean[0], reference.s_mean[i]) < TOLERANCE
            assert error(-layer.gradient.y_mean[0], reference.y_mean[i]) < TOLERANCE
    if memory is not None:
        kept = np.array([[s for s, _ in pairs][-1] for pairs in reference.pairs[:1]])
        assert error(-optimizer.layers["0"].gradient.inverse.S[0, -1], kept[0]) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"step_length": "normalised"}])
def test_default_is_the_activation_factor_with_a_normalised_step(options):
    """Four steps of the default, with a matrix in every layer, against the same few lines in NumPy."""
    data = batches()
    model = tanh_network()
    optimizer = KFQN(model, lr=0.03, activation_factor="action", **options)
    expected = matrices(model)
    M = [np.zeros_like(W) for W in expected]
    H, squares = [None] * len(M), [0.0] * len(M)
    for k in range(4):
        x, y = data[k]
        optimizer.step(closure_for(model, optimizer, square_loss, x, y))
        gradients = ReferenceKBFGS(expected, square_loss, lr=0.0)
        inputs, _, _, grads, _ = gradients.evaluate(expected, x.numpy(), y.numpy())
        for i, a in enumerate(inputs):
            A = a.T @ a / len(a)
            if k == 0:
                H[i] = np.linalg.inv(A + 0.03 * np.eye(len(A)))
            M[i] = 0.9 * M[i] + 0.1 * grads[i]
            D = M[i] @ H[i]
            if options:
                expected[i] = expected[i] - 0.03 * 0.2 * np.sqrt(D.size) / np.linalg.norm(D) * D
            else:
                squares[i] = 0.9 * squares[i] + 0.1 * (grads[i] ** 2).sum()
                share = min(1.0, np.linalg.norm(M[i]) / np.sqrt(squares[i]) / 0.3)
                rows = np.linalg.norm(D, axis=1, keepdims=True)
                expected[i] = expected[i] - 0.03 * share * 3 * D / (rows + 1e-3 * rows.mean())
            s = H[i] @ a.mean(0)
            H[i] = bfgs_formula(H[i], s, A @ s + 0.03 * s)
        for actual, W in zip(matrices(model), expected, strict=True):
            assert error(actual, W) < TOLERANCE


def test_direction_is_the_kronecker_inverse_applied_to_the_momentum():
    data = batches()
    model = tanh_network()
    optimizer = KFQN(model, lr=0.3, **presets.KBFGS_2020)
    train(model, optimizer, data, 8)
    for layer in optimizer.layers.values():
        H = torch.kron(layer.activation.H[0], layer.gradient.inverse.dense()[0])
        expected = unvec(H @ vec(layer.M[0]), layer.view.d_out)
        assert error(layer.direction()[0], expected) < 1e-13


@pytest.mark.parametrize("preset", METHODS.values(), ids=METHODS)
def test_training_lowers_the_loss(preset):
    data = batches(count=20, samples=64)
    model = tanh_network()
    optimizer = KFQN(model, lr=0.3 if preset.get("step_length") == "raw" else 0.03, **preset)
    losses = train(model, optimizer, data, 100)
    floor = 0.5 * WIDTHS[-1] * 0.3**2  # the targets carry noise of standard deviation 0.3 in each coordinate
    assert np.mean(losses[-10:]) - floor < 0.3 * (np.mean(losses[:3]) - floor)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("step_length", ["raw", "normalised", "normalised_rows"])
def test_heavy_ball_is_the_average_at_another_rate(step_length, monkeypatch):
    """`M <- 0.9 M + G` at the rate 0.1 lr if raw, at the same rate if normalised: the documentation says so.

    Of normalised rows where steps have their full length, which an M of ten times the size always has.
    """
    monkeypatch.setattr("kfqn_core.training.steadiness.KEPT", 1e-3)
    averaged, ball = tanh_network(), tanh_network()
    data = batches()
    train(averaged, KFQN(averaged, lr=0.05, step_length=step_length), data, 6)

    def accumulate(moves, settings, finite, lengths, drop):
        for layer in ball_optimizer.layers.values():
            state = ball_optimizer.state
            for p in (layer.weight, layer.bias):
                state[p]["M"].mul_(settings[0]["momentum"]).add_(p.grad)

    monkeypatch.setattr("kfqn_core.training.moves.Moves.average", accumulate)
    lr = 0.05 * (0.1 if step_length == "raw" else 1.0)
    ball_optimizer = KFQN(ball, lr=lr, step_length=step_length)
    train(ball, ball_optimizer, data, 6)
    for a, b in zip(averaged.parameters(), ball.parameters(), strict=True):
        assert error(a, b) < 1e-12


def test_linear_layers_may_differ():
    """The mixture of the first version: a running A and double damping where layers are fully connected."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).double()
    linear = {"activation_decay": 0.9, "pair_damping": "double"}
    optimizer = KFQN(model, lr=0.05, **presets.KFQN_CNN_2021, linear=linear)
    conv, full = optimizer.layers["0"], optimizer.layers["2"]
    assert conv.activation.A is None
    assert full.activation.A is not None
    assert (conv.gradient.pair_damping, full.gradient.pair_damping) == ("levenberg-marquardt", "double")
    data = [(torch.randn(8, 1, 4, 4).double(), torch.randn(8, 3).double())]
    train(model, optimizer, data, 2, nn.functional.mse_loss)
    with pytest.raises(ValueError, match=r"linear takes .* got \['rank'\]"):
        KFQN(model, linear={"rank": 2})
    with pytest.raises(ValueError, match="activation_decay must be"):
        KFQN(model, linear={"activation_decay": 2.0})


def test_refresh_grows_from_every_step_to_every_tenth():
    fixed = [step for step in range(12) if refreshes(step, 4)]
    assert fixed == [0, 4, 8]
    grown = [step for step in range(400) if refreshes(step, None)]
    assert grown[:10] == list(range(10))
    assert [step for step in grown if 10 <= step < 30] == [*range(10, 20, 2), *range(21, 30, 3)]
    assert {b - a for a, b in pairwise(grown) if a >= 90} == {10}


class Noisy(nn.Module):
    """Batch norm and dropout: everything a second pass could disturb."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(12, 5)
        )

    def forward(self, x):
        return self.body(x)


def test_second_pass_sees_the_same_dropout_mask_and_leaves_no_trace():
    """With lr = 0 both passes are at the same point: the pair is exactly zero, unless masks are redrawn."""
    x, y = batches(dtype=torch.float32)[0]
    torch.manual_seed(0)
    model = Noisy()
    optimizer = KFQN(model, lr=0.0, **presets.KBFGS_2020)
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    twin_loss = square_loss(twin(x), y)
    twin_loss.backward()
    state_after_one_pass = torch.get_rng_state()
    torch.set_rng_state(state)
    loss = optimizer.step(closure_for(model, optimizer, square_loss, x, y))
    assert torch.equal(loss, twin_loss)
    assert torch.equal(torch.get_rng_state(), state_after_one_pass)
    for buffer, expected in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, expected)
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.requires_grad
        assert torch.equal(p.grad, expected.grad)
    for layer in optimizer.layers.values():
        assert not layer.gradient.s_mean.any()
        assert not layer.gradient.y_mean.any()


def test_second_pass_needs_no_weight_gradients():
    x, y = batches()[0]
    model = tanh_network()
    optimizer = KFQN(model, lr=0.1, **presets.KBFGS_2020)
    requires_grad = []

    def closure():
        requires_grad.append([p.requires_grad for p in model.parameters()])
        return closure_for(model, optimizer, square_loss, x, y)()

    optimizer.step(closure)
    assert all(requires_grad[0])
    assert not any(requires_grad[1])


def test_second_pass_leaves_gradients_that_a_closure_fills_with_zeros():
    x, y = batches()[0]
    model, twin = tanh_network(), tanh_network()
    optimizer = KFQN(model, lr=0.1, **presets.KBFGS_2020)

    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = square_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    square_loss(twin(x), y).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_refresh_evaluates_again_only_on_refresh_steps():
    data = batches()
    model = tanh_network()
    optimizer = KFQN(model, lr=0.1, **{**presets.KBFGS_2020, "refresh": 3})
    calls = []
    for k in range(6):
        closure = closure_for(model, optimizer, square_loss, *data[k % 5])
        optimizer.step(lambda closure=closure, k=k: (calls.append(k), closure())[1])
    assert calls == [0, 0, 1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 3, 6}),
        ({"pairs": "second_pass"}, {0, 3, 6}),
        ({"pairs": "next_batch"}, set(range(8))),  # the last mini-batch is remembered
        ({"activation_factor": "action", "activation_decay": 0.9}, set(range(8))),  # so is the average of A
    ],
)
def test_between_updates_mini_batches_are_not_looked_at(options, expected):
    """And nothing is lost: a twin that always looks moves alike, bit for bit."""
    data, ends = batches(), []
    for always in (False, True):
        model = tanh_network()
        optimizer = KFQN(model, lr=0.1, **options, refresh=3)
        looked = set()
        for k in range(8):
            closure = closure_for(model, optimizer, square_loss, *data[k % 5])

            def watched(closure=closure, optimizer=optimizer, looked=looked, k=k):
                loss = closure()
                looked.update({k} if optimizer.plan.hooks["0"].pending else ())
                return loss

            optimizer.step(watched)
            if always:
                for name in optimizer.plan.hooks:
                    optimizer.plan.hooks[name].watching = True
        assert looked == (set(range(8)) if always else expected)
        ends.append(snapshot(model, optimizer).values())
    assert all(torch.equal(a, b) or (a.isnan() & b.isnan()).all() for a, b in zip(*ends, strict=True))


def test_evaluation_and_copies_leave_no_trace():
    x, y = batches()[0]
    model = tanh_network()
    optimizer = KFQN(model, lr=0.1, **presets.KBFGS_2020)
    train(model, optimizer, [(x, y)], 2)
    with torch.no_grad():
        model(x)
    copy.deepcopy(model)(x).sum().backward()
    replica = copy.copy(model)  # shares the hooks, as the replicas of nn.DataParallel do
    replica._modules = {name: copy.copy(module) for name, module in model.named_children()}
    replica(x).sum().backward()
    model(x)  # a training forward that backward never reaches
    assert not optimizer.plan.hooks.pop()
    square_loss(model(x), y).backward()
    optimizer.zero_grad()  # a step that was given up
    assert not optimizer.plan.hooks.pop()
    optimizer.remove_hooks()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def snapshot(model, optimizer):
    tensors = {f"p{i}": p for i, p in enumerate(model.parameters())}
    for name, layer in optimizer.layers.items():
        tensors |= {f"{name}.{key}": value for key, value in layer.tensors().items()}
    return {key: value.detach().clone() for key, value in tensors.items()}


def test_a_group_without_curvature_gets_the_rate_of_the_fallback():
    model = tanh_network()
    optimizer = KFQN(model, 0.03, model[0].parameters(), fallback_lr=0.002)
    optimizer.add_param_group({"params": model[2].parameters(), "curvature": False})
    optimizer.add_param_group({"params": model[4].parameters(), "curvature": False, "lr": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.002, 0.5]


def test_a_parameter_that_was_replaced_loads_the_state_of_its_name():
    """Three steps, with a state saved and loaded after two; a new tensor in the place of a weight changes nothing."""
    moved = []
    for replaced in (False, True):
        model = tanh_network()
        optimizer = KFQN(model, lr=0.1, **presets.KBFGS_2020)
        train(model, optimizer, batches(), 2)
        state = copy.deepcopy(optimizer.state_dict())
        if replaced:
            model[2].weight = nn.Parameter(model[2].weight.detach().clone())
        optimizer.load_state_dict(state)
        train(model, optimizer, batches()[2:], 1)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert relative_error(moved[1], moved[0]) < 1e-14


@pytest.mark.parametrize("poison", ["input", "target"])
@pytest.mark.parametrize("preset", METHODS.values(), ids=METHODS)
def test_a_batch_with_nan_changes_nothing_but_the_count(preset, poison):
    data = batches()
    model = tanh_network()
    optimizer = KFQN(model, lr=0.1, **preset)
    train(model, optimizer, data, 3)
    before = snapshot(model, optimizer)
    x, y = (t.clone() for t in data[3])
    (x if poison == "input" else y)[0, 0] = torch.nan
    train(model, optimizer, [(x, y)], 1)
    after = snapshot(model, optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert optimizer.skipped_steps == 1
    train(model, optimizer, data, 1)
    assert not torch.equal(before["p0"], model[0].weight)


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize("preset", METHODS.values(), ids=METHODS)
def test_resume_equals_uninterrupted_bitwise(preset, stop):
    data = batches(dtype=torch.float32)
    model = tanh_network(dtype=torch.float32)
    optimizer = KFQN(model, lr=0.1, **preset)
    if preset:
        optimizer.warm_start(x for x, _ in data)
    train(model, optimizer, data, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, data, 5)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = tanh_network(seed=5, dtype=torch.float32)
    resumed = KFQN(twin, lr=0.7, **preset)
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(twin, resumed, data, 5)
    expected, actual = snapshot(model, optimizer), snapshot(twin, resumed)
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_factors_keep_their_dtype_with_bfloat16_parameters():
    data = batches(dtype=torch.float32)
    data = [(x.bfloat16(), y.bfloat16()) for x, y in data]
    model = tanh_network(dtype=torch.bfloat16)
    optimizer = KFQN(model, lr=0.1, **presets.KBFGS_2020)
    train(model, optimizer, data, 3)
    before = snapshot(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    after = snapshot(model, optimizer)
    for layer in optimizer.layers.values():
        assert {t.dtype for t in layer.tensors().values()} == {torch.float32}
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("step_length", ["raw", "normalised", "normalised_rows"])
def test_a_rate_in_the_param_groups_may_be_a_tensor_or_zero(step_length):
    data, ends = batches(), []
    for rate in (0.01, torch.tensor(0.01, dtype=torch.float64), 0.0):
        model = tanh_network()
        optimizer = KFQN(model, lr=0.1, step_length=step_length)
        for group in optimizer.param_groups:
            group["lr"] = rate
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, data, 3)
        ends.append([p - q for p, q in zip(model.parameters(), before, strict=True)])
    assert all(error(a, b) < 1e-12 for a, b in zip(*ends[:2], strict=True))
    assert all((move == 0).all() for move in ends[2])


def test_schedulers_and_decay_act_through_the_param_groups():
    data = batches()
    model = tanh_network()
    optimizer = KFQN(model, lr=0.1, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.0 if k else 1.0)
    train(model, optimizer, data, 1)
    scheduler.step()
    before = snapshot(model, optimizer)
    train(model, optimizer, data, 1)
    after = snapshot(model, optimizer)
    assert torch.equal(before["p0"], after["p0"])
    assert not torch.equal(before["0.M"], after["0.M"])


class Mixed(nn.Module):
    """One free layer, one frozen, one tied, one not supported."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.free = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.LayerNorm(6)
        self.tied = nn.Linear(6, 7, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, tokens):
        return self.tied(self.norm(self.frozen(torch.relu(self.free(self.embed(tokens))))))


def test_other_parameters_move_by_their_averaged_gradient():
    torch.manual_seed(0)
    model = Mixed().double()
    tokens = torch.randint(7, (4, 3))
    optimizer = KFQN(model, lr=0.1, **presets.KBFGS_2020)
    assert list(optimizer.layers) == ["free"]
    frozen = model.frozen.weight.clone()
    norm, embedding = model.norm.weight.clone(), model.embed.weight.clone()

    def loss_fn(output, target):
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    train(model, optimizer, [(tokens, tokens)], 1, loss_fn)
    tau = presets.KBFGS_2020["weight_decay"]
    assert error(norm - model.norm.weight, 0.1 * 0.1 * (model.norm.weight.grad + tau * norm)) < 1e-12
    assert error(embedding - model.embed.weight, 0.1 * 0.1 * (model.embed.weight.grad + tau * embedding)) < 1e-12
    assert torch.equal(frozen, model.frozen.weight)


def test_an_unused_layer_is_left_alone():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)
            self.use_b = True

        def forward(self, x):
            return self.b(x) if self.use_b else self.a(x)

    data = batches()
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = KFQN(model, lr=0.1, **presets.KBFGS_2020)
    before = snapshot(model, optimizer)
    train(model, optimizer, data, 2)
    model.use_b = False
    train(model, optimizer, data, 1)
    after = snapshot(model, optimizer)
    assert not torch.equal(before["a.H_a"], after["a.H_a"])
    assert not torch.equal(before["b.H_a"], after["b.H_a"])
    assert torch.isfinite(model.a.weight).all()


def test_after_loading_a_state_the_next_mini_batch_is_looked_at():
    data = batches()
    ahead, behind = (tanh_network() for _ in range(2))
    optimizers = [KFQN(model, lr=0.1, refresh=3) for model in (ahead, behind)]
    train(ahead, optimizers[0], data, 3)
    train(behind, optimizers[1], data, 1)
    behind.load_state_dict(ahead.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for model, optimizer in zip((ahead, behind), optimizers, strict=True):
        train(model, optimizer, data, 4)  # the first of these updates curvature
    optimizers[0].remove_hooks()
    with pytest.raises(
        RuntimeError, match="hooks of this optimizer were removed"
    ):  # also where curvature would not be updated
        train(ahead, optimizers[0], data, 1)
    ends = (snapshot(ahead, optimizers[0]).values(), snapshot(behind, optimizers[1]).values())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_pair_of_consecutive_mini_batches_is_judged_by_the_gradient_before(monkeypatch):
    model, (x, y) = tanh_network(), batches()[0]
    optimizer = KFQN(model, lr=0.1, pairs="next_batch")
    train(model, optimizer, [(x, y)], 1)
    before = {name: layer.tensors()["g_last"].clone() for name, layer in optimizer.layers.items()}
    judges = []
    monkeypatch.setattr(
        "kfqn_core.estimate.gradient.GradientFactor.update",
        lambda self, s, y, g_mean, where: judges.append(g_mean.clone()),
    )
    train(model, optimizer, [(x, y)], 1)
    assert all(any(torch.equal(judge, g) for judge in judges) for g in before.values())
    assert not any(torch.equal(layer.tensors()["g_last"], before[name]) for name, layer in optimizer.layers.items())


@pytest.mark.parametrize(
    "options", [{"activation_factor": "action"}, presets.KBFGS_2020], ids=["default", "KBFGS_2020"]
)
def test_a_state_whose_matrices_are_not_quite_symmetric_is_loaded_as_if_they_were(options):
    """A rounding error off the diagonal would enter every H y and never leave."""
    model = tanh_network()
    optimizer = KFQN(model, lr=0.1, **options)
    state = copy.deepcopy(optimizer.state_dict())
    matrices = [v for tensors in state["state"].values() for k, v in tensors.items() if k in ("H_a", "H_g")]
    assert matrices
    for H in matrices:
        H[..., 0, 1] += 1e-6
    optimizer.load_state_dict(state)
    for layer in optimizer.layers.values():
        for factor in (layer.activation, *([] if layer.gradient is None else [layer.gradient])):
            H = factor.inverse.dense()
            assert torch.equal(H, H.mT)
            assert abs(H[0, 0, 1] - 5e-7) < 1e-12


def test_a_layer_that_is_first_used_between_updates_starts_there():
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5)}).double()
    optimizer = KFQN(model, lr=0.1, refresh=10, activation_factor="action")
    for k, (name, (x, y)) in enumerate(zip("aaba", batches(widths=(6, 5)), strict=False)):
        assert optimizer.layers["b"].started == (k > 2)
        optimizer.zero_grad()
        square_loss(model[name](x), y).backward()
        optimizer.step()
        if name == "b":
            a = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            exact = torch.linalg.inv(a.T @ a / len(a) + 0.03 * torch.eye(7, dtype=torch.float64))
            assert error(optimizer.layers["b"].activation.H[0], exact) < 1e-10


def test_sequences_train():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x, y = torch.randn(8, 4, 6).double(), torch.randn(8, 4, 5).double()
    optimizer = KFQN(model, lr=0.05, **presets.KBFGS_2020)
    losses = train(model, optimizer, [(x, y)], 30, nn.functional.mse_loss)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"pairs": "both"}, "pairs must be one of"),
        ({"damping": 0.0}, "damping must be a number > 0"),
        ({"damping": 1.0, "pairs": "second_pass"}, "damping must be below 1: double damping"),
        ({"memory": 5}, "memory must be None unless H_g is estimated"),
        ({"memory": 0, "pairs": "second_pass"}, "memory must be None or a whole number"),
        ({"mu1": 1.0}, "mu1 must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"decoupled_weight_decay": 1}, "decoupled_weight_decay must be True or False, got 1"),
        ({"pair_momentum": -0.1}, "pair_momentum must be"),
        ({"activation_decay": 1.0}, "activation_decay must be"),
        ({"weight_decay": -1e-5}, "weight_decay must be"),
        ({"refresh": 0}, "refresh must be None or a whole number >= 1, got 0"),
        ({"step_length": "long"}, "step_length must be one of"),
    ],
)
def test_options_are_checked_at_the_door(options, message):
    with pytest.raises(ValueError, match=message):
        KFQN(tanh_network(), **{"lr": 0.1, **options})


def test_clear_refusals():
    x, y = batches()[0]
    model = tanh_network()
    with pytest.raises(ValueError, match="no layer with trainable parameters"):
        KFQN(nn.Sequential(nn.LayerNorm(3)))
    optimizer = KFQN(model, lr=0.1, **presets.KBFGS_2020)
    with pytest.raises(RuntimeError, match=r"call step\(closure\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="no mini-batch"):
        optimizer.warm_start([])
    with pytest.raises(ValueError, match="does not fit the weight of layer"):
        optimizer.load_state_dict(KFQN(model, lr=0.1).state_dict())
    with pytest.raises(ValueError, match="not a state of KFQN"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="no forward of any layer was seen"):
        optimizer.step(lambda: torch.tensor(0.0))
    train(model, optimizer, [(x, y)], 1)
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.warm_start([x])


@pytest.mark.parametrize("preset", METHODS.values(), ids=METHODS)
def test_a_step_reads_nothing_on_the_host(preset):
    """Under FakeTensorMode a tensor has no value: any `.item()` or branch on one raises."""
    with FakeTensorMode():
        convolution = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU())
        model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(36, 5))
        optimizer = KFQN(model, lr=0.1, **preset)
        x, y = torch.zeros(16, 2, 5, 5), torch.zeros(16, 5)
        for _ in range(3):
            optimizer.step(closure_for(model, optimizer, square_loss, x, y))
        with pytest.raises(DataDependentOutputException):
            optimizer.skipped_steps  # noqa: B018 - reading the count does wait for the device


class Autocast(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x)


@pytest.mark.parametrize("preset", METHODS.values(), ids=METHODS)
def test_autocast_reaches_the_model_and_not_the_curvature(preset):
    """A step that stands under autocast is the step of a model whose forward alone does."""
    data = batches(dtype=torch.float32)
    narrow, wide = tanh_network(dtype=torch.float32), tanh_network(dtype=torch.float32)
    one, two = KFQN(narrow, lr=0.05, **preset), KFQN(wide, lr=0.05, **preset)
    for x, y in data[:4]:
        train(Autocast(narrow), one, [(x, y)], 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train(wide, two, [(x, y)], 1)
    expected, actual = snapshot(narrow, one), snapshot(wide, two)
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert {value.dtype for value in actual.values()} == {torch.float32}


def test_processes_are_named_by_a_group():
    with pytest.raises(TypeError, match="process_group must be a torch"):
        KFQN(nn.Linear(3, 2), process_group=3)

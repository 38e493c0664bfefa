"""The hooks: what copies and pickles of them do, and which passes they leave alone."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from kfqn_core import KFQN
from kfqn_core.estimate.hooks import Hooks
from kfqn_core.estimate.registered import Hook
from kfqn_core.lab.checks import relative_error
from kfqn_core.layers import parts
from tests.test_optimizer import METHODS, batches, closure_for, snapshot, square_loss, tanh_network, train


def through_torch_save(object_):
    file = io.BytesIO()
    torch.save(object_, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda object_: pickle.loads(pickle.dumps(object_)),
    "torch.save": through_torch_save,
}


def equal(one, two):
    """Bitwise, a NaN being equal to itself: factors that wait for a first mini-batch hold them."""
    return one.keys() == two.keys() and all(
        torch.equal(one[key].nan_to_num(7.0), two[key].nan_to_num(7.0)) for key in one
    )


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_of_the_model_works_and_the_original_hears_nothing_of_it(duplicate):
    data, model = batches(), tanh_network()
    optimizer = KFQN(model, lr=0.1)
    train(model, optimizer, data, 2)
    twin = duplicate(model)
    x, y = data[0]
    square_loss(twin(x), y).backward()
    assert not optimizer.plan.hooks.pop()
    own = KFQN(twin, lr=0.1)  # its hooks stand beside those that do nothing
    train(twin, own, data, 2)
    train(model, optimizer, data, 2)


@pytest.mark.parametrize("stop", [0, 3])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("preset", METHODS.values(), ids=METHODS)
def test_model_and_optimizer_copied_together_go_on_bitwise(preset, duplicate, stop):
    data, model = batches(dtype=torch.float32), tanh_network(dtype=torch.float32)
    optimizer = KFQN(model, lr=0.1, **preset)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)  # replaces `optimizer.step` by what does not pickle
    if preset:
        optimizer.warm_start(x for x, _ in data)
    train(model, optimizer, data, stop)
    twin, resumed = duplicate((model, optimizer))
    before = snapshot(model, optimizer)
    train(twin, resumed, data, 5)
    assert equal(snapshot(model, optimizer), before)
    train(model, optimizer, data, 5)
    assert equal(snapshot(model, optimizer), snapshot(twin, resumed))
    resumed.remove_hooks()
    assert not any(isinstance(hook, Hook) for module in twin.modules() for hook in module._forward_hooks.values())


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_made_between_updates_looks_at_its_first_mini_batch(duplicate):
    """It is alone until a forward pass shows it the ranks that it belongs to."""
    model = tanh_network()
    optimizer = KFQN(model, lr=0.1, refresh=3)
    train(model, optimizer, batches(), 1)
    _, resumed = duplicate((model, optimizer))
    assert not optimizer.plan.hooks["0"].watching
    assert resumed.plan.hooks["0"].watching


def test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own():
    data, model = batches(), tanh_network()
    optimizer = KFQN(model, lr=0.1)
    train(model, optimizer, data, 2)
    alone = copy.deepcopy(optimizer)
    train(model, optimizer, data, 2)
    before = snapshot(model, alone)
    alone.step(closure_for(model, alone, square_loss, *data[0]))  # gradients of other parameters than its own
    assert equal(snapshot(model, alone), before)


class Learner(nn.Module):
    """A module that owns its optimizer: a cycle."""

    def __init__(self):
        super().__init__()
        self.body = tanh_network()
        self.optimizer = KFQN(self, lr=0.1)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_module_that_owns_its_optimizer_is_copied_with_it(duplicate):
    data, one = batches(), Learner()
    train(one, one.optimizer, data, 2)
    two = duplicate(one)
    assert two.optimizer.plan.hooks is not one.optimizer.plan.hooks
    for learner in (one, two):
        train(learner, learner.optimizer, data, 3)
    assert equal(snapshot(one, one.optimizer), snapshot(two, two.optimizer))


def test_a_deleted_optimizer_is_gone_at_once():
    """No cycle keeps its factors until the garbage collector comes by; the model trains on."""
    data, model = batches(), tanh_network()
    optimizer = KFQN(model, lr=0.1)
    train(model, optimizer, data, 1)
    hooks = weakref.ref(optimizer.plan.hooks)
    gc.disable()
    try:
        del optimizer
        assert hooks() is None
    finally:
        gc.enable()
    square_loss(model(data[0][0]), data[0][1]).backward()


@pytest.mark.parametrize("preset", METHODS.values(), ids=METHODS)
def test_functional_call_with_the_models_own_parameters_is_the_model(preset):
    data, model, twin = batches(), tanh_network(), tanh_network()
    usual, functional = KFQN(model, lr=0.1, **preset), KFQN(twin, lr=0.1, **preset)

    def call(x):
        return functional_call(twin, dict(twin.named_parameters()), (x,))

    train(model, usual, data, 4)
    train(call, functional, data, 4)
    assert equal(snapshot(model, usual), snapshot(twin, functional))

    def with_others(x):
        return functional_call(twin, {name: p.detach().requires_grad_() for name, p in twin.named_parameters()}, (x,))

    before = snapshot(twin, functional)
    functional.zero_grad()
    functional.step(closure_for(with_others, functional, square_loss, *data[0]))  # the gradients are the others'
    assert equal(snapshot(twin, functional), before)


def test_transforms_of_torch_func_leave_no_trace():
    """Per-sample gradients of the training model between two steps."""
    (x, y), *_ = batches()
    model = tanh_network()
    optimizer = KFQN(model, lr=0.1, pairs="next_batch")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return square_loss(functional_call(model, parameters, (x[None],)), y[None])

    gradients = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    vmap(lambda x: functional_call(model, parameters, (x,)))(x)  # the layer sees no batch
    assert not optimizer.plan.hooks.pop()
    train(model, optimizer, [(x, y)], 1)
    assert torch.allclose(gradients["0.weight"].mean(0), model[0].weight.grad, atol=1e-12)


def test_means_of_unequal_passes_are_those_over_all_their_samples_and_locations():
    """Two passes that differ in samples and in locations; nothing that is kept holds on to their graphs."""
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 4, 1).double()
    model = nn.Sequential(layer, nn.Tanh())
    hooks = Hooks({"0": (layer, *parts(layer))}, outputs=True)
    inputs = [torch.randn(2, 3, 5).double(), torch.randn(7, 3, 1).double()]
    g = []
    for x in inputs:
        h = nn.functional.conv1d(x, layer.weight, layer.bias).detach().requires_grad_()
        (of_each,) = torch.autograd.grad(h.tanh().square().sum(), h)  # of a sum over samples: each one's own
        g.append(of_each.mT.reshape(-1, 4))
        (model(x).square().sum() / 9).backward()
    record = hooks.pop()["0"]
    a = torch.cat([nn.functional.pad(x.mT.reshape(-1, 3), (0, 1), value=1.0) for x in inputs])
    h = a @ torch.cat([layer.weight[..., 0], layer.bias[:, None]], 1).mT
    assert record.samples == 9
    assert abs(record.T - len(a) / 9) < 1e-14
    # float64 sums of 17 numbers
    assert relative_error(record.mean_input()[0], a.mean(0)) < 1e-14
    assert relative_error(record.mean_output()[0], h.mean(0)) < 1e-14
    assert relative_error(record.mean_gradient()[0], torch.cat(g).mean(0)) < 1e-14
    kept = [tensor for use in record.uses for tensor in (use.x, use.h_sum, use.g_sum)]
    assert not any(tensor.requires_grad for tensor in kept)

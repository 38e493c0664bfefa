"""What of captured steps can be said without a GPU; the rest is in test_gpu.py."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

import kfqn_core
from benchmarks.counting import count
from kfqn_core import KFQN
from kfqn_core.training.graphs import UNREAD
from tests.test_optimizer import METHODS


def test_a_model_on_the_cpu_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="on one CUDA device, and they are on cpu: move the model"):
        kfqn_core.capture(KFQN(model), lambda: None)


def test_a_state_that_is_saved_is_no_setting_that_has_changed():
    """What `state_dict` writes into the parameter groups, a captured step does not compare."""
    optimizer = KFQN(nn.Linear(3, 2))
    before = [set(group) for group in optimizer.param_groups]
    optimizer.state_dict()
    assert [group.keys() - keys - UNREAD for group, keys in zip(optimizer.param_groups, before, strict=True)] == [set()]


@pytest.mark.parametrize("method", METHODS)
def test_no_step_reads_a_value(method):
    """Forward, backward and four whole steps on tensors that have none: the first estimate and updates included."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 20), nn.Linear(20, 3))
        optimizer = KFQN(model, **METHODS[method])
        x, y = torch.randn(8, 2, 5, 5), torch.randint(3, (8,))

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)


def operations(layers, **options):
    """Of the step, and of watching forward and backward: what a training step does more than forward and backward."""

    def made():
        model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))), torch.randn(4, 8)

        def forward_backward():
            model.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        return model, forward_backward

    _, alone = made()
    model, forward_backward = made()
    optimizer = KFQN(model, **options)
    for _ in range(2):
        optimizer.step(forward_backward)
    return count(lambda: optimizer.step(forward_backward)).operations - count(alone).operations


@pytest.mark.parametrize("method", ["default", "low_rank"])
def test_operations_follow_the_number_of_shapes(method):
    """Between updates as many for sixteen layers of one shape as for two. With an update two more a layer: the hooks
    have its input saved for backward, with tensors of no elements, on the host.
    """
    between, updating = (
        {layers: operations(layers, **METHODS[method], refresh=refresh) for layers in (2, 9, 16)}
        for refresh in (1000, 1)
    )
    assert between[2] == between[9] == between[16], between
    assert updating[16] - updating[9] <= 2 * 7, updating


def test_only_a_kfqn_is_captured():
    with pytest.raises(TypeError, match="capture takes a KFQN, not Linear"):
        kfqn_core.capture(nn.Linear(3, 2), lambda: None)

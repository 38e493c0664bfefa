"""Models and states that are moved to another device, or cast."""

import copy

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from tests.field.programs import (
    H_of,
    difference,
    error,
    heard,
    inverse_of,
    mlp,
    randn,
    silence,
    still,
    train,
    twins,
    values,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_a_model_that_is_cast_goes_on(dtype, start, pairs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3), nn.PReLU())
    optimizer, x = KFQN(model, pairs=pairs), randn(8, 2, 6)
    with heard() as messages:
        train(optimizer, lambda: (model(x) - 1).square().mean(), start)
        model.to(dtype)
        before = values(model)
        losses = train(optimizer, lambda: (model(x.to(dtype)).float() - 1).square().mean(), 20)
    assert not messages
    assert not still(model, before)
    assert losses[-1] < losses[0]
    expected = torch.promote_types(dtype, torch.float32)
    assert all(layer.M.dtype == layer.activation.H.dtype == expected for layer in optimizer.layers.values())
    assert optimizer.skipped_steps == 0


def test_a_model_cast_to_double_goes_on_as_one_that_was_double():
    one, two = twins(mlp(5, 8, 3))
    one.double()
    of_one, of_two, x = KFQN(one), KFQN(two), randn(16, 5).double()
    two.double()
    with silence():
        train(of_one, lambda: one(x).square().mean(), 10)
        train(of_two, lambda: two(x).square().mean(), 10)
    assert difference(one, two) < 1e-9


def test_a_state_on_another_device_follows_the_parameters_when_loaded():
    """A trainer's order: the optimizer is made, the model goes to its device, then the state is loaded."""
    model, x = mlp(5, 8, 3), randn(16, 5)
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 3)
        state = copy.deepcopy(optimizer.state_dict())
        twin = copy.deepcopy(model)
        of_twin = KFQN(twin)
        twin.double()
        of_twin.load_state_dict(state)
        train(of_twin, lambda: twin(x.double()).square().mean(), 3)
        train(optimizer, lambda: model(x).square().mean(), 3)
    assert difference(model, twin) < 1e-4
    assert all(layer.M.dtype == torch.float64 for layer in of_twin.layers.values())


def test_only_a_part_is_cast():
    model, x = mlp(5, 8, 8, 3), randn(16, 5)
    optimizer = KFQN(model)
    cast = lambda: model[4].double()(model[3](model[2](model[1](model[0](x))).double()))  # noqa: E731
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 2)
        losses = train(optimizer, lambda: (cast() - 1).square().mean(), 10)
    assert losses[-1] < losses[0]
    assert optimizer.layers["4"].M.dtype == torch.float64
    assert optimizer.layers["2"].M.dtype == torch.float32


def test_to_empty_and_back():
    """A model made on "meta", given memory and values after its optimizer was made."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    with silence():
        optimizer = KFQN(model)
        model.to_empty(device="cpu")
        model.load_state_dict(mlp(5, 8, 3).state_dict())
        x, twin = randn(16, 5), mlp(5, 8, 3)
        train(optimizer, lambda: model(x).square().mean(), 5)
        train(KFQN(twin), lambda: twin(x).square().mean(), 5)
    assert difference(model, twin) < 0.3
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.fixture
def swapping():
    """Models that are cast, moved or loaded keep their parameters as objects, and get other memory in them."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0, 3])
def test_parameters_whose_memory_is_swapped_are_still_seen(swapping, dtype, start):
    """Weights that are loaded (the best so far), or cast, by torch.utils.swap_tensors, which drops hooks."""
    model, x = mlp(5, 8, 3), randn(16, 5)
    optimizer = KFQN(model, lr=0.0, refresh=1, activation_factor="inverse")
    train(optimizer, lambda: model(x).square().mean(), start)
    weights = list(model.parameters())
    optimizer.zero_grad()
    model.to(dtype).load_state_dict(model.state_dict())
    y = 3 * randn(16, 5, seed=2, dtype=dtype)
    with silence():
        train(optimizer, lambda: model(y).square().mean(), 2)
    assert all(p is q for p, q in zip(weights, model.parameters(), strict=True))  # this torch does swap
    assert error(H_of(optimizer, "0"), inverse_of(y)) < 1e-4  # float32, condition 400

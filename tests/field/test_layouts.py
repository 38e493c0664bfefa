"""Parameters, gradients and rates that are laid out, or begun with, in another way than most."""

import copy

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from tests.field.programs import ADAM, train


@pytest.mark.parametrize("how", ["sliced", "transposed", "channels last", "gradient"])
def test_what_adam_moves_is_moved_by_its_indices_and_nothing_beside_it(how):
    """Against torch's Adam, which is not fused; the memory around a slice stays."""
    torch.manual_seed(0)
    memory = torch.linspace(1, 2, 32)
    if how == "sliced":
        p = nn.Parameter(memory[::2])
    elif how == "transposed":
        p = nn.Parameter(memory.view(4, 8).T)
    elif how == "channels last":
        p = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    else:
        p = nn.Parameter(memory.clone().view(4, 8))
    model = nn.Linear(3, 2)
    model.register_parameter("extra", p)
    twin = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    optimizer, adam = KFQN(model), torch.optim.Adam([twin], **ADAM)
    around = memory[1::2].clone()
    for k in range(5):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
        p.grad = gradient.mT.contiguous().mT if how == "gradient" else torch.empty_like(p).copy_(gradient)
        twin.grad = gradient
        for layer in (model.weight, model.bias):
            layer.grad = None
        if k == 2 and how == "channels last":
            model.to(memory_format=torch.channels_last)
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        adam.step()
    assert (p - twin).abs().max() < 1e-6
    if how == "sliced":
        assert torch.equal(memory[1::2], around)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("begun", [0.0, 1e-6, 0.03])
def test_adams_rate_follows_the_largest_rate_so_far(begun, tensor):
    """Rates that are set by hand, from zero or next to it, as some training scripts do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = KFQN(model, torch.tensor(begun) if tensor else begun)
    before = copy.deepcopy(model[1].weight)
    x = torch.randn(16, 4)
    for k in range(5):
        for group in optimizer.param_groups:
            rate = 0.006 * (k + 1)
            group["lr"] = torch.tensor(rate) if tensor else rate
        train(optimizer, lambda: (model(x) - 1).square().mean(), 1)
    moved = (model[1].weight - before).abs().max().item()
    assert 0.001 < moved < 5 * 0.01 * 1.5  # five steps of Adam at 0.01 at most, each of its rate and a little more

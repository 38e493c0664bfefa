"""A second evaluation of a mini-batch, apart from the optimizer that asks for it."""

import warnings

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from kfqn_core.training.second_pass import SecondPass


def test_what_the_loss_trains_beside_the_model_is_frozen_too_and_all_is_as_it_was():
    """A parameter and a batch norm beside the model; an input that is differentiated is not frozen."""
    torch.manual_seed(0)
    model, norm, beside = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Parameter(torch.ones(2))
    x = torch.randn(4, 3, requires_grad=True)
    leaves = {"weight": model.weight, "beside": beside, "x": x}
    flags = []

    def closure():
        flags.append([leaf.requires_grad for leaf in leaves.values()])
        if len(flags) == 2:  # what torch says of hooks on a compiled module
            warnings.warn("Using `torch.compile(module)` when there are global hooks", stacklevel=1)
        loss = (beside * norm(model(x))).square().sum()
        loss.backward()
        return loss

    again = SecondPass(model, list(model.parameters()))
    loss = closure()
    again.protect(loss)
    gradients = [leaf.grad.clone() for leaf in leaves.values()]
    statistics = [buffer.clone() for buffer in norm.buffers()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again.evaluate(closure) == loss
    assert flags == [[True, True, True], [False, False, True]]
    assert all(torch.equal(leaf.grad, old) for leaf, old in zip(leaves.values(), gradients, strict=True))
    assert all(torch.equal(buffer, old) for buffer, old in zip(norm.buffers(), statistics, strict=True))
    assert all(leaf.requires_grad for leaf in (*leaves.values(), model.bias, norm.weight))
    assert not torch_module._global_forward_pre_hooks  # nobody else's forward is watched from now on

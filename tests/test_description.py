"""The table that says what the optimizer will do."""

import pytest
import torch
from torch import nn

from kfqn_core import KFQN, describe, presets


def model():
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3, bias=False).requires_grad_(False))


@pytest.mark.parametrize("options", [{}, presets.KBFGS_2020, presets.KBFGS_L_2020, {"activation_decay": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_bytes_are_the_bytes_held(options, dtype):
    network = model().to(dtype)
    optimizer = KFQN(network, **options)
    held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    assert describe(network, **options).state_bytes == held


def test_every_parameter_has_a_line():
    table = describe(model(), torch.zeros(2, 5, 8), **presets.KBFGS_2020)
    assert {row.name: row.kind for row in table.rows} == {
        "0": "Kronecker", "1.weight": "momentum", "1.bias": "momentum", "2.weight": "frozen",
    }  # fmt: skip
    assert table.rows[0].T == 5
    assert table.rows[0].shape == (16, 9)
    assert [row.kind for row in describe(model()).rows] == ["Kronecker", "Adam", "Adam", "frozen"]
    text = str(table)
    assert "H_a 9x9" in text
    assert "H_g 16x16" in text
    assert "of Adam's" in text


def test_describing_changes_nothing():
    network = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    describe(network, torch.ones(3, 8))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(p.device.type == "cpu" for p in network.parameters())

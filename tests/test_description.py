"""The table that says what the optimizer will do."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kfqn_core import KFQN, describe, presets
from kfqn_core.estimate.activation import ActivationFactor
from kfqn_core.estimate.low_rank import LowRankActivationFactor
from kfqn_core.training.selection import activation_factors


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


def sizes(*layers):
    return [SimpleNamespace(groups=1, d_in=d_in, d_out=d_out, diagonal_only=False) for d_in, d_out in layers]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        # Worked out by hand: matrices of d_in^2 against weights d_in d_out, a low-rank factor of 34 d_in.
        (sizes((64, 64)), "dense"),  # 4096 = 4096
        (sizes((65, 64)), "low"),  # 4225 > 4160
        (sizes((65, 64), (65, 128)), "dense dense"),  # the second layer's budget is left over for the first
        (sizes((513, 4096)), "low"),  # small enough, but too wide
        (
            sizes((129, 64), *[(65, 128)] * 2, (129, 64)),
            "dense dense dense low",
        ),  # of equal ones the last
        (sizes((200, 40), (100, 40), (34, 30)), "low low dense"),  # at 34 inputs low rank would be no smaller
    ],
)
def test_auto_keeps_matrices_within_the_memory_of_adam(layers, expected):
    words = {"action": "dense", "low_rank": "low"}
    assert " ".join(words[kind] for kind in activation_factors(layers, rank=16)) == expected


def test_auto_is_what_the_layers_get():
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Flatten(), nn.Linear(640, 80), nn.Linear(80, 90))
    kinds = {name: type(layer.activation) for name, layer in KFQN(model).layers.items()}
    assert kinds == {"0": ActivationFactor, "2": LowRankActivationFactor, "3": ActivationFactor}
    table = describe(model)
    assert table.state_bytes <= table.adam_bytes


def test_the_line_counts_shapes_and_not_the_pieces_in_which_large_layers_are_handled():
    with torch.device("meta"):
        layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)), nn.Linear(1024, 2))
    assert "in 9 layers of 2 shapes" in describe(layers).summary


def test_the_warning_says_how_the_rest_moves():
    def network():
        return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(100))

    with pytest.warns(UserWarning, match="mostly in LayerNorm, moves by Adam at fallback_lr"):
        KFQN(network())
    with pytest.warns(UserWarning, match="mostly in LayerNorm, moves by its averaged gradient at lr"):
        KFQN(network(), **presets.KBFGS_2020)


def test_a_warm_start_without_hooks_says_so():
    optimizer = KFQN(nn.Linear(3, 2))
    optimizer.remove_hooks()
    with pytest.raises(RuntimeError, match="the hooks of this optimizer were removed"):
        optimizer.warm_start([torch.ones(4, 3)])

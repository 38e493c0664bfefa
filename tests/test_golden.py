"""Golden trajectories: ten losses of every method in float64 from a fixed seed, as they were when the method was last
changed on purpose. They prove nothing about being right (the references do); they notice what changes unintentionally.

After an intended change, `python -m tests.test_golden` writes `tests/golden.json` anew; the commit explains the change.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from tests.test_optimizer import METHODS, train

FILE = Path(__file__).with_name("golden.json")


def trajectory(method):
    torch.manual_seed(0)
    # Everything a step can meet: a strided, a grouped and a biasless convolution, batch norm, dropout, a linear layer.
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.2),
        nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3),
    ).double()  # fmt: skip
    optimizer = KFQN(model, lr=0.05, **METHODS[method])
    data = [(torch.randn(12, 2, 8, 8).double(), torch.randint(3, (12,))) for _ in range(3)]
    return train(model, optimizer, data, 10, nn.CrossEntropyLoss())


@pytest.mark.parametrize("method", METHODS)
def test_trajectory_is_the_stored_one(method):
    # Ten steps amplify the last bits in which two machines differ; a changed method differs in the first digits.
    assert trajectory(method) == pytest.approx(json.loads(FILE.read_text())[method], rel=1e-8)


if __name__ == "__main__":
    FILE.write_text(json.dumps({method: trajectory(method) for method in METHODS}, indent=1) + "\n")

"""Golden trajectories: ten losses of every method in float64 from fixed numbers, as they were when the method was last
changed on purpose. They prove nothing about being right (the references do); they notice what changes unintentionally.

The numbers are NumPy's, whose generator has a stated algorithm: those of torch's are free to change with its version.

After an intended change, `python -m tests.test_golden` writes `tests/golden.json` anew; the commit explains the change.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kfqn_core import KFQN
from tests.test_optimizer import METHODS, train

FILE = Path(__file__).with_name("golden.json")


class Masked(nn.Module):
    """Dropout whose mask is drawn once, for all mini-batches."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x * self.mask


def trajectory(options, device="cpu"):
    """Ten losses of a network that has everything a step can meet.

    A strided, a grouped and a biasless convolution, batch norm, a mask, and two linear layers of one shape.
    """
    numbers = np.random.default_rng(0)

    def normal(*shape):
        return torch.from_numpy(numbers.normal(size=shape))

    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Tanh(),
        Masked(torch.from_numpy((numbers.random((12, 4, 4, 4)) < 0.8) / 0.8)),
        nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(24, 24), nn.Tanh(),
        nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(normal(*p.shape) / max(1, p[0].numel()) ** 0.5)
    data = [
        (normal(12, 2, 8, 8).to(device), torch.from_numpy(numbers.integers(3, size=12)).to(device)) for _ in range(3)
    ]
    model = model.to(device)
    return train(model, KFQN(model, lr=0.05, **options), data, 10, nn.CrossEntropyLoss())


@pytest.mark.parametrize("method", METHODS)
def test_trajectory_is_the_stored_one(method):
    # Ten steps amplify the last bits in which two machines differ; a changed method differs in the first digits.
    assert trajectory(METHODS[method]) == pytest.approx(json.loads(FILE.read_text())[method], rel=1e-8)


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: trajectory(options) for name, options in METHODS.items()}, indent=1) + "\n")

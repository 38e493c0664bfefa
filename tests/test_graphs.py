"""What of captured steps can be said without a GPU; the rest is in test_gpu.py."""

import pytest
from torch import nn

import kfqn_core
from kfqn_core import KFQN


def test_a_model_on_the_cpu_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="on one CUDA device, and they are on cpu: move the model"):
        kfqn_core.capture(KFQN(model), lambda: None)

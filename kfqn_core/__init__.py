"""Kronecker-factored quasi-Newton methods: K-BFGS and K-BFGS(L), and the exact checks behind them.

from kfqn_core import KFQN, describe, presets

optimizer = KFQN(model, lr=0.03)                        # as one uses Adam
optimizer = KFQN(model, lr=0.3, **presets.KBFGS_2020)   # the published method, with a closure
"""

from kfqn_core.layers import UnsupportedLayer
from kfqn_core.training import presets
from kfqn_core.training.describe import describe
from kfqn_core.training.graphs import capture
from kfqn_core.training.optimizer import KFQN

__all__ = ["KFQN", "UnsupportedLayer", "capture", "describe", "presets"]

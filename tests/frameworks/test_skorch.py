"""skorch: which hands an optimizer parameters and no model, so that one method has to be said anew."""

from __future__ import annotations

import pytest

pytest.importorskip("skorch", reason="skorch is not installed: its NeuralNet is not tried")

import copy
import pickle

import numpy as np
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping, LRScheduler
from torch import nn

from kfqn_core import KFQN


class Wide(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2), nn.Softmax(-1))

    def forward(self, x):
        return self.layers(x)


class KFQNClassifier(NeuralNetClassifier):
    """How KFQN is used in skorch: the module goes with what skorch gives every optimizer, `optimizer__...` included.

    skorch always passes a rate, and its own default is 0.01: say `lr=0.03`.
    """

    def initialize_optimizer(self, triggered_directly=None):
        groups, options = self.get_params_for_optimizer("optimizer", self.get_all_learnable_params())
        self.optimizer_ = KFQN(self.module_, params=groups[0], **options)
        return self


def data():
    x = np.random.RandomState(0).randn(256, 8).astype("float32")
    return x, (x[:, 0] * x[:, 1] > 0).astype("int64")


def made(**settings):
    torch.manual_seed(0)
    defaults = {"lr": 0.03, "max_epochs": 20, "verbose": 0, "batch_size": 32, "train_split": None}
    return KFQNClassifier(Wide, **{**defaults, **settings})


def test_without_the_model_one_sentence_says_what_is_needed():
    net = NeuralNetClassifier(Wide, optimizer=KFQN, max_epochs=1, verbose=0)
    with pytest.raises(TypeError, match=r"KFQN\(model\)") as caught:
        net.fit(*data())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer__pairs": "second_pass"},
        {"optimizer__param_groups": [("*bias", {"weight_decay": 0.0})], "optimizer__weight_decay": 1e-3},
        {"callbacks": [GradientNormClipping(1.0)]},
        {"callbacks": [LRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=20)]},
    ],
    ids=["plain", "second pass", "groups", "clipping", "cosine"],
)
def test_trains_with_the_module_passed_along(settings):
    x, y = data()
    net = made(**settings).fit(x, y)
    history = net.history[:, "train_loss"]
    assert history[-1] < 0.6 * history[0], history
    assert net.score(x, y) > 0.9


def test_goes_on_after_saving_and_loading(tmp_path):
    files = {f"f_{what}": str(tmp_path / what) for what in ("params", "optimizer", "history")}
    x, y = data()
    whole = made(max_epochs=4, iterator_train__shuffle=False).fit(x, y)
    whole.save_params(**files)
    whole.partial_fit(x, y)
    again = made(max_epochs=4, iterator_train__shuffle=False).initialize()
    again.load_params(**files)
    again.partial_fit(x, y)
    assert again.history[:, "train_loss"] == whole.history[:, "train_loss"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_goes_on_as_the_original(copied):
    x, y = data()
    net = made(max_epochs=3).fit(x, y)
    other = copied(net)
    for each in (net, other):
        torch.manual_seed(1)
        each.partial_fit(x, y)
    assert other.history[:, "train_loss"] == net.history[:, "train_loss"]


def test_settings_take_effect_as_everywhere_in_skorch():
    x, y = data()
    net = made().fit(x, y)
    net.set_params(optimizer__lr=0.01)
    assert net.optimizer_.param_groups[0]["lr"] == 0.01

"""Lightning: KFQN from `configure_optimizers`, where the model is the LightningModule and its parts are called."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning", reason="lightning is not installed: its Trainer is not tried")

import logging

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from kfqn_core import KFQN
from tests.frameworks.curvature import traces
from tests.frameworks.tasks import gratings

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning has advice on workers, loggers and much else


class Stripes(lightning.LightningModule):
    """A small network that is called as a part, `self.net(x)`, never as the module that KFQN was given."""

    def __init__(self, *, cosine=False, **options):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.GroupNorm(4, 16), nn.ReLU(),
            nn.Flatten(), nn.Linear(400, 32), nn.Tanh(), nn.Linear(32, 10),
        )  # fmt: skip
        self.cosine, self.options, self.losses, self.first = cosine, options, [], {}

    def configure_optimizers(self):
        optimizer = KFQN(self, **self.options)
        if not self.cosine:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)]

    def training_step(self, batch, index):
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs, batch, index):
        if self.trainer.global_step == 1 and self.options.get("activation_factor") == "inverse":
            self.first = traces(self.trainer.optimizers[0])


def made(seed=0, **options):
    torch.manual_seed(seed)
    return Stripes(**options)


def loader(batches, samples):
    data = [gratings(k, samples) for k in range(batches)]
    return DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True))), batch_size=samples)


def fit(module, data, folder, *, ckpt_path=None, **settings):
    """Train on the CPU, without what Lightning would write or print."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if "callbacks" not in settings:
        quiet["enable_checkpointing"] = False
    trainer = lightning.Trainer(default_root_dir=str(folder), **{**quiet, "max_epochs": 1, **settings})
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 4, "precision": "bf16-mixed"},
        {"gradient_clip_val": 1.0, "precision": "bf16-true"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "plain",
)
def test_trains_under_every_setting(tmp_path, settings):
    module = made()
    steps = 24 * settings.get("accumulate_grad_batches", 1)
    trainer = fit(module, loader(steps, 32), tmp_path, **settings)
    assert trainer.global_step == 24
    assert sum(module.losses[-4:]) < 0.8 * sum(module.losses[:4]), module.losses
    optimizer = trainer.optimizers[0]
    assert optimizer.skipped_steps == 0
    assert all(layer.started for layer in optimizer.layers.values())


def test_clipping_under_mixed_precision(tmp_path):
    """As with Adam. Lightning asks `_step_supports_amp_scaling`, scaler or not, before it clips."""
    module = made()
    fit(module, loader(24, 32), tmp_path, gradient_clip_val=1.0, precision="bf16-mixed")
    assert sum(module.losses[-4:]) < 0.8 * sum(module.losses[:4]), module.losses


@pytest.mark.parametrize("accumulated", [2, 8])
def test_accumulated_micro_batches_are_one_batch(tmp_path, accumulated):
    """`A` of the first step is that of one large batch: passes are told apart although only `net` is called."""
    whole = made(activation_factor="inverse")
    fit(whole, loader(1, 64), tmp_path)
    parts = made(activation_factor="inverse")
    x, y = gratings(0, 64)
    data = DataLoader(TensorDataset(x, y), batch_size=64 // accumulated)
    fit(parts, data, tmp_path, accumulate_grad_batches=accumulated)
    # Inputs of micro-batches are thinned; `accumulated` times as large would be more.
    assert parts.first == pytest.approx(whole.first, rel=0.3)


def test_validation_between_steps_changes_nothing(tmp_path):
    """Forwards without backward, in training and in validation, leave no trace."""

    class Watched(Stripes):
        def validation_step(self, batch, index):
            self.net(100 * batch[0])

    results = []
    for kind in (Stripes, Watched):
        torch.manual_seed(0)
        module = kind()
        settings = {"val_check_interval": 1, "num_sanity_val_steps": 1} if kind is Watched else {}
        data = loader(4, 16)
        trainer = lightning.Trainer(
            default_root_dir=str(tmp_path), logger=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", max_epochs=1, enable_checkpointing=False, **settings,
        )  # fmt: skip
        trainer.fit(module, data, *([data] if kind is Watched else []))
        results.append(list(module.parameters()))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}], ids=["plain", "x2 bf16"]
)
def test_resume_is_no_interruption(tmp_path, settings):
    """From the end of an epoch: in the middle of one Lightning begins its data anew."""
    data = loader(4, 16)
    whole = made(cosine=True)
    saves = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    fit(whole, data, tmp_path, callbacks=[saves], max_epochs=4, **settings)
    again = made(seed=5, cosine=True)
    trainer = fit(again, data, tmp_path, ckpt_path=str(tmp_path / "epoch=0.ckpt"), max_epochs=4, **settings)
    assert again.losses == whole.losses[-len(again.losses) :]
    assert len(again.losses) == 12
    assert all(map(torch.equal, again.parameters(), whole.parameters()))
    assert trainer.global_step == whole.trainer.global_step


@pytest.mark.parametrize("toggles", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_two_optimizers_by_hand(tmp_path, whole, toggles):
    """Manual optimization of two parts, each with a KFQN of its own: of the part, or of the module and its parameters.

    `toggle_optimizer` freezes the parameters of the other optimizer for a while.
    """

    class Pair(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.code, self.decode = nn.Linear(64, 8), nn.Linear(8, 64)
            self.losses = []

        def configure_optimizers(self):
            if whole:
                return [KFQN(self, params=part.parameters()) for part in (self.code, self.decode)]
            return KFQN(self.code), KFQN(self.decode)

        def training_step(self, batch, index):
            x = batch[0].mean(1)[:, :8, :8].flatten(1)
            for optimizer in self.optimizers():
                if toggles:
                    self.toggle_optimizer(optimizer)
                loss = mse_loss(self.decode(torch.tanh(self.code(x))), x)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                if toggles:
                    self.untoggle_optimizer(optimizer)
            self.losses.append(loss.item())

    torch.manual_seed(0)
    module = Pair()
    trainer = fit(module, loader(30, 32), tmp_path)
    assert module.losses[-1] < 0.8 * module.losses[0], module.losses
    for optimizer, name in zip(trainer.optimizers, ("code", "decode"), strict=True):
        layers = optimizer.layers
        assert set(layers) == ({name} if whole else {""})
        assert all(layer.started for layer in layers.values())

"""accelerate: prepare, accumulate, clip_grad_norm_, save_state and load_state."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed: its loop is not tried")

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from kfqn_core import KFQN
from tests.frameworks.curvature import traces
from tests.frameworks.tasks import gratings


@pytest.fixture(autouse=True)
def fresh():
    """An Accelerator of one test is not that of the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Flatten(), nn.Linear(400, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip


def loader(batches, samples):
    data = [gratings(k, samples) for k in range(batches)]
    return DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True))), batch_size=samples)


class Run:
    """Everything as accelerate prepares it."""

    def __init__(self, batches=8, samples=16, *, seed=0, mixed="no", accumulated=1, **options):
        self.accelerator = Accelerator(cpu=True, mixed_precision=mixed, gradient_accumulation_steps=accumulated)
        model = network(seed)
        self.inner = KFQN(model, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.inner, 200)
        self.model, self.optimizer, self.data, self.schedule = self.accelerator.prepare(
            model, self.inner, loader(batches, samples), schedule
        )

    def train(self, *, clip=None):
        losses = []
        for x, y in self.data:
            with self.accelerator.accumulate(self.model):
                loss = cross_entropy(self.model(x), y)
                self.accelerator.backward(loss)
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("mixed", ["no", "bf16"])
@pytest.mark.parametrize(("accumulated", "clip"), [(1, None), (4, None), (1, 0.1), (4, 0.1)])
def test_trains_under_every_setting(mixed, accumulated, clip):
    run = Run(24 * accumulated, 32, mixed=mixed, accumulated=accumulated)
    losses = run.train(clip=clip)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses
    assert run.inner.skipped_steps == 0
    assert run.inner.state_dict()["param_groups"][0]["steps"] == 24
    assert all(layer.started for layer in run.inner.layers.values())


def test_prepared_is_the_same_step():
    """accelerate in between changes no bit."""
    run = Run(4)
    run.train()
    model = network()
    optimizer = KFQN(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for x, y in loader(4, 16):
        cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, run.model.parameters(), model.parameters()))


@pytest.mark.parametrize("accumulated", [2, 8])
def test_accumulated_micro_batches_are_one_batch(accumulated):
    x, y = gratings(0, 64)
    model = network()
    whole = KFQN(model, activation_factor="inverse")
    cross_entropy(model(x), y).backward()
    whole.step()
    run = Run(accumulated, 64 // accumulated, accumulated=accumulated, activation_factor="inverse")
    run.data = [(a, b) for a, b in zip(x.chunk(accumulated), y.chunk(accumulated), strict=True)]
    run.train()
    expected, found = traces(whole), traces(run.inner)
    assert found == pytest.approx(expected, rel=0.3)  # inputs are thinned; `accumulated` times as large would be more


def test_resume_is_no_interruption(tmp_path):
    whole = Run(8)
    whole.train()
    whole.accelerator.save_state(str(tmp_path), safe_serialization=True)
    after = whole.train()
    parameters = [p.clone() for p in whole.model.parameters()]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    again = Run(8, seed=3)
    again.accelerator.load_state(str(tmp_path))
    assert again.train() == after
    assert all(map(torch.equal, again.model.parameters(), parameters))

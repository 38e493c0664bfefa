"""transformers.Trainer: KFQN in `optimizers=`, with accumulation, clipping, bfloat16, checkpoints and resume."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: its Trainer is not tried")
pytest.importorskip("accelerate", reason="accelerate is not installed, and transformers' Trainer needs it")

import re

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from kfqn_core import KFQN
from tests.frameworks.curvature import traces
from tests.frameworks.models import transformers_tasks
from tests.frameworks.tasks import windows

TASK = transformers_tasks()["Llama"]
SAMPLES = [{"input_ids": ids, "labels": ids} for k in range(16) for ids in windows(k, samples=4)]


def trainer(folder, *, model=None, optimizer=None, callbacks=(), **settings):
    """A Trainer on the CPU whose optimizer is KFQN, untuned."""
    model = model or TASK.made()
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 8, "save_strategy": "no", "lr_scheduler_type": "cosine",
        "use_cpu": True, "report_to": "none", "logging_steps": 1, "seed": 0, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    if optimizer is not None:
        return Trainer(model, arguments, train_dataset=SAMPLES, callbacks=list(callbacks), **optimizer)
    pair = (KFQN(model), None)
    return Trainer(model, arguments, train_dataset=SAMPLES, optimizers=pair, callbacks=list(callbacks))


def losses(ran):
    """What the Trainer logged, step by step."""
    return {entry["step"]: entry["loss"] for entry in ran.state.log_history if "loss" in entry}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.01},
        {"bf16": True},
        {"gradient_accumulation_steps": 4, "max_grad_norm": 0.5, "bf16": True, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_trains_under_every_setting(tmp_path, settings):
    ran = trainer(tmp_path, max_steps=24, **settings)
    ran.train()
    history = losses(ran)
    assert len(history) == 24
    assert history[24] < 0.75 * history[1], history
    assert ran.optimizer.optimizer.skipped_steps == 0
    assert all(layer.started for layer in ran.optimizer.optimizer.layers.values())


def test_a_step_is_a_step_of_the_plain_loop(tmp_path):
    """Trainer in between changes nothing: weights after two steps are those of a loop by hand, to rounding."""
    ran = trainer(tmp_path, max_steps=2, lr_scheduler_type="constant", max_grad_norm=0.0)
    order = list(ran.get_train_dataloader())  # its sampler is seeded: the same every time
    ran.train()
    model = TASK.made()
    optimizer = KFQN(model)
    for batch in order[:2]:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), ran.model.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, msg=lambda text, name=name: f"{name}: {text}")


class AtFirstStep(TrainerCallback):
    """Keeps the trace of `A` of every layer as it was after the first step."""

    def on_optimizer_step(self, args, state, control, optimizer=None, **_):
        if state.global_step == 0:
            inner = getattr(optimizer, "optimizer", optimizer)
            self.traces = traces(inner)


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    """`A` of 4 micro-batches of 4 is that of one batch of 16."""
    seen = []
    for accumulated in (1, 4):
        model, callback = TASK.made(), AtFirstStep()
        trainer(
            tmp_path, model=model, callbacks=[callback], max_steps=1, gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=16 // accumulated, max_grad_norm=0.0,
            optimizer={"optimizers": (KFQN(model, activation_factor="inverse"), None)},
        ).train()  # fmt: skip
        seen.append(callback.traces)
    assert seen[1] == pytest.approx(seen[0], rel=0.3)  # inputs are thinned; 4 times as large would be more


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "bf16": True}], ids=["plain", "bf16 x2"])
def test_resume_is_no_interruption(tmp_path, settings):
    settings = {"save_strategy": "steps", "save_steps": 4, **settings}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    again = trainer(tmp_path / "again", model=TASK.made(seed=7), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again) == losses(whole)
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_saved_model_loads_and_needs_no_optimizer(tmp_path):
    ran = trainer(tmp_path, max_steps=2)
    ran.train()
    ran.save_model(str(tmp_path / "saved"))
    loaded = type(ran.model).from_pretrained(tmp_path / "saved")
    ids = windows(0)
    ran.model.eval(), loaded.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, ran.model(ids).logits)


def test_a_class_without_a_model_says_in_one_sentence_what_it_needs(tmp_path):
    """`optimizer_cls_and_kwargs` hands over parameter groups, as torch.optim takes them."""
    ran = trainer(tmp_path, optimizer={"optimizer_cls_and_kwargs": (KFQN, {"lr": 0.03})})
    with pytest.raises(TypeError, match=re.escape("KFQN(model)")) as caught:
        ran.train()
    assert "\n" not in str(caught.value)


def test_groups_with_weight_decay_as_trainer_makes_them(tmp_path):
    """Biases and norms without decay: `get_decay_parameter_names` and `params=`."""
    model = TASK.made()
    names = set(trainer(tmp_path, model=model).get_decay_parameter_names(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in names], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n not in names], "weight_decay": 0.0},
    ]
    optimizer = KFQN(model, params=groups)
    ran = trainer(tmp_path, model=model, optimizer={"optimizers": (optimizer, None)}, max_steps=24)
    ran.train()
    history = losses(ran)
    assert history[24] < 0.75 * history[1], history

"""lab.training: one loop, the same data in the same order for every optimizer."""

from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn

from kfqn_core.lab.problems import Problem, pixel_cross_entropy
from kfqn_core.lab.training import accuracy, batches, cosine, evaluate, last_fifth, linear, train

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def _sgd(model):
    return sgd(model.parameters())


@pytest.fixture
def problem():
    images = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    return Problem(
        "tiny", lambda: nn.Linear(4, 4), images[:42], images[:42], images[42:], images[42:], pixel_cross_entropy, 8
    )


def test_the_frame_has_the_documented_rows(problem):
    frame = train(problem, _sgd, steps=12, seed=0, eval_every=5)
    assert frame["step"].tolist() == [0, 5, 10, 12]
    assert frame["epoch"].tolist() == pytest.approx([0, 1, 2, 2.4])  # 42 // 8 = 5 steps an epoch
    assert list(frame.columns) == ["step", "epoch", "seconds", "train loss", "test loss"]
    assert frame["seconds"].is_monotonic_increasing
    assert frame["train loss"].iloc[-1] < frame["train loss"].iloc[0]
    assert "stopped" not in frame.attrs


def test_training_is_reproducible_and_depends_on_the_seed(problem):
    losses = ["train loss", "test loss"]
    first, again, other = (train(problem, _sgd, steps=6, seed=seed)[losses] for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert (first != other).to_numpy().all()


def test_batches_visit_every_epoch_once_and_drop_the_remainder(problem):
    rows = {tuple(x): i for i, x in enumerate(problem.x_train.tolist())}
    stream = batches(problem, seed=0)
    epochs = [[rows[tuple(x)] for _ in range(5) for x in next(stream)[0].tolist()] for _ in range(2)]
    assert all(len(set(epoch)) == 40 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_every_optimizer_sees_the_same_batches_however_often_it_calls_the_closure(problem):
    seen = {}

    class Twice(torch.optim.SGD):
        def step(self, closure):
            loss = closure()
            super().step()
            closure()
            return loss

    def recording(cls):
        seen[cls] = []

        def make(model):
            model.register_forward_pre_hook(
                lambda module, args: seen[cls].append(args[0].sum().item()) if torch.is_grad_enabled() else None
            )
            return cls(model.parameters(), lr=0.01)

        return make

    train(problem, recording(torch.optim.SGD), steps=7, seed=0)
    train(problem, recording(Twice), steps=7, seed=0)
    assert seen[Twice][::2] == seen[Twice][1::2] == seen[torch.optim.SGD]


def test_the_loop_is_the_plain_loop(problem):
    model = problem.model(seed=4)
    optimizer = _sgd(model)
    stream = batches(problem, seed=4)
    for _ in range(5):
        x, y = next(stream)
        optimizer.zero_grad()
        problem.loss(model(x), y).backward()
        optimizer.step()
    frame = train(problem, _sgd, steps=5, seed=4)
    assert tuple(frame.iloc[-1][["train loss", "test loss"]]) == evaluate(model, problem)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_frame(problem, capsys):
    diverging = partial(torch.optim.SGD, lr=1e38)
    frame = train(problem, lambda m: diverging(m.parameters()), steps=50, seed=0, eval_every=1, label="SGD")
    assert "SGD: the loss is" in frame.attrs["stopped"]
    assert frame.attrs["stopped"] in capsys.readouterr().out
    assert 1 <= len(frame) < 50
    assert frame["step"].is_monotonic_increasing


def test_warm_start_hands_over_one_epoch_of_inputs_before_the_first_step(problem):
    calls = []

    class Warm(torch.optim.SGD):
        def warm_start(self, inputs):
            calls.extend(len(x) for x in inputs)

        def step(self, closure):
            calls.append("step")
            return super().step(closure)

    train(problem, lambda model: Warm(model.parameters(), lr=0.1), steps=2, seed=0, warm_start=True)
    assert calls == [8, 8, 8, 8, 8, 2, "step", "step"]


def test_evaluation_is_the_mean_over_all_samples_and_restores_the_mode(problem):
    model = problem.model(seed=0).train()
    losses = evaluate(model, problem)
    with torch.no_grad():
        expected = pixel_cross_entropy(model(problem.x_train), problem.y_train).item()
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_accuracy_counts_the_highest_scores_and_is_recorded_where_there_are_labels():
    x, y = torch.eye(4)[[0, 1, 2, 3, 0]], torch.tensor([0, 1, 2, 0, 0])
    labels = Problem("labels", lambda: nn.Linear(4, 4), x, y, x, y, nn.functional.cross_entropy, 5)
    model = labels.model(seed=0)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
        model.bias.zero_()
    assert accuracy(model.train(), labels) == 0.8
    assert model.training
    frame = train(labels, _sgd, steps=2, seed=0, model=model)
    assert frame.columns[-1] == "test accuracy"
    assert frame["test accuracy"].iloc[0] == 0.8


def test_accuracy_counts_every_label_of_a_sample():
    x = torch.eye(4)[torch.tensor([[0, 1, 2], [3, 0, 1]])]
    y = torch.tensor([[0, 1, 0], [3, 0, 2]])  # the last label of either sample is not the one with the highest score
    labels = Problem("labels", nn.Identity, x, y, x, y, lambda z, y: nn.functional.cross_entropy(z.mT, y), 2)
    assert accuracy(labels.model(seed=0), labels) == pytest.approx(4 / 6)


def test_a_schedule_scales_every_learning_rate(problem):
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def make(model):
        return Watched([{"params": model.weight}, {"params": model.bias, "lr": 0.2}], lr=0.1)

    train(problem, make, steps=4, seed=0, schedule=lambda progress: 1 - progress)
    assert seen == [pytest.approx([0.1 * (1 - k / 5), 0.2 * (1 - k / 5)]) for k in (1, 2, 3, 4)]


def test_schedules_warm_up_and_end_at_zero():
    points = (0, 0.01, 0.02, 0.51, 0.755, 1)
    assert [cosine(p) for p in points] == pytest.approx([0, 0.5, 1, 0.5, 0.5 - 0.125**0.5, 0])
    assert [linear(p) for p in points] == pytest.approx([0, 0.5, 1, 0.5, 0.25, 0])
    assert [last_fifth(p) for p in (*points, 0.9)] == pytest.approx([0, 0.5, 1, 1, 1, 0, 0.5])


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"steps": 3, "eval_every": 0}])
def test_train_names_what_is_wrong(problem, arguments):
    with pytest.raises(ValueError, match="must be a positive integer"):
        train(problem, _sgd, seed=0, **arguments)

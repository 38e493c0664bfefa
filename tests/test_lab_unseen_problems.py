"""lab.unseen_problems: what each docstring says, the loss of a network that knows nothing, and that it falls."""

import math

import pytest
import torch

from kfqn_core.lab import unseen_problems
from kfqn_core.lab.training import train

# Shape of a sample and of the output for three, and the loss of a network that knows nothing, with what random weights
# may add to it.
EXPECTED = {
    unseen_problems.friedman_regression: ((10,), (3, 1), 1.0, 1.0),
    unseen_problems.chirps_cnn: ((2, 128), (3, 5), math.log(5), 0.2),
    unseen_problems.sorting_transformer: ((24,), (3, 24, 12), math.log(12), 0.5),
}


@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_problems_are_what_their_docstrings_say(make):
    problem, again = make(), make()
    sample, output, loss, tolerance = EXPECTED[make]
    model = problem.model(seed=0)
    assert problem.x_train.shape == (8000, *sample)
    assert problem.x_test.shape == (2000, *sample)
    assert torch.equal(problem.x_train, again.x_train)
    assert model(problem.x_test[:3]).shape == output
    assert problem.batch_size == 64
    start = problem.loss(model.eval()(problem.x_train[:500]), problem.y_train[:500]).item()
    assert start == pytest.approx(loss, abs=tolerance)


@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_the_loss_falls_in_thirty_steps_of_adam(make):
    frame = train(make(), lambda model: torch.optim.Adam(model.parameters(), lr=0.003), 30, 0, eval_every=30)
    assert frame["train loss"].iloc[-1] < 0.95 * frame["train loss"].iloc[0]


def test_sorted_sequences_hold_the_same_tokens():
    problem = unseen_problems.sorting_transformer()
    for tokens, ordered in zip(problem.x_test[:50], problem.y_test[:50], strict=True):
        assert sorted(tokens.tolist()) == ordered.tolist()


def test_the_faster_a_pitch_changes_the_wider_is_the_spectrum():
    x, y = unseen_problems.chirps(400, torch.Generator().manual_seed(1))
    power = torch.fft.fft(torch.complex(x[:, 0], x[:, 1])).abs().square()
    highest = [(power[y == c].amax(1) / power[y == c].sum(1)).mean().item() for c in range(5)]
    assert highest[2] > 1.5 * highest[1] > 1.5 * highest[0]  # class 2 is a tone of constant pitch
    assert highest[2] > 1.5 * highest[3] > 1.5 * highest[4]

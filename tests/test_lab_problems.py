"""lab.problems: the models have the published layout, and the reference losses are what they claim."""

import pytest
import torch
from torch import nn

from kfqn_core.lab import problems


def test_autoencoder_is_linear_at_the_code_and_at_the_output():
    model = problems.autoencoder((9, 7, 5, 2), nn.Tanh)
    linear, tanh = "Linear", "Tanh"
    assert [type(m).__name__ for m in model] == [
        *(linear, tanh, linear, tanh, linear),  # the encoder, without an activation after the code
        *(linear, tanh, linear, tanh, linear),
    ]
    widths = [(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)]
    assert widths == [(9, 7), (7, 5), (5, 2), (2, 5), (5, 7), (7, 9)]
    with pytest.raises(ValueError, match="at least two positive"):
        problems.autoencoder((9,))


def test_pixel_cross_entropy_sums_over_pixels_and_averages_over_images():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    images = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    p = torch.sigmoid(logits)
    by_hand = -(images * p.log() + (1 - images) * (1 - p).log()).sum() / 5
    assert problems.pixel_cross_entropy(logits, images) == pytest.approx(by_hand.item(), rel=1e-14)


def test_reference_losses_are_minima_of_the_loss():
    images = 0.01 + 0.98 * torch.rand(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = problems.pixel_cross_entropy(torch.logit(images), images)
    assert problems.entropy_floor(images) == pytest.approx(exact.item(), rel=1e-13)
    constant = torch.logit(images.mean(0)).requires_grad_()
    loss = problems.pixel_cross_entropy(constant.expand(40, 6), images)
    assert problems.mean_image_loss(images) == pytest.approx(loss.item(), rel=1e-13)
    (gradient,) = torch.autograd.grad(loss, constant)
    assert gradient.abs().max() < 1e-14  # stationary in a convex problem


def test_problems_are_what_their_docstrings_say(tmp_path, monkeypatch):
    monkeypatch.setattr(problems.data, "curves", lambda n, seed: torch.zeros(n, 784))
    curves, digits = problems.curves_autoencoder(), problems.digits_autoencoder()
    assert (len(curves.x_train), len(curves.x_test), curves.batch_size) == (9000, 1000, 1000)
    for problem, code in ((curves, 6), (digits, 8)):
        model = problem.model(seed=0)
        assert min(m.out_features for m in model if isinstance(m, nn.Linear)) == code
        assert model(problem.x_test[:3]).shape == problem.y_test[:3].shape


def test_a_model_depends_on_its_seed_and_leaves_the_global_generator_alone():
    problem = problems.digits_autoencoder()
    state = torch.random.get_rng_state()
    first, again, other = (problem.model(seed)[0].weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_image_problems_are_what_their_docstrings_say():
    plain, norm = problems.photographs_cnn(batch_norm=False), problems.photographs_cnn()
    digits = problems.digits_cnn()
    for problem, shape, classes in ((digits, (1, 16, 16), 10), (plain, (3, 32, 32), 4), (norm, (3, 32, 32), 4)):
        model = problem.model(seed=0)
        convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
        assert [m.out_channels for m in convolutions] == [16, 32, 64]
        assert problem.x_train.shape[1:] == shape
        assert model(problem.x_test[:3]).shape == (3, classes)
        assert problem.loss(model(problem.x_test[:3]), problem.y_test[:3]).isfinite()
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model)
        assert norms == 3 * (problem is norm)
        assert all((m.bias is None) == (problem is norm) for m in convolutions)
    assert (len(norm.x_train), len(norm.x_test), norm.batch_size) == (8000, 2000, 128)
    assert norm.x_train.mean((0, 2, 3)).abs().max() < 1e-4
    assert (norm.x_train.std((0, 2, 3)) - 1).abs().max() < 1e-4

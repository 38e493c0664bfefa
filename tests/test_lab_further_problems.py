"""lab.further_problems: what each docstring says, the loss of a network that knows nothing, and that it falls."""

import math

import pytest
import torch
from torch import nn

from kfqn_core.lab import further_problems
from kfqn_core.lab.data import OPENML, Split
from kfqn_core.lab.training import accuracy, train

DOWNLOADED = {
    further_problems.mnist_autoencoder: "mnist_784",
    further_problems.cifar_resnet: "CIFAR_10",
    further_problems.wide_mlp: "mnist_784",
}
# Shape of a sample and of the output for three of them, mini-batch, and the loss of a network that knows nothing, with
# what random weights, and the choice of 200 samples, may add to it.
EXPECTED = {
    further_problems.mnist_autoencoder: ((784,), (3, 784), 1000, 784 * math.log(2), 2),
    further_problems.cifar_resnet: ((3, 32, 32), (3, 10), 128, math.log(10), 0.3),
    further_problems.byte_gpt: ((64,), (3, 64, 256), 16, math.log(256), 0.3),
    further_problems.table_mlp: ((120,), (3, 12), 256, math.log(12), 0.03),
    further_problems.photograph_coordinates: ((128,), (3, 3), 1024, 3, 0.6),
    further_problems.digits_vae: ((64,), (3, 64 + 16), 200, 64 * math.log(2), 0.5),
    further_problems.wide_mlp: ((784,), (3, 10), 128, math.log(10), 0.3),
}


@pytest.fixture(autouse=True)
def fake_download(monkeypatch):
    """Images whose label shows, in place of those that would have to be downloaded."""

    def openml(name):
        _, shape = OPENML[name]
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(10, (1200,), generator=generator)
        x = 0.2 * torch.rand(1200, *shape, generator=generator)
        x[torch.arange(1200), 0, 2 * y + 4] += 0.7  # one row is bright
        return Split(x[:1100], y[:1100], x[1100:], y[1100:])

    monkeypatch.setattr(further_problems.data, "openml", openml)


@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_problems_are_what_their_docstrings_say(make):
    problem = make()
    sample, output, batch, loss, tolerance = EXPECTED[make]
    model = problem.model(seed=0)
    assert problem.x_train.shape[1:] == problem.x_test.shape[1:] == sample
    assert model(problem.x_test[:3]).shape == output
    assert problem.batch_size == batch
    start = problem.loss(model.eval()(problem.x_train[:200]), problem.y_train[:200]).item()
    assert start == pytest.approx(loss, abs=tolerance)


@pytest.mark.parametrize("make", [make for make in EXPECTED if make is not further_problems.wide_mlp])
def test_the_loss_falls_in_ten_steps_of_adam_and_a_seed_fixes_everything(make):
    problem, again = make(), make()
    assert all(torch.equal(getattr(problem, part), getattr(again, part)) for part in ("x_train", "y_train", "x_test"))
    weights = [[p.detach().clone() for p in problem.model(seed).parameters() if p.ndim > 1] for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*weights[:2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(*weights[1:], strict=True))
    x, y = problem.x_train[:300], problem.y_train[:300]

    def measure(model):
        with torch.no_grad():
            loss = problem.loss(model.eval()(x), y).item()
        model.train()
        return {"train loss": loss}

    def adam(model):
        return torch.optim.Adam(model.parameters(), lr=0.003)

    frame = train(problem, adam, steps=10, seed=0, eval_every=10, measure=measure)
    assert frame["train loss"].iloc[-1] < 0.99 * frame["train loss"].iloc[0]


def test_the_wide_network_lets_the_signal_through_and_learns():
    problem = further_problems.wide_mlp()
    model = problem.model(seed=0)
    assert sum(p.numel() for p in model.parameters()) == 785 * 2048 + 11 * 2049 * 2048 + 2049 * 10
    assert all(not layer.bias.any() for layer in model if isinstance(layer, nn.Linear))
    x, y = problem.x_train[:64], problem.y_train[:64]
    with torch.no_grad():
        # Mean squares stay within a factor of two over twelve layers, with torch's own weights they shrink by 6^12.
        assert 0.5 < model[:-1](x).square().mean() / x.square().mean() < 2
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(problem.loss(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    # No view of the images that are not used.
    assert problem.x_train.untyped_storage().nbytes() == problem.x_train.numel() * 4


@pytest.mark.parametrize("make", DOWNLOADED, ids=lambda make: make.__name__)
def test_without_its_data_a_problem_says_so_in_one_sentence(make, monkeypatch):
    asked = []

    def refuse(name):
        asked.append(name)
        raise ConnectionError(f"openml: {name} is not here; connect to a network once")

    monkeypatch.setattr(further_problems.data, "openml", refuse)
    with pytest.raises(ConnectionError, match=r"^(MNIST auto|CIFAR-10 resid|wide MLP).*: openml: .* connect to a net"):
        make()
    assert asked == [DOWNLOADED[make]]


def test_cifar_is_standardised_by_channel():
    problem = further_problems.cifar_resnet()
    assert problem.x_train.mean((0, 2, 3)).abs().max() < 1e-4
    assert (problem.x_train.std((0, 2, 3)) - 1).abs().max() < 1e-4


def test_accuracy_of_text_is_over_bytes():
    problem = further_problems.byte_gpt()
    model = problem.model(seed=0)
    with torch.no_grad():
        model.scores.weight.zero_()
        model.scores.bias.copy_(torch.nn.functional.one_hot(torch.tensor(32), 256))
    assert accuracy(model, problem) == pytest.approx((problem.y_test == 32).double().mean().item())


def test_token_cross_entropy_is_a_mean_over_tokens():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    tokens = torch.randint(5, (2, 3), generator=generator)
    by_hand = [-scores[i, t].log_softmax(0)[tokens[i, t]] for i in range(2) for t in range(3)]
    assert further_problems.token_cross_entropy(scores, tokens) == pytest.approx(sum(by_hand).item() / 6, rel=1e-14)


def test_fourier_features_repeat_with_the_period_of_their_frequency():
    places = torch.tensor([[0.1, 0.3], [0.35, 0.3], [0.1, 0.8]], dtype=torch.float64)
    features = further_problems.fourier_features(places, torch.tensor([[4.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    assert features.shape == (3, 4)
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-13)  # a quarter further is a whole period
    torch.testing.assert_close(features[0], features[2], rtol=0, atol=1e-13)
    assert features[0, 0] == pytest.approx(math.cos(0.8 * math.pi))
    assert features[0, 3] == pytest.approx(math.sin(1.2 * math.pi))


def test_the_mean_colour_has_a_loss_of_three():
    problem = further_problems.photograph_coordinates()
    # The variance that was divided by is n / (n - 1) of the mean square.
    assert problem.loss(torch.zeros_like(problem.y_train), problem.y_train) == pytest.approx(3, abs=1e-3)
    assert problem.loss(problem.y_test + torch.tensor([1.0, 2.0, 3.0]), problem.y_test) == pytest.approx(14, rel=1e-5)


def test_negative_elbo_is_reconstruction_plus_divergence():
    generator = torch.Generator().manual_seed(0)
    logits, images = torch.randn(4, 6, generator=generator).double(), torch.rand(4, 6, generator=generator).double()
    means, log_variances = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    code = torch.distributions.Normal(means, (0.5 * log_variances).exp())
    divergence = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).sum() / 4
    drawn = torch.distributions.Bernoulli(logits=logits, validate_args=False)
    expected = divergence - drawn.log_prob(images).sum() / 4
    loss = further_problems.negative_elbo(torch.cat([logits, means, log_variances], 1), images)
    assert loss == pytest.approx(expected.item(), rel=1e-12)

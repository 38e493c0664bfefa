"""Further training problems, of other kinds than those of `problems`: larger images, text, a table, a photograph as a
function of its coordinates, a variational autoencoder, and layers as wide as those of large models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kfqn_core.lab import data
from kfqn_core.lab.networks import GPT, VariationalAutoencoder, multilayer_perceptron, residual_network
from kfqn_core.lab.problems import Problem, autoencoder, pixel_cross_entropy

__all__ = [
    "byte_gpt",
    "cifar_resnet",
    "digits_vae",
    "fourier_features",
    "mnist_autoencoder",
    "negative_elbo",
    "photograph_coordinates",
    "squared_error",
    "table_mlp",
    "token_cross_entropy",
    "wide_mlp",
]


def _downloaded(problem: str, name: str) -> data.Split:
    """`data.openml(name)`, whose ConnectionError also says which problem needs it."""
    try:
        return data.openml(name)
    except ConnectionError as error:
        raise ConnectionError(f"{problem}: {error}") from error


def mnist_autoencoder() -> Problem:
    """784-1000-500-250-30-250-500-1000-784 on MNIST, mini-batches of 1000: the network and the batch size of the
    published K-BFGS code.

    Raises:
        ConnectionError: where MNIST is neither cached nor can be downloaded.
    """
    split = _downloaded("MNIST autoencoder", "mnist_784")
    train, test = split.x_train.flatten(1), split.x_test.flatten(1)
    return Problem(
        name="MNIST autoencoder",
        make_model=lambda: autoencoder((784, 1000, 500, 250, 30)),
        x_train=train,
        y_train=train,
        x_test=test,
        y_test=test,
        loss=pixel_cross_entropy,
        batch_size=1000,
    )


def cifar_resnet() -> Problem:
    """A residual network of three blocks with 16, 32 and 64 channels on CIFAR-10, standardised by channel with mean and
    deviation of the training images; mini-batches of 128.

    Raises:
        ConnectionError: where CIFAR-10 is neither cached nor can be downloaded.
    """
    split = _downloaded("CIFAR-10 residual network", "CIFAR_10")
    deviation, mean = torch.std_mean(split.x_train, dim=(0, 2, 3), keepdim=True)
    return Problem(
        name="CIFAR-10 residual network",
        make_model=lambda: residual_network(blocks=1),
        # In place: the images take 0.7 GB, and nobody else holds them.
        x_train=split.x_train.sub_(mean).div_(deviation),
        y_train=split.y_train,
        x_test=split.x_test.sub_(mean).div_(deviation),
        y_test=split.y_test,
        loss=cross_entropy,
        batch_size=128,
    )


def token_cross_entropy(scores: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats, averaged over all tokens of all samples: scores `[n, T, vocabulary]`, tokens `[n, T]`."""
    return cross_entropy(scores.flatten(0, 1), tokens.flatten())


def byte_gpt() -> Problem:
    """Which byte comes next in the help that Python carries? A GPT of three blocks of width 96 with four heads reads
    windows of 64 bytes, 16 in a mini-batch."""
    split = data.text_windows(64)
    return Problem(
        name="byte-level GPT",
        make_model=lambda: GPT(vocabulary=256, context=64, width=96, heads=4, blocks=3),
        x_train=split.x_train,
        y_train=split.y_train,
        x_test=split.x_test,
        y_test=split.y_test,
        loss=token_cross_entropy,
        batch_size=16,
    )


def table_mlp() -> Problem:
    """120-384-384-12 on a generated table of twelve classes, mini-batches of 256."""
    split = data.table()
    return Problem(
        name="table MLP",
        make_model=lambda: multilayer_perceptron((120, 384, 384, 12)),
        x_train=split.x_train,
        y_train=split.y_train,
        x_test=split.x_test,
        y_test=split.y_test,
        loss=cross_entropy,
        batch_size=256,
    )


def fourier_features(places: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines and sines of `2 pi f . v` for places v `[n, d]` and frequencies f `[k, d]`: `[n, 2 k]`.

    Without them a network of coordinates learns fine structure very slowly (Tancik and others, 2020).
    """
    phases = 2 * math.pi * places @ frequencies.mT
    return torch.cat([phases.cos(), phases.sin()], dim=1)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The squared distance between output and target, `[n, d]` both: summed over d, averaged over samples."""
    return (output - target).square().sum() / len(target)


def photograph_coordinates() -> Problem:
    """Which colour does a photograph have at a place? 128-192-192-192-3 on 128 Fourier features of the place; colours
    are standardised by channel, so that the mean colour has a loss of 3; mini-batches of 1024.

    The 64 frequencies are normal with a deviation of ten periods a photograph, always the same ones.
    """
    split = data.photograph_pixels()
    frequencies = 10 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    deviation, mean = torch.std_mean(split.y_train, dim=0)
    return Problem(
        name="photograph by coordinates",
        make_model=lambda: multilayer_perceptron((128, 192, 192, 192, 3)),
        x_train=fourier_features(split.x_train, frequencies),
        y_train=(split.y_train - mean) / deviation,
        x_test=fourier_features(split.x_test, frequencies),
        y_test=(split.y_test - mean) / deviation,
        loss=squared_error,
        batch_size=1024,
    )


def negative_elbo(output: Tensor, images: Tensor) -> Tensor:
    """What a `VariationalAutoencoder` minimises: `pixel_cross_entropy` of what was decoded, and the Kullback-Leibler
    divergence of the code from a standard normal distribution, averaged over images.

    `output` is `[n, pixels + 2 k]`: logits, means and logarithms of variances; `images` are `[n, pixels]`. With a code
    that was drawn it bounds the mean of -log p(image) from above; with the mean of the code in its place it does not.
    """
    pixels = images.shape[1]
    means, log_variances = output[:, pixels:].chunk(2, dim=1)
    divergence = 0.5 * (means.square() + log_variances.exp() - 1 - log_variances).sum() / len(images)
    return pixel_cross_entropy(output[:, :pixels], images) + divergence


def digits_vae() -> Problem:
    """A variational autoencoder 64-128-64-8-64-128-64 on scikit-learn's digits, mini-batches of 200."""
    split = data.digits()
    return Problem(
        name="digits VAE",
        make_model=lambda: VariationalAutoencoder((64, 128, 64, 8)),
        x_train=split.x_train,
        y_train=split.x_train,
        x_test=split.x_test,
        y_test=split.x_test,
        loss=negative_elbo,
        batch_size=200,
    )


def wide_mlp() -> Problem:
    """Twelve hidden layers of 2048 units on MNIST, 48 million parameters; mini-batches of 128.

    Weights begin as He and others (2015) have them, so that the signal arrives. Of MNIST the first 10,000 images train
    and the first 2,000 test: a run is so short that it sees no more, and looking at all would take longer than it does.

    Raises:
        ConnectionError: where MNIST is neither cached nor can be downloaded.
    """
    split = _downloaded("wide MLP", "mnist_784")

    def model() -> nn.Module:
        network = multilayer_perceptron((784, *[2048] * 12, 10))
        for layer in network:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        return network

    return Problem(
        name="wide MLP",
        make_model=model,
        x_train=split.x_train[:10_000].flatten(1).clone(),  # a copy: a view would keep all the others
        y_train=split.y_train[:10_000],
        x_test=split.x_test[:2_000].flatten(1).clone(),
        y_test=split.y_test[:2_000],
        loss=cross_entropy,
        batch_size=128,
    )

"""Networks of the kinds that training problems need beyond plain stacks: residual, a GPT, a variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["GPT", "VariationalAutoencoder", "multilayer_perceptron", "residual_network"]


def multilayer_perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers from `widths[0]` inputs to `widths[-1]` outputs, with ReLU between them."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, d_in: int, d_out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False), nn.BatchNorm2d(d_out), nn.ReLU(),
            nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False), nn.BatchNorm2d(d_out),
        )  # fmt: skip
        same = d_in == d_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(d_in, d_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def residual_network(blocks: int) -> nn.Sequential:
    """A ResNet for 10 classes of 32x32 images: three stages of `blocks` blocks with 16, 32 and 64 channels, the mean
    over all places, and a linear layer. `[n, 3, 32, 32]` to `[n, 10]`; five blocks make a ResNet-32."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for d_in, d_out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [ResidualBlock(d_in, d_out, stride), *(ResidualBlock(d_out, d_out, 1) for _ in range(blocks - 1))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class TransformerBlock(nn.Module):
    """Causal self-attention, then two linear layers with GELU, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.joined(self._attention(self.queries_keys_values(self.norm_attention(x))))
        return x + self.mlp(self.norm_mlp(x))

    def _attention(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, T, width / heads] each
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class GPT(nn.Module):
    """A transformer that predicts the next token: `[n, T]` integers to scores `[n, T, vocabulary]`, T <= `context`.

    Position t sees tokens 0 to t. Positions are learned; norms come before attention and before the linear layers.
    """

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, blocks: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(blocks)))
        self.norm, self.scores = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.scores(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


class VariationalAutoencoder(nn.Module):
    """An encoder whose code is a normal distribution, and the decoder that mirrors it (Kingma and Welling, 2014).

    `widths` run from the input to the code. The output holds side by side what its loss needs, logits of the
    reconstruction, means and logarithms of the variances of the code: `[n, widths[0] + 2 widths[-1]]`. In training the
    code is drawn, with torch's global generator; in evaluation mode it is its mean.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.encoder = multilayer_perceptron([*widths[:-1], 2 * widths[-1]])
        self.decoder = multilayer_perceptron(list(reversed(widths)))

    def forward(self, x: Tensor) -> Tensor:
        means, log_variances = code = self.encoder(x).chunk(2, dim=-1)
        drawn = means + (0.5 * log_variances).exp() * torch.randn_like(means) if self.training else means
        return torch.cat([self.decoder(drawn), *code], dim=-1)

"""lab.networks: layouts that their names promise, and what each computes against the same thing written out."""

import math

import pytest
import torch
from torch import nn

from kfqn_core.lab import networks


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_multilayer_perceptron_is_linear_at_its_end():
    model = networks.multilayer_perceptron((5, 4, 3))
    assert [type(m).__name__ for m in model] == ["Linear", "ReLU", "Linear"]
    assert [(m.in_features, m.out_features) for m in (model[0], model[2])] == [(5, 4), (4, 3)]


def test_a_residual_network_has_its_layers_and_projects_where_the_shape_changes():
    model = networks.residual_network(blocks=5)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    # A ResNet-32 has 31 convolutions and a linear layer; the 1x1 convolutions of two shortcuts do not count.
    assert [m.kernel_size for m in convolutions].count((3, 3)) == 31
    shortcuts = [(m.in_channels, m.out_channels, m.stride) for m in convolutions if m.kernel_size == (1, 1)]
    assert shortcuts == [(16, 32, (2, 2)), (32, 64, (2, 2))]
    assert all(m.bias is None for m in convolutions)
    x = torch.randn(2, 3, 32, 32)
    assert model[:-3](x).shape == (2, 64, 8, 8)
    assert model(x).shape == (2, 10)


def test_a_residual_block_adds_its_shortcut():
    block = networks.ResidualBlock(3, 3, 1).eval()
    x = torch.randn(2, 3, 6, 6)
    nn.init.zeros_(block.body[-1].weight)  # the last norm then lets nothing through
    assert torch.equal(block(x), x.relu())


def test_attention_is_the_softmax_of_scores_of_the_past():
    block = networks.TransformerBlock(width=6, heads=2).double()
    block.norm_attention, block.joined = nn.Identity(), nn.Identity()
    nn.init.zeros_(block.mlp[-1].weight)  # of the block only the attention is left, beside its shortcut
    nn.init.zeros_(block.mlp[-1].bias)
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    qkv = block.queries_keys_values(x)
    joined = []
    for head in range(2):
        q, k, v = (qkv[0, :, 6 * part + 3 * head :][:, :3] for part in range(3))
        rows = []
        for t in range(5):
            weights = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(3), dim=0)
            rows.append(weights @ v[: t + 1])
        joined.append(torch.stack(rows))
    torch.testing.assert_close((block(x) - x)[0], torch.cat(joined, 1), rtol=1e-13, atol=1e-13)


def test_a_gpt_scores_a_token_from_those_before_it():
    model = networks.GPT(vocabulary=11, context=8, width=12, heads=3, blocks=2)
    tokens = torch.randint(11, (3, 8))
    scores = model(tokens)
    assert scores.shape == (3, 8, 11)
    changed = tokens.clone()
    changed[:, 5] = (tokens[:, 5] + 1) % 11
    moved = (model(changed) - scores).abs().amax((0, 2))
    assert moved[:5].max() == 0
    assert moved[5:].min() > 1e-4
    assert torch.equal(model(tokens[:, :4]), model(tokens[:, :4].clone()))
    assert model(tokens[:, :4]).shape == (3, 4, 11)


def test_a_gpt_knows_places():
    model = networks.GPT(vocabulary=11, context=8, width=12, heads=3, blocks=1)
    scores = model(torch.full((1, 8), 4))
    assert (scores[0, 1:] - scores[0, :1]).abs().amax(1).min() > 1e-3  # equal tokens, unequal places


def test_a_variational_autoencoder_draws_in_training_and_not_in_evaluation():
    model = networks.VariationalAutoencoder((6, 5, 4, 2))
    widths = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert widths == [(6, 5), (5, 4), (4, 4), (2, 4), (4, 5), (5, 6)]
    x = torch.rand(3, 6)
    means, log_variances = model.encoder(x).chunk(2, dim=1)
    quiet = model.eval()(x)
    torch.testing.assert_close(quiet, torch.cat([model.decoder(means), means, log_variances], 1), rtol=0, atol=0)
    model.train()
    torch.manual_seed(5)
    noisy = model(x)
    torch.manual_seed(5)
    code = means + log_variances.exp().sqrt() * torch.randn(3, 2)
    torch.testing.assert_close(noisy[:, :6], model.decoder(code), rtol=1e-5, atol=1e-6)
    assert torch.equal(noisy[:, 6:], quiet[:, 6:])
    assert not torch.equal(noisy, model(x))

"""timm: what of its models has curvature, and how they train with every default."""

from __future__ import annotations

import pytest

from tests.frameworks.stand_in import import_timm

try:
    timm = import_timm()
except ImportError as error:
    pytest.skip(f"timm cannot be imported ({error}): its models are not tried", allow_module_level=True)

from functools import partial

from timm.models.mlp_mixer import MlpMixer
from timm.models.nfnet import NfCfg, NormFreeNet
from torch.nn.functional import cross_entropy

from tests.frameworks.tasks import Task, compare, gratings, lead, line, untuned

STEPS = 60
# Model, the share of its weights with curvature at least, and KFQN's loss over that of Adam at its better rate at most,
# with a constant rate and with a decay. Standardised convolutions (nf_resnet) compute their weight: Adam moves them,
# at fallback_lr, which is ten times what is best there with a constant rate (2.14 against .0002 after 60 steps).
MODELS = {
    "ConvNeXt": (
        partial(timm.create_model, "convnext_atto", num_classes=10, depths=(1, 1, 1, 1), dims=(16, 32, 64, 64)),
        0.9, (1.0, 1.0),
    ),
    "ViT": (
        partial(
            timm.create_model, "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, embed_dim=64,
            depth=2, num_heads=4,
        ),
        0.9, (3.0, 0.6),
    ),
    "MLP-Mixer": (
        partial(MlpMixer, num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=64),
        0.9, (1.1, 1.0),
    ),
    "nf_resnet": (
        partial(
            NormFreeNet,
            NfCfg(depths=(1, 1, 1, 1), channels=(64, 128, 256, 256), stem_type="7x7_pool", stem_chs=32,
                  bottle_ratio=0.25, act_layer="relu"),
            num_classes=10,
        ),
        0.0, (25.0, 1.0),
    ),
}  # fmt: skip


def classify(model, k):
    images, labels = gratings(k, noise=0.1)
    return cross_entropy(model(images), labels)


def task(name):
    return Task(f"timm {name}", MODELS[name][0], classify)


@pytest.mark.parametrize("name", MODELS)
def test_coverage(name):
    model = task(name).made()
    optimizer = untuned(model)
    held = sum(p.numel() for layer in optimizer.layers.values() for p in (layer.weight, layer.bias) if p is not None)
    share = held / sum(p.numel() for p in model.parameters())
    assert share >= MODELS[name][1], share


@pytest.mark.parametrize("name", MODELS)
def test_untuned_default_against_adams_better_rate(name, report):
    row = compare(task(name), STEPS)
    report(line(row))
    for schedule, bound in zip(("constant", "decay"), MODELS[name][2], strict=True):
        assert lead(row, schedule) <= bound, line(row)

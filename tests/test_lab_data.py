"""lab.data: images without a download, and a cache that cannot hand out anything but them."""

import os

import numpy as np
import pytest
import torch

from kfqn_core.lab import data


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    return tmp_path


def test_digits_are_split_once_and_for_all():
    split = data.digits()
    assert [len(part) for part in split] == [1400, 1400, 397, 397]
    assert split.x_train.shape == (1400, 64)
    assert split.x_train.dtype == torch.float32
    assert split.x_train.min() == 0
    assert split.x_train.max() == 1
    # Every class on both sides, and the same rows as ever: results are compared across machines and years.
    assert torch.bincount(split.y_train).min() > 100
    assert torch.bincount(split.y_test).min() > 25
    assert split.y_test[:10].tolist() == [0, 4, 2, 7, 7, 9, 1, 9, 0, 9]


def test_curves_pass_through_their_three_points(home):
    images = data.curves(200, seed=3).reshape(200, 28, 28)
    points = 3 + 22 * torch.rand(200, 3, 2, generator=torch.Generator().manual_seed(3))
    # The pixel that holds a point of the curve has its centre at most sqrt(1/2) away: ink at least exp(-(1/2) / 0.64),
    # less 0.05 for the finite number of samples along the curve.
    row, column = points.long().unbind(-1)
    ink = images[torch.arange(200)[:, None], row, column]
    assert ink.min() > np.exp(-0.5 / 0.64) - 0.05


def test_curves_have_the_entropy_that_the_book_quotes(home):
    images = data.curves(1000, seed=0).double()
    entropy = -(torch.xlogy(images, images) + torch.xlogy(1 - images, 1 - images)).sum(1).mean()
    # 33.7 nats an image over 10,000; the standard error of a thousand is 0.4.
    assert abs(entropy - 33.7) < 1.5
    assert images.min() >= 0
    assert images.max() <= 1


def test_curves_depend_on_the_seed_only_and_come_from_the_cache(home, monkeypatch):
    first = data.curves(50, seed=1)
    assert first.dtype == torch.float32
    assert first.shape == (50, 784)
    assert not torch.equal(first, data.curves(50, seed=2))
    drawn = data._draw(50, 1)
    monkeypatch.setattr(data, "_draw", None)  # calling it would now raise
    assert torch.equal(first, data.curves(50, seed=1))
    np.testing.assert_array_equal(first.numpy(), drawn)
    assert not list(home.glob("**/*.part"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "shape", "empty"])
def test_a_damaged_cache_is_replaced(home, damage):
    good = data.curves(50, seed=1)
    (file,) = home.glob("kfqn/*.npz")
    raw = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(raw[: len(raw) // 2])
    elif damage == "flip":
        raw[len(raw) // 2] ^= 0xFF
        file.write_bytes(raw)
    elif damage == "shape":
        np.savez(file, images=np.zeros((50, 5), np.float32), sha256="0")
    else:
        file.write_bytes(b"")
    assert torch.equal(data.curves(50, seed=1), good)
    assert data._load(file, 50) is not None


def test_the_checksum_is_compared(home):
    data.curves(50, seed=1)
    (file,) = home.glob("kfqn/*.npz")
    np.savez(file, images=np.zeros((50, 784), np.float32), sha256=data._digest(np.ones((50, 784), np.float32)))
    assert data._load(file, 50) is None


def test_images_come_even_where_they_cannot_be_cached(home, monkeypatch):
    def refuse(source, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match="not cached"):
        images = data.curves(20, seed=1)
    assert images.shape == (20, 784)
    assert not list(home.glob("kfqn/*"))


@pytest.mark.parametrize(("n", "seed", "name"), [(0, 0, "n"), (2.5, 0, "n"), (5, -1, "seed"), (5, None, "seed")])
def test_curves_name_the_argument_that_is_wrong(n, seed, name):
    with pytest.raises(ValueError, match=f"curves: {name} must be"):
        data.curves(n, seed)

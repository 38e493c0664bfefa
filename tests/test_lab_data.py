"""lab.data: images without a download, and a cache that cannot hand out anything but them."""

import gzip
import hashlib
import io
import json
import os
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import _openml, load_sample_images

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


@pytest.fixture
def numbered(monkeypatch):
    """Photographs whose pixels carry their own number: a patch then says where it was cut."""
    number = np.arange(427 * 640, dtype=np.uint32)
    planes = np.stack([number & 255, number >> 8 & 255, number >> 16], axis=1).astype(np.uint8)
    bunch = load_sample_images()
    bunch.images = [planes.reshape(427, 640, 3)] * 2
    monkeypatch.setattr(data, "load_sample_images", lambda: bunch)


def test_photograph_patches_share_no_pixel_between_training_and_testing(numbered):
    split = data.photograph_patches(3000, 1000, seed=0)
    used = []
    for x in (split.x_train, split.x_test):
        low, middle, high = (255 * x).round().long().unbind(1)
        used.append(set((low + 256 * middle + 65536 * high).unique().tolist()))
    assert not used[0] & used[1]
    # ... though together they cover nearly everything that can be covered.
    assert len(used[0] | used[1]) > 0.95 * 427 * 640


def test_a_photograph_patch_is_turned_by_its_label(numbered):
    split = data.photograph_patches(200, 10, seed=1)
    assert split.x_train.shape == (200, 3, 32, 32)
    numbers = (255 * split.x_train).round().long()
    numbers = numbers[:, 0] + 256 * numbers[:, 1] + 65536 * numbers[:, 2]
    for patch, turns in zip(numbers, split.y_train.tolist(), strict=True):
        upright = patch.rot90(-turns)
        assert (upright.diff(dim=1) == 1).all()
        assert (upright.diff(dim=0) == 640).all()


def test_photograph_patches_depend_on_the_seed_only():
    first, again, other = (data.photograph_patches(40, 20, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x_train, other.x_train)
    assert first.x_train.dtype == torch.float32
    assert first.x_train.min() >= 0
    assert first.x_train.max() <= 1
    labels = data.photograph_patches(4000, 1, seed=0).y_train
    # Binomial with mean 1000: five standard deviations are 137.
    assert (torch.bincount(labels) - 1000).abs().max() < 137


@pytest.mark.parametrize(("arguments", "name"), [((0, 1, 0), "n_train"), ((1, 2.0, 0), "n_test"), ((1, 1, -1), "seed")])
def test_photograph_patches_name_the_argument_that_is_wrong(arguments, name):
    with pytest.raises(ValueError, match=f"photograph_patches: {name} must be"):
        data.photograph_patches(*arguments)


class Server:
    """OpenML as scikit-learn asks it, with one small data set; counts what is downloaded."""

    def __init__(self, rows, checksum=None):
        pixels = [f"p{i}" for i in range(rows.shape[1] - 1)]
        lines = ["@relation tiny", *(f"@attribute {p} real" for p in pixels), "@attribute class {0,1,2}", "@data"]
        arff = "\n".join([*lines, *(",".join(map(str, row)) for row in rows.tolist())]).encode()
        features = [{"name": p, "data_type": "numeric", "is_target": "false"} for p in pixels]
        features.append({"name": "class", "data_type": "nominal", "is_target": "true"})
        for index, feature in enumerate(features):
            feature |= {"index": str(index), "is_ignore": "false", "is_row_identifier": "false"}
            feature["number_of_missing_values"] = "0"
        about = {"id": "1", "name": "tiny", "version": "1", "file_id": "7", "format": "ARFF", "status": "active"}
        about |= {"md5_checksum": checksum or hashlib.md5(arff).hexdigest(), "description": "", "url": self.url(7)}
        self.answers = {
            "data/list": {"data": {"dataset": [{"did": 1, "name": "tiny", "version": 1, "status": "active"}]}},
            "data/features": {"data_features": {"feature": features}},
            "data/qualities": {"data_qualities": {"quality": [{"name": "NumberOfInstances", "value": str(len(rows))}]}},
            "json/data/1": {"data_set_description": about},
        }
        self.arff, self.online, self.downloads = arff, True, 0

    def url(self, file_id):
        return f"https://api.openml.org/data/v1/download/{file_id}/tiny.arff"

    def __call__(self, request, *args, **kwargs):
        if not self.online:
            raise URLError("no route to host")
        if "download" in request.full_url:
            self.downloads += 1
            return self.reply(self.arff)
        return self.reply(json.dumps(next(a for k, a in self.answers.items() if k in request.full_url)).encode())

    def reply(self, body):
        stream = io.BytesIO(gzip.compress(body))
        stream.info = lambda: {"Content-Encoding": "gzip"}
        return stream


@pytest.fixture
def tiny(home, monkeypatch):
    def serve(rows, checksum=None):
        server = Server(rows, checksum)
        monkeypatch.setattr(_openml, "urlopen", server)
        monkeypatch.setattr(_openml.time, "sleep", lambda seconds: None)
        return server

    monkeypatch.setattr(data, "OPENML", {"tiny": (6, (1, 2, 2))})
    monkeypatch.setattr(data, "OPENML_TEST", 2)
    return serve


ROWS = np.column_stack([np.arange(24).reshape(6, 4) * 11, [0, 1, 2, 0, 1, 2]])


def test_openml_splits_scales_and_caches(tiny):
    server = tiny(ROWS)
    split = data.openml("tiny")
    assert [tuple(part.shape) for part in split] == [(4, 1, 2, 2), (4,), (2, 1, 2, 2), (2,)]
    np.testing.assert_array_equal(split.x_train.reshape(4, 4).numpy(), (ROWS[:4, :4] / 255).astype(np.float32))
    assert split.x_train.dtype == torch.float32
    assert split.y_test.tolist() == [1, 2]
    server.online = False  # from here on only the cache can answer
    assert torch.equal(data.openml("tiny").x_test, split.x_test)
    assert server.downloads == 1


@pytest.mark.filterwarnings("ignore:A network error occurred")
def test_openml_without_a_network_says_so_in_one_sentence(tiny):
    tiny(ROWS).online = False
    with pytest.raises(ConnectionError, match=r"tiny is not in .* no route to host.*; connect .* or use digits\(\)"):
        data.openml("tiny")


@pytest.mark.filterwarnings("ignore:A network error occurred")
def test_a_damaged_openml_cache_is_downloaded_again_or_refused(tiny, home):
    server = tiny(ROWS)
    split = data.openml("tiny")
    (file,) = home.glob("openml/**/tiny.arff.gz")
    for damage in (b"", file.read_bytes()[:30]):
        file.write_bytes(damage)
        with pytest.warns(RuntimeWarning, match="Invalid cache"):
            assert torch.equal(data.openml("tiny").x_train, split.x_train)
    assert server.downloads == 3
    file.write_bytes(b"")
    server.online = False
    with pytest.warns(RuntimeWarning, match="Invalid cache"), pytest.raises(ConnectionError, match="cannot be"):
        data.openml("tiny")


def test_a_download_that_fails_its_checksum_is_refused(tiny):
    tiny(ROWS, checksum="0" * 32)
    with pytest.warns(RuntimeWarning, match="Invalid cache"), pytest.raises(ValueError, match="md5"):
        data.openml("tiny")


@pytest.mark.parametrize("rows", [ROWS[:5], ROWS[:, 1:], np.column_stack([ROWS[:, :4] * 2, ROWS[:, 4]])])
def test_openml_refuses_what_is_not_the_data_set(tiny, rows):
    tiny(rows)
    with pytest.raises(ValueError, match="tiny should hold numbers from 0 to 255 of shape"):
        data.openml("tiny")


def test_openml_names_what_it_has():
    with pytest.raises(ValueError, match=r"CIFAR_10.*got 'mnist'"):
        data.openml("mnist")

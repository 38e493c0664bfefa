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

from kfqn_core.lab import cache, data


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


def test_curves_depend_on_the_seed_only_and_come_from_the_cache(home):
    first = data.curves(50, seed=1)
    assert first.dtype == torch.float32
    assert first.shape == (50, 784)
    assert not torch.equal(first, data.curves(50, seed=2))
    for file in home.glob("kfqn/*.npz"):
        file.unlink()
    assert torch.equal(first, data.curves(50, seed=1))
    (file,) = home.glob("kfqn/*.npz")
    cache.save(file.stem, images=np.zeros((50, 784), np.float32))  # what nobody would draw
    assert not data.curves(50, seed=1).any()
    assert not list(home.glob("**/*.part"))


def test_damaged_images_are_drawn_again(home):
    good = data.curves(50, seed=1)
    (file,) = home.glob("kfqn/*.npz")
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(data.curves(50, seed=1), good)
    assert cache.load(file.stem) is not None


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


def test_openml_splits_scales_and_caches(tiny, monkeypatch):
    server = tiny(ROWS)
    split = data.openml("tiny")
    assert [tuple(part.shape) for part in split] == [(4, 1, 2, 2), (4,), (2, 1, 2, 2), (2,)]
    np.testing.assert_array_equal(split.x_train.reshape(4, 4).numpy(), (ROWS[:4, :4] / 255).astype(np.float32))
    assert split.x_train.dtype == torch.float32
    assert split.y_test.tolist() == [1, 2]
    server.online = False  # from here on only the cache can answer
    monkeypatch.setattr(data, "fetch_openml", None)  # ... and it is not scikit-learn's, which is slow to read
    assert all(torch.equal(a, b) for a, b in zip(data.openml("tiny"), split, strict=True))
    assert server.downloads == 1
    kept = cache.load("openml-tiny")
    assert {name: (array.dtype, array.shape) for name, array in kept.items()} == {
        "pixels": (np.uint8, (6, 4)),
        "labels": (np.uint8, (6,)),
    }


def test_damaged_openml_images_are_read_again_from_what_scikit_learn_keeps(tiny, home):
    server = tiny(ROWS)
    split = data.openml("tiny")
    (file,) = home.glob("kfqn/*.npz")
    raw = bytearray(file.read_bytes())
    raw[raw.index(bytes(range(0, 44, 11)))] ^= 0xFF
    file.write_bytes(raw)
    server.online = False
    assert torch.equal(data.openml("tiny").x_train, split.x_train)
    assert cache.load("openml-tiny") is not None


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
    (ours,) = home.glob("kfqn/*.npz")
    for damage in (b"", file.read_bytes()[:30]):
        ours.unlink()
        file.write_bytes(damage)
        with pytest.warns(RuntimeWarning, match="Invalid cache"):
            assert torch.equal(data.openml("tiny").x_train, split.x_train)
    assert server.downloads == 3
    file.write_bytes(b"")
    ours.unlink()
    server.online = False
    with pytest.warns(RuntimeWarning, match="Invalid cache"), pytest.raises(ConnectionError, match="cannot be"):
        data.openml("tiny")


def test_a_download_that_fails_its_checksum_is_refused(tiny):
    tiny(ROWS, checksum="0" * 32)
    with pytest.warns(RuntimeWarning, match="Invalid cache"), pytest.raises(ValueError, match="md5"):
        data.openml("tiny")


WRONG = (ROWS[:5], ROWS[:, 1:], ROWS * [2, 2, 2, 2, 1], ROWS * [1, 1, 1, 0.5, 1])


@pytest.mark.parametrize("rows", WRONG, ids=["samples", "pixels", "range", "fractions"])
def test_openml_refuses_what_is_not_the_data_set(tiny, rows):
    tiny(rows)
    with pytest.raises(ValueError, match="tiny should hold whole numbers from 0 to 255 of shape"):
        data.openml("tiny")


def test_openml_names_what_it_has():
    with pytest.raises(ValueError, match=r"CIFAR_10.*got 'mnist'"):
        data.openml("mnist")


def test_photograph_pixels_carry_the_colour_of_their_place():
    split = data.photograph_pixels()
    assert [tuple(part.shape) for part in split] == [(60_000, 2), (60_000, 3), (10_000, 2), (10_000, 3)]
    assert all(part.dtype == torch.float32 for part in split)
    photograph = torch.tensor(load_sample_images().images[0])
    height, width, _ = photograph.shape
    seen = []
    for places, colours in (split[:2], split[2:]):
        assert places.min() > 0
        assert places.max() < 1
        row, column = (places * torch.tensor([height, width])).long().unbind(1)
        assert torch.equal((255 * colours).round().to(torch.uint8), photograph[row, column])
        seen += (row * width + column).tolist()
    assert len(set(seen)) == 70_000, "a pixel serves twice"
    assert all(torch.equal(a, b) for a, b in zip(split, data.photograph_pixels(), strict=True))


def test_the_table_is_standardised_and_always_the_same():
    split, again = data.table(), data.table()
    assert [tuple(part.shape) for part in split] == [(20_000, 120), (20_000,), (4_000, 120), (4_000,)]
    assert all(torch.equal(a, b) for a, b in zip(split, again, strict=True))
    # A sum of 20,000 float32 roundings of 6e-8 each, and as many standard errors as a column of new rows may be off.
    assert split.x_train.mean(0).abs().max() < 1e-5
    assert (split.x_train.std(0) - 1).abs().max() < 1e-5
    assert split.x_test.mean(0).abs().max() < 5 / 4_000**0.5
    # Classes are equally likely: five standard deviations of a binomial count.
    assert (torch.bincount(split.y_train, minlength=12) - 20_000 / 12).abs().max() < 5 * (20_000 / 12) ** 0.5
    between = torch.stack([split.x_train[split.y_train == k].mean(0) for k in range(12)]).std(0)
    # In a column that knows nothing of the class, its means differ by 1 / sqrt(20,000 / 12) = 0.024.
    assert (between > 0.05).sum() == 40


def test_text_windows_are_followed_by_their_bytes(monkeypatch):
    text = bytes(range(32, 127)) * 3
    monkeypatch.setattr(data, "topics", {"b": text[95:].decode(), "a": text[:94].decode()})
    split = data.text_windows(5)
    # 94, a line feed, and 190 bytes: 256 for training, which are 51 windows and their last target, and 29 for testing.
    assert [tuple(part.shape) for part in split] == [(51, 5), (51, 5), (5, 5), (5, 5)]
    joined = text[:94] + b"\n" + text[95:]
    assert bytes(split.x_train.flatten().tolist()) == joined[:255]
    assert bytes(split.y_train.flatten().tolist()) == joined[1:256]
    assert bytes(split.x_test.flatten().tolist()) == joined[256:281]
    assert bytes(split.y_test.flatten().tolist()) == joined[257:282]
    with pytest.raises(ValueError, match="less than a tenth of the text, 28 bytes, got 29"):
        data.text_windows(29)
    with pytest.raises(ValueError, match="length must be a positive integer, got 0"):
        data.text_windows(0)


def test_the_text_is_what_python_ships():
    split = data.text_windows(64)
    assert split.x_train.dtype == torch.int64
    assert len(split.x_train) > 5_000
    assert len(split.x_test) > 500
    assert split.x_train.max() < 256
    assert b"statement" in bytes(split.x_train.flatten().tolist())

"""lab.cache: what comes back is what was put in, or nothing."""

import os

import numpy as np
import pytest

from kfqn_core.lab import cache

ARRAYS = {"images": np.arange(12, dtype=np.float32).reshape(4, 3), "labels": np.array([3, 1, 2, 0], np.uint8)}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    return tmp_path


def same(kept):
    assert kept is not None
    assert kept.keys() == ARRAYS.keys()
    return all(kept[k].dtype == a.dtype and np.array_equal(kept[k], a) for k, a in ARRAYS.items())


def test_what_comes_back_is_what_was_put_in(home):
    assert cache.load("some") is None
    cache.save("some", **ARRAYS)
    assert same(cache.load("some"))
    assert cache.load("other") is None
    assert [file.name for file in home.glob("**/*.*")] == ["some.npz"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_file_is_nothing_until_it_is_written_again(home, damage):
    cache.save("some", **ARRAYS)
    (file,) = home.glob("kfqn/*.npz")
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[raw.index(ARRAYS["images"].tobytes()) + 5] ^= 0xFF
    file.write_bytes({"truncate": raw[: len(raw) // 2], "flip": raw, "empty": b""}[damage])
    assert cache.load("some") is None
    cache.save("some", **ARRAYS)
    assert same(cache.load("some"))


@pytest.mark.parametrize(
    "other",
    [
        {"images": ARRAYS["images"] + 1, "labels": ARRAYS["labels"]},
        {"images": ARRAYS["images"].reshape(3, 4), "labels": ARRAYS["labels"]},
        {"images": ARRAYS["images"].view(np.int32), "labels": ARRAYS["labels"]},
        {"pixels": ARRAYS["images"], "labels": ARRAYS["labels"]},
        {"images": ARRAYS["images"]},
    ],
    ids=["values", "shape", "dtype", "name", "missing"],
)
def test_the_checksum_covers_values_shapes_dtypes_and_names(home, other):
    cache.save("some", **ARRAYS)
    (file,) = home.glob("kfqn/*.npz")
    with np.load(file) as archive:
        checksum = archive["sha256"]
    np.savez(file, **other, sha256=checksum)
    assert cache.load("some") is None
    np.savez(file, **ARRAYS, sha256=checksum)
    assert same(cache.load("some"))
    np.savez(file, **ARRAYS)
    assert cache.load("some") is None


def test_where_nothing_can_be_kept_there_is_a_warning(home, monkeypatch):
    def refuse(source, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match=r"some: not cached \(read-only\)"):
        cache.save("some", **ARRAYS)
    assert cache.load("some") is None
    assert not list(home.glob("kfqn/*"))

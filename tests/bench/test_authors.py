"""The published method beside its authors' log: what is recorded, what is not run twice, and what the table counts."""

import argparse
from types import SimpleNamespace

import pytest

from benchmarks import authors
from kfqn_core.lab.problems import digits_autoencoder


@pytest.fixture
def short(monkeypatch):
    """The digits in place of MNIST, and two epochs of the log."""
    monkeypatch.setattr(authors, "TASKS", {"P8": SimpleNamespace(problem=digits_autoencoder(), key="P8", steps=None)})
    monkeypatch.setattr(authors, "LOG", (30.0, 25.0))


def arguments(folder):
    return argparse.Namespace(results=folder, seeds=1)


def test_runs_are_recorded_and_not_repeated(tmp_path, short, monkeypatch, capsys):
    authors.main(arguments(tmp_path))
    lines = (tmp_path / "authors.jsonl").read_text().splitlines()
    assert len(lines) == 3  # an environment, guarded, and as published
    table = authors.table(tmp_path)
    assert list(table.index) == [1, 2]
    assert table["guarded", "alive"].tolist() == table["as published", "alive"].tolist() == [1, 1]
    assert table["guarded", "mean"].between(20, 60).all()  # 64 pixels of log 2 each are 44
    monkeypatch.setattr(authors, "train", None)
    authors.main(arguments(tmp_path))
    assert (tmp_path / "authors.jsonl").read_text().splitlines() == lines
    assert "guarded" in capsys.readouterr().out


def test_a_run_that_is_lost_says_so_and_is_not_alive(tmp_path, short, monkeypatch):
    monkeypatch.setattr(authors, "RATE", 1e6)
    authors.main(arguments(tmp_path))
    table = authors.table(tmp_path)
    assert table["as published", "alive"].tolist() == [0, 0]
    (run,) = authors.Results("authors", tmp_path).of("run", authors.variants()["as published"])
    assert run["loss"] == []
    assert run["ended"]


def test_the_table_counts_the_living_and_the_close(tmp_path, monkeypatch):
    monkeypatch.setattr(authors, "LOG", (100.0, 50.0))
    results = authors.Results("authors", tmp_path)
    guarded = authors.variants()["guarded"]
    for losses in ([104.0, 51.0], [106.0, 53.0], [95.5]):
        results.add("run", guarded, seed=0, loss=losses, ended=None)
    table = authors.table(tmp_path)["guarded"]
    assert table["alive"].tolist() == [3, 2]
    assert table["close"].tolist() == [2, 1]
    assert table["lowest"].tolist() == [95.5, 51.0]
    assert table["mean"].tolist() == [pytest.approx(305.5 / 3), 52.0]

"""`step-cost --model`: a table and a picture of the cost of a step on anybody's model."""

import pandas as pd

from benchmarks.__main__ import main
from benchmarks.gpu.fast import CONTESTANTS

PROGRAM = """
import torch
from torch import nn

def task(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5)).to(device)
    x = torch.randn(8, 3, 6, 6, device=device)
    model(x)
    return model, lambda: model(x).square().mean()
"""


def test_a_model_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "a_model_of_mine.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    assert main(["step-cost", "--model", "a_model_of_mine:task"]) == 0
    frame = pd.read_csv("out/step-cost.csv", index_col=0)
    assert set(frame.index) == {*CONTESTANTS, "kfqn"}
    assert frame.loc["adam", "eager / Adam"] == 1
    assert (frame["eager ms"] > 0).all()
    assert frame.loc["kfqn, updating", "operations"] > frame.loc["kfqn, between updates", "operations"]
    assert (tmp_path / "out" / "step-cost.svg").stat().st_size > 1000
    assert "a step on" in capsys.readouterr().out


def test_what_is_no_model_is_said_in_a_sentence(capsys):
    for name, what in (
        ("no_such_module:task", "No module named"),
        ("json", "a colon is missing"),
        ("json:task", "task"),
    ):
        assert main(["step-cost", "--model", name]) == 1
        said = capsys.readouterr().out
        assert what in said
        assert "give module:function" in said

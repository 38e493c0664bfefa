"""`make gpu` without a GPU: the same script at toy sizes; and the tables that are made of what it writes."""

import json
import math

from benchmarks.__main__ import main
from benchmarks.gpu import fast, good
from benchmarks.gpu.table import FILE, table


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_rehearsal_runs_every_part_and_says_that_it_is_one(tmp_path, capfd):
    file = tmp_path / "gpu.jsonl"
    assert main(["gpu", "--results", str(file)]) == 0
    written = lines(file)
    assert written[0]["rehearsal"]
    assert [line["part"] for line in written if line.get("ended") == "finished"] == ["right", "fast", "good"]
    tests = next(line for line in written if "passed" in line)
    assert tests["failed"] == []
    assert tests["passed"] >= 8
    cases = [line for line in written if "case" in line]
    assert len(cases) == 2
    assert all(set(line["rows"]) == {*fast.CONTESTANTS, "kfqn"} for line in cases)
    assert not any("failed" in key for line in cases for row in line["rows"].values() for key in row)
    assert {line["method"] for line in written if "loss" in line} == {each.name for each in good.CONTESTANTS}
    assert table(file) == ""  # numbers that mean nothing are not shown
    said = capfd.readouterr().out
    assert "a rehearsal at toy sizes on the CPU, whose numbers mean nothing" in said
    assert all(case.name in said for case in fast.CASES)


def test_a_rate_that_diverges_is_not_chosen_because_it_is_the_first():
    runs = {0.3: {"loss": [5.0, math.nan]}, 0.1: {"loss": [5.0, 2.0]}, 0.01: {"loss": [5.0, 1.0]}}
    assert good.chosen(runs) == 0.01
    assert good.chosen({**runs, 0.01: {"loss": [5.0, math.inf]}}) == 0.1


def test_the_tables_are_those_of_the_lines():
    """Against numbers picked from the committed lines by hand-written paths."""
    written, shown = lines(FILE), table()
    case = next(line for line in written if line.get("case", "").startswith("ResNet-50"))
    kfqn = case["rows"]["kfqn"]
    assert f"{kfqn['eager ms']:.3g} / {kfqn['graph ms']:.3g} |" in shown
    runs = [
        line["seconds to 59.8"] for line in written
        if line.get("method") == "muon" and line["seed"] in (1, 2) and line["epochs"] == 10
    ]  # fmt: skip
    assert f"| {sum(runs) / len(runs):.2f} |" in next(row for row in shown.splitlines() if row.startswith("| muon"))
    assert "not reached" in next(row for row in shown.splitlines() if row.startswith("| adam, graph"))
    lost = [
        line["loss"][-1] is None for line in written
        if line.get("method") == "K-BFGS 2020" and line["seed"] in (1, 2)
    ]  # fmt: skip
    row = next(row for row in shown.splitlines() if row.startswith("| K-BFGS 2020"))
    assert f"{sum(lost)} of 2 diverged" in row  # and the mean is that of the other

"""Budgets, schedule, resumption and the records that a benchmark leaves."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import __main__, plots, protocol
from benchmarks.methods import METHODS, MuonAndAdam, orthogonalised, state_bytes
from benchmarks.problems import TASKS, Task
from benchmarks.protocol import (
    LADDER,
    Choice,
    Contest,
    budget_steps,
    charged_ratio,
    cheapest,
    choices,
    measures,
    run,
    score,
    walk,
)
from benchmarks.records import LENGTHS, Results, rounded
from benchmarks.tables import HERO, against_peers, against_tuned, summary
from kfqn_core.lab.problems import Problem
from kfqn_core.lab.training import cosine

ADAM = METHODS["adam"]


def small():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator)
    y = (x[:, 0] > 0).long()
    return Problem("small", lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), x[:16], y[:16], x[16:],
                   y[16:], nn.functional.cross_entropy, batch_size=8)  # fmt: skip


TASK = Task("P2", small, 10, "categorical")


@pytest.mark.parametrize(
    ("ratio", "budget", "horizon", "steps"),
    [
        (1.0, "wall", 1, 200),
        (2.5, "wall", 1, 80),
        (0.96, "wall", 1, 208),
        (3.0, "wall", 10, 667),
        (2.5, "steps", 10, 2000),
    ],
)
def test_budget(ratio, budget, horizon, steps):
    assert budget_steps(200, horizon, ratio, budget) == steps


def test_every_method_gets_a_step():
    assert budget_steps(10, 1, 1000.0, "wall") == 1
    with pytest.raises(ValueError, match="minutes"):
        budget_steps(10, 1, 1.0, "minutes")


def test_every_method_follows_the_same_schedule(monkeypatch):
    seen = {}

    class Watched(torch.optim.SGD):
        def step(self, closure):
            seen.setdefault(self.kind, []).append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    for kind, lr in (("one", 1.0), ("other", 0.1)):

        def build(model, lr, task, kind=kind):
            optimizer = Watched(model.parameters(), lr=lr)
            optimizer.kind = kind
            return optimizer

        monkeypatch.setattr(type(ADAM), "build", lambda self, model, lr, task, build=build: build(model, lr, task))
        run(TASK, ADAM, lr, "cosine", 0, 10)
    factors = [cosine(step / 11) for step in range(1, 11)]
    assert [lr for [lr] in seen["one"]] == pytest.approx(factors)
    assert [lr for [lr] in seen["other"]] == pytest.approx([0.1 * factor for factor in factors])


def test_validation_and_test_are_the_two_halves_of_the_test_set():
    problem, model = small(), small().model(0)
    columns = measures(problem)(model)
    halves = {"validation": slice(0, None, 2), "test": slice(1, None, 2)}
    for name, part in halves.items():
        z, y = model(problem.x_test[part]), problem.y_test[part]
        assert columns[f"{name} loss"] == pytest.approx(nn.functional.cross_entropy(z, y).item())
        assert columns[f"{name} accuracy"] == (z.argmax(1) == y).double().mean().item()
    assert model.training


COST = {"to_adam": {"value": 1.9, "low": 1.8, "high": 2.0}, "bytes_to_adam": 1.1, "adam_ms": 0.1}


def contest(results, seeds=2, budgets=("wall", "steps"), horizon=1):
    results.add("step cost", METHODS["kfqn"], **COST)
    return Contest(TASK, METHODS["kfqn"], results, horizon, seeds, budgets, ratio=2.0)


def test_an_interrupted_contest_goes_on_where_it_stopped(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(protocol, "run", lambda *args: ran.append(args[2:]) or run(*args))
    first = contest(Results("P2", tmp_path)).play()
    for _ in range(5):  # all of the tuning, and four runs
        next(first)
    # The process dies while it writes a line.
    with (tmp_path / "P2.jsonl").open("a") as file:
        file.write('{"kind": "run", "pro')
    list(contest(Results("P2", tmp_path)).play())
    assert len(ran) == len(set(ran)), "a run that was stored has been repeated"
    lines = [json.loads(line) for line in (tmp_path / "P2.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "run" for line in lines) == len(ran)
    before = len(ran)
    list(contest(Results("P2", tmp_path)).play())
    assert len(ran) == before


@pytest.mark.parametrize("best", [1e-5, 0.003, 0.03, 10.0])
def test_a_walk_ends_where_the_best_has_worse_neighbours(best):
    looked = []

    def loss(lr):
        looked.append(lr)
        return abs(math.log(lr / best))

    found = walk(loss, 0.03)
    i = LADDER.index(best)
    assert min(found, key=found.get) == best
    assert {LADDER[i - 1], LADDER[i], LADDER[i + 1]} <= set(found)
    assert len(looked) == len(set(looked)) == len(found)
    assert list(found) == sorted(found)


def test_a_walk_stops_at_the_ends_of_the_ladder_and_walks_down_where_nothing_converges():
    assert min(walk(lambda lr: lr, 0.03)) == LADDER[0]
    assert max(walk(lambda lr: -lr, 0.03)) == LADDER[-1]
    assert min(walk(lambda lr: math.inf, 0.03)) == LADDER[0]


def valley(lr, schedule, seed=0):
    """A score that is lowest at 0.1 under a cosine and at 0.01 with a constant rate, and turns on other seeds."""
    best, floor = {
        "cosine": (0.1, 1.0), "linear": (0.1, 1.5), "last fifth": (0.1, 1.1), "constant": (0.01, 1.3),
    }[schedule]  # fmt: skip
    penalty = 0.5 if seed and lr == best and schedule == "cosine" else 0.0
    return math.exp(floor + penalty + 0.2 * abs(math.log(lr / best)))


def test_a_choice_is_the_best_of_three_seeds_among_the_best_three_of_one():
    looked = []

    def ensure(choice, seed):
        looked.append((choice.lr, choice.schedule, seed))
        return valley(choice.lr, choice.schedule, seed)

    found = choices(TASK, METHODS["kfqn"], ensure)
    kfqn = METHODS["kfqn"]
    assert found == {
        "tuned": Choice(kfqn, 0.1, "last fifth"),  # the cosine at 0.1 leads on seed 0 and falls behind on two others
        "constant": Choice(kfqn, 0.01, "constant"),
        "default": Choice(kfqn, 0.03, "linear"),
        "default, constant": Choice(kfqn, 0.03, "constant"),
    }
    others = {(lr, schedule) for lr, schedule, seed in looked if seed and schedule != "constant"}
    assert others == {(0.1, "cosine"), (0.1, "last fifth"), (0.3, "cosine")}
    assert choices(TASK, kfqn, lambda choice, seed: None) is None


def test_settings_are_tuned_with_the_rate():
    kfac = METHODS["kfac"]
    assert len(kfac.variants()) == 6
    wanted = {"damping": 0.3, "kl_clip": 1e30}

    def ensure(choice, seed):
        off = sum(choice.method.settings[name] != value for name, value in wanted.items())
        return valley(choice.lr, choice.schedule) + off

    chosen = choices(TASK, kfac, ensure)
    assert chosen.keys() == {"tuned", "constant"}
    for choice in chosen.values():
        assert {name: choice.method.settings[name] for name in wanted} == wanted


def test_what_is_judged_are_the_choices_on_fresh_seeds(tmp_path):
    results = Results("P2", tmp_path)
    list(contest(results).play())
    runs = results.find("run")
    chosen = choices(TASK, METHODS["kfqn"], lambda choice, seed: score(choice.records(results, seed=seed, steps=5)[0]))
    expected = {
        (choice.lr, choice.schedule, seed, steps)
        for name, choice in chosen.items() for seed in (10, 11) for steps in (5, 10)
        if steps == 5 or "constant" not in name
    }  # fmt: skip
    assert {(r["lr"], r["schedule"], r["seed"], r["steps"]) for r in runs if r["seed"] > 2} == expected
    assert {r["steps"] for r in runs if r["seed"] <= 2} == {5}


def test_our_method_pays_the_upper_end_and_a_peer_the_lower(tmp_path):
    results = Results("P2", tmp_path)
    for name in ("kfqn", "muon", "adam"):
        results.add("step cost", METHODS[name], **COST)
    assert [charged_ratio(METHODS[name], results) for name in ("kfqn", "muon", "adam", "soap")] == [2.0, 1.8, 1.0, None]


def test_of_methods_with_one_label_the_cheaper_is_a_contestant(tmp_path):
    results = Results("P2", tmp_path)
    both = [METHODS["muon"], METHODS["muon-bfloat16"], METHODS["adam"]]
    results.add("step cost", both[0], **COST)
    results.add("step cost", both[1], **{**COST, "to_adam": {"value": 1.5, "low": 1.4, "high": 1.6}})
    assert cheapest(both, results) == both[1:]  # and Adam, of which nothing is known, stays


def test_everything_is_chosen_at_the_short_horizon(tmp_path, monkeypatch):
    results = Results("P2", tmp_path)
    list(contest(results, 1, ("wall",), horizon=10).play())
    runs = results.find("run")
    assert {r["steps"] for r in runs if r["seed"] <= 2} == {5}
    assert {r["steps"] for r in runs if r["seed"] > 2} == {50}
    monkeypatch.setitem(TASKS, "P2", TASK)
    assert set(summary(["P2"], ["kfqn"], tmp_path)["horizon"]) == {10}


def test_records_have_what_a_report_needs(tmp_path):
    results = Results("P2", tmp_path)
    list(contest(results).play())
    environment = Results("P2", tmp_path).find("environment")[0]
    assert environment.keys() == {"kind", "id", "python", "system", "packages", "processor", "cores", "threads",
                                  "device", "commit"}  # fmt: skip
    for record in Results("P2", tmp_path).find("run"):
        expected = {"kind", "problem", "method", "settings", "lr", "schedule", "seed", "steps", "seconds",
                    "train loss", "best", "most accurate", "date", "validation loss", "test loss",
                    "validation accuracy", "test accuracy",
                    "environment"}  # fmt: skip
        assert record.keys() == expected | ({"curve"} if record["seed"] > 2 else set())
        assert record["best"]["step"] > 0
        assert record["most accurate"]["step"] > 0
        assert record["environment"] == environment["id"]


def test_summary_holds_default_and_tuned_rows_of_both_contests(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "P2", TASK)
    results = Results("P2", tmp_path)
    list(contest(results).play())
    frame = summary(["P2"], ["kfqn", "adam"], tmp_path)
    labels = (HERO, "KFQN, tuned")
    assert sorted(zip(frame["contestant"], frame["contest"], frame["budget"], frame["steps"], strict=True)) == sorted(
        [(label, contest, "wall", 5) for label in labels for contest in ("free", "constant")]
        + [(label, "free", "steps", 10) for label in labels]
    )
    expected = [score(r) for r in results.find("run", lr=0.03, schedule="linear", steps=5) if r["seed"] > 2]
    row = frame[(frame["contestant"] == HERO) & (frame["budget"] == "wall") & (frame["contest"] == "free")].iloc[0]
    assert row["train loss"] == pytest.approx(sum(expected) / 2)
    assert row["seeds"] == 2


def test_the_default_is_compared_with_the_best_peer_seed_by_seed():
    def row(contestant, method, losses, problem="P2"):
        return {"problem": problem, "contest": "free", "budget": "wall", "horizon": 1, "contestant": contestant,
                "method": method, "lr": 0.1, "schedule": "cosine", "losses": dict(enumerate(losses, 10)),
                "train loss": sum(losses) / len(losses)}  # fmt: skip

    frame = pd.DataFrame([
        row(HERO, "kfqn", [1.0, 2.0, 4.0]), row("KFQN, tuned", "kfqn", [0.5, 1.0, 2.1]),
        row("Adam", "adam", [2.0, 4.0, 9.0]), row("Muon", "muon", [9.0, 9.0, 9.0]), row("SGD", "sgd", [math.inf] * 3),
    ])  # fmt: skip
    peers, tuned = against_peers(frame), against_tuned(frame)
    assert peers["against"].tolist() == ["Adam"]
    assert peers["ratio"].item() == pytest.approx((0.5 * 0.5 * 4 / 9) ** (1 / 3))
    assert peers["low"].item() < peers["ratio"].item() < peers["high"].item()
    assert peers["p, Holm"].item() == peers["p"].item()
    assert (peers["n"].item(), peers["seeds ahead"].item()) == (3, 3)
    assert tuned["ratio"].item() == pytest.approx((2 * 2 * 4 / 2.1) ** (1 / 3))


def test_muon_orthogonalises_in_the_dtype_of_its_gradient():
    """Singular values of a matrix that is not badly conditioned come near one, in every dtype."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 9), (9, 6)):
        found = orthogonalised(
            torch.randn(shape, generator=generator, dtype=torch.float64), (3.4445, -4.775, 2.0315), 5, 1e-7
        )
        values = torch.linalg.svdvals(found)
        assert found.dtype == torch.float64
        assert ((values > 0.6) & (values < 1.25)).all()


def test_changed_settings_are_another_method(tmp_path):
    results = Results("P2", tmp_path)
    results.add("run", METHODS["kfqn-5"], lr=0.1, seed=0, steps=5)
    assert results.of("run", METHODS["kfqn-5"])
    assert not results.find("run", method="kfqn-5", settings={"refresh": 4})
    results.forget(METHODS["kfqn-5"])
    assert not Results("P2", tmp_path).find("run")


def test_a_step_of_another_length_costs_the_same_and_with_another_factor_not(tmp_path, monkeypatch):
    results, ours = Results("P2", tmp_path), METHODS["kfqn"]
    results.add("step cost", ours, **COST)
    results.add("run", ours)
    assert ours.described().keys() >= LENGTHS  # by the names under which they are recorded
    monkeypatch.setattr("kfqn_core.training.steadiness.KEPT", 0.1)
    assert results.of("step cost", ours)
    assert not results.of("run", ours)
    assert not results.of("step cost", replace(ours, settings={"activation_factor": "action"}))


def test_a_diverging_run_and_a_crashing_method_are_recorded():
    diverged = run(TASK, METHODS["sgd"], 1e38, "cosine", 0, 10)
    assert diverged["train loss"] is None
    assert "smaller learning rate" in diverged["stopped"]
    assert score(diverged) == math.inf
    crashed = run(TASK, METHODS["adam"], -1.0, "cosine", 0, 10)
    assert crashed["failed"].startswith("ValueError")


def test_rounding_keeps_five_digits_and_json():
    assert rounded({"a": [1.23456789, 3, "x"], "b": float("inf")}) == {"a": [1.2346, 3, "x"], "b": None}


def test_a_problem_without_its_data_is_left_out_with_a_sentence(tmp_path, monkeypatch, capsys):
    def unavailable():
        raise ConnectionError("openml: mnist_784 is not here; connect to a network once")

    monkeypatch.setitem(TASKS, "P8", Task("P8", unavailable, 10, "bernoulli"))
    monkeypatch.setitem(TASKS, "P2", TASK)
    for command in (["run", "--costs-only"], ["step-cost", "--turns", "3"]):
        assert __main__.main([*command, "--problems", "P8", "P2", "--methods", "adam", "--results", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert said.count("P8 is left out: openml: mnist_784 is not here; connect to a network once\n") == 1
        assert "Traceback" not in said
    assert not (tmp_path / "P8.jsonl").exists()
    assert Results("P2", tmp_path).of("step cost", ADAM)


def test_a_report_needs_results_and_no_data(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "P2", TASK)
    results = Results("P2", tmp_path)
    results.add("step cost", ADAM, **COST)
    list(Contest(TASK, ADAM, results, 1, 1, ("wall",), ratio=1.0).play())
    monkeypatch.delattr(Task, "problem")
    assert __main__.main(["report", "--problems", "P2", "--methods", "adam", "--results", str(tmp_path)]) == 0
    assert f"## {plots.TITLES['P2']}: 1x, equal wall time, any schedule" in (tmp_path / "tables.md").read_text()


def test_every_problem_that_is_trained_has_a_title():
    assert list(plots.TITLES) == [key for key, task in TASKS.items() if task.steps is not None]
    assert all(title.startswith(f"{key}: ") for key, title in plots.TITLES.items())


def test_kfac_on_a_loss_of_two_terms_is_a_recorded_failure(tmp_path):
    results = Results("P13", tmp_path)
    protocol.measure_costs(TASKS["P13"], [METHODS["kfac"]], results, 3)
    assert charged_ratio(METHODS["kfac"], results) is None
    assert "KFAC: likelihood must be one of" in results.of("failure", METHODS["kfac"])[-1]["error"]


@pytest.mark.parametrize("key", ["P10", "P12"])
@pytest.mark.parametrize("name", ["kfac", "kfqn", "muon"])
def test_text_and_squared_errors_are_measured_and_lowered(key, name, monkeypatch):
    """Targets of several labels a sample, and of none at all."""
    task, method = TASKS[key], METHODS[name]
    problem, two = task.problem, slice(2 * task.problem.batch_size)
    few = replace(problem, x_train=problem.x_train[two], y_train=problem.y_train[two], x_test=problem.x_test[:50],
                  y_test=problem.y_test[:50])  # fmt: skip
    monkeypatch.setattr(Task, "problem", property(lambda self: few))
    outcome = run(task, method, method.first_rate(task), "cosine", 2, 12)
    assert "failed" not in outcome
    assert outcome["curve"]["train loss"][-1] < outcome["curve"]["train loss"][0]
    assert ("test accuracy" in outcome) == (key == "P10")
    assert 0 <= outcome.get("test accuracy", 0) <= 1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_lowers_a_loss(name):
    outcome = run(TASK, METHODS[name], METHODS[name].first_rate(TASK), "cosine", 0, 20)
    assert "failed" not in outcome
    assert outcome["train loss"] < outcome.get("curve")["train loss"][0]


def test_muon_moves_a_convolution_in_place():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MuonAndAdam(model, 0.1, weight_decay=0.0)
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = closure()
    optimizer.step(closure)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert closure() < first
    # One momentum for each weight, two moments and a counter for each bias.
    assert state_bytes(optimizer) == 4 * (54 + 24) + 4 * 2 * (3 + 2) + 2 * 4

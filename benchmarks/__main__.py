"""`python -m benchmarks step-cost | run | report | check | authors | gpu`: see README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks import authors, check, report, yours
from benchmarks.costs import step_cost_table
from benchmarks.gpu import script
from benchmarks.methods import METHODS
from benchmarks.problems import TASKS, available
from benchmarks.protocol import BUDGETS, Contest, charged_ratio, cheapest, measure_costs, play
from benchmarks.records import RESULTS, Results
from benchmarks.timing import one_thread


def run(arguments: argparse.Namespace) -> int:
    """Measure step costs where none is kept, then play every contest that is not complete."""
    contests = []
    methods = [METHODS[name] for name in arguments.methods]
    for key in available(arguments.problems):
        results = Results(key, arguments.results)
        for name in arguments.redo:
            results.forget(METHODS[name])
        measure_costs(TASKS[key], methods, results, arguments.turns)
        for method in cheapest(methods, results):
            ratio = charged_ratio(method, results)
            if ratio is None:
                error = results.of("failure", method)[-1]["error"]
                tqdm.write(f"{key} {method.name} does not run here, which is recorded: {error}")
            elif TASKS[key].steps is not None:
                contests += [
                    Contest(TASKS[key], method, results, horizon, arguments.seeds, tuple(arguments.budgets), ratio)
                    for horizon in arguments.horizon
                ]
    if not arguments.costs_only:
        play(contests)
    return 0


def step_cost(arguments: argparse.Namespace) -> int:
    """Of problems of the comparison, or of one model of anybody's."""
    return yours.main(arguments) if arguments.model else step_cost_table(arguments)


def main(arguments: list[str] | None = None) -> int:
    one_thread()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, function, description: str, problems: list[str], methods: list[str]):
        sub = commands.add_parser(name, help=description, description=description)
        sub.set_defaults(function=function)
        sub.add_argument("--problems", nargs="+", choices=list(TASKS), default=problems, metavar="P")
        sub.add_argument("--methods", nargs="+", choices=list(METHODS), default=methods, metavar="METHOD")
        sub.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
        return sub

    trained = [key for key, task in TASKS.items() if task.steps is not None]
    everyone = list(METHODS)
    sub = command("step-cost", step_cost, "cost of a step against its floor", ["P1", "P4"], everyone)
    sub.add_argument("--turns", type=int, default=15, help="turns that each method takes")
    sub.add_argument("--model", metavar="MODULE:FUNCTION", help="a model of yours instead: see benchmarks/yours.py")
    sub = command("run", run, "run what is missing from the results", trained, everyone)
    sub.add_argument("--seeds", type=int, default=10, help="judged seeds")
    sub.add_argument("--turns", type=int, default=15, help="turns that each method takes where step costs are measured")
    sub.add_argument("--horizon", nargs="+", type=int, choices=(1, 10), default=[1], help="multiples of N")
    sub.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    sub.add_argument("--redo", nargs="+", choices=everyone, default=[], metavar="METHOD", help="forget these first")
    sub.add_argument("--costs-only", action="store_true", help="measure step costs and stop: best on a quiet machine")
    command("report", report.main, "write every table and figure from the results", trained, everyone)
    sub = command("check", check.main, "does a short run order the methods as the results do?",
                  ["P1", "P2", "P3", "P5"], ["kfqn", "muon", "soap", "adam", "sgd"])  # fmt: skip
    sub.add_argument("--seeds", type=int, default=2, help="judged seeds")
    sub = commands.add_parser("authors", help="K-BFGS beside its authors' log", description=authors.__doc__)
    sub.set_defaults(function=authors.main)
    sub.add_argument("--seeds", type=int, default=10)
    sub.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    script.add_arguments(
        commands.add_parser("gpu", help="right, fast, good: all that a GPU shows", description=script.__doc__)
    )
    parsed = parser.parse_args(arguments)
    return parsed.function(parsed)


if __name__ == "__main__":
    sys.exit(main())

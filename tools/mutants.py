"""Who notices a mistake? Every room of the ledger gets mutants; its tests and the checks of chapters try to catch them.

python -m tools.mutants [--most 12] [--seed 0] [--again] [ROOM or CHAPTER ...]

One process does one thing at a time and appends every verdict to `tools/mutants.jsonl`; what stands there about the
present code is not tried again. A mutant runs in a fork of a process that has imported everything. Of the tests only
those are asked that enter the mutated function, quick ones first; of a chapter, the checks that name the room, after
what they stand on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from tqdm.auto import tqdm

from tools import ledger, manifest, mutation, rooms, slices, source
from tools.manifest import ROOT, Book, Chapter
from tools.mutation import Mutant
from tools.scores import RECORDS, TESTS

SAMPLE = 12  # mutants of a room
PATIENCE_S = 10.0  # of processor time: what a mutant's tests may take, and what is run again before a check
LIMIT_S = 60  # a mutant that takes so much longer than the original runs for ever

# The first example that fails is as good as the shortest one.
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None)


# ---- one mutant, one fork ------------------------------------------------------------------------------------------


def forked(work: Callable[[], Any], limit_s: float) -> Any:
    """What `work()` returns in a fork of this process, as JSON can say it; None if it died or took too long.

    Raises:
        RuntimeError: with what `work` has raised: a fault of this program, and no mutant that was caught.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime + limit_s) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            try:
                said = json.dumps({"returned": work()})
            except Exception as error:
                said = json.dumps({"raised": f"{type(error).__name__}: {error}"})
            os.write(write, said.encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = json.loads(pipe.read() or "{}")
    os.waitpid(child, 0)
    if "raised" in answer:
        raise RuntimeError(f"trying a mutant failed by itself: {answer['raised']}")
    return answer.get("returned")


# ---- tests ---------------------------------------------------------------------------------------------------------


class Watcher:
    """A plugin of pytest: which test enters which of the functions, and how long it takes."""

    def __init__(self, functions: dict[Any, str]) -> None:
        self.functions, self.seen = functions, dict[str, tuple[float, list[str]]]()
        self.first_failure: str | None = None

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        start = time.process_time()
        if not self.functions:
            yield
            return
        with rooms.Visits(frozenset(self.functions)) as visits:
            yield
        entered = sorted({self.functions[code] for code in visits.entered})
        self.seen[item.nodeid] = (round(time.process_time() - start, 3), entered)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.first_failure is None:
            self.first_failure = report.nodeid


def ask_pytest(watcher: Watcher, *arguments: str) -> Any:
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:randomly",
        "--hypothesis-profile=mutants",
        "--tb=no",
    ]
    return pytest.main([*options, *arguments], plugins=[watcher])


def test_files(room: str, checks: Iterable[ledger.Check]) -> list[str]:
    """The tests that belong to a room: those of its file's name, and those that the ledger names."""
    module = rooms.find_room(room).__module__
    last = module.rpartition(".")[2]
    own = [f"tests/test_{last}.py", f"tests/test_lab_{last}.py", f"tests/bench/test_{last}.py"]
    if ".layers." in module:
        own = ["tests/test_layers.py", "tests/test_convolutions.py"]
    named = [check.test.partition("::")[0] for check in checks if rooms.find_room(check.room).__module__ == module]
    return sorted({file for file in [*own, *named] if (ROOT / file).is_file()})


def code_of(named: Iterable[str]) -> dict[Any, str]:
    """The code objects of the functions of some rooms, and how records name the functions."""
    return {
        function.__code__: f"{module}:{name}"
        for room in named for (module, name), function in mutation.parts(room).items()
    }  # fmt: skip


def digest(*files: Path) -> str:
    contents = hashlib.sha256()
    for file in files:
        contents.update(file.read_bytes())
    return contents.hexdigest()[:12]


def watched_tests(files: list[str], functions: dict[Any, str]) -> dict[str, tuple[float, list[str]]]:
    """For every test its seconds and the functions it enters; kept in `out/` while tests and package stay the same."""
    kept = ROOT / "out" / "mutants"
    kept.mkdir(parents=True, exist_ok=True)
    package = sorted((ROOT / rooms.PACKAGE).rglob("*.py"))
    known = hashlib.sha256(" ".join(sorted(functions.values())).encode()).hexdigest()
    seen: dict[str, tuple[float, list[str]]] = {}
    for file in tqdm(files, desc="tests as they are", disable=None):
        place = kept / f"{Path(file).stem}-{digest(ROOT / file, *package)}-{known[:8]}.json"
        if not place.is_file():

            def work(file: str = file) -> Any:
                watcher = Watcher(functions)
                ask_pytest(watcher, file)
                return {"seen": watcher.seen, "failed": watcher.first_failure}

            said = forked(work, 3600)
            if said is None or said["failed"]:
                raise SystemExit(
                    f"{file} does not pass as it is ({said and said['failed']}): mutants would prove nothing"
                )
            place.write_text(json.dumps(said["seen"]), encoding="utf-8")
        seen |= json.loads(place.read_text(encoding="utf-8"))
    return seen


def tried_by_tests(mutant: Mutant, seen: dict[str, tuple[float, list[str]]], files: list[str]) -> tuple[str, str]:
    """The verdict, and which test it is by."""
    name = f"{mutant.module}:{mutant.function}"
    known = sorted((seconds, test) for test, (seconds, entered) in seen.items()
                   if name in entered and test.partition("::")[0] in files)  # fmt: skip
    chosen, spent = [], 0.0
    for seconds, test in known:
        if not chosen or spent + seconds < PATIENCE_S:
            chosen.append(test)
            spent += seconds
    if not chosen:
        return "survived", "no test enters it"

    def work() -> Any:
        mutation.put(mutant)
        watcher = Watcher({})
        return {"code": int(ask_pytest(watcher, *chosen)), "failed": watcher.first_failure}

    said = forked(work, 3 * spent + LIMIT_S)
    if said is None:
        return "caught", "it stops, or runs for ever"
    if said["code"] == 1:
        return "caught", said["failed"]
    if said["code"] != 0:
        return "caught", "tests cannot be collected"
    return "survived", f"{len(chosen)} tests"


# ---- checks of a chapter -------------------------------------------------------------------------------------------


class Rehearsal:
    """A chapter of which only that has run which its checks stand on."""

    def __init__(self, book: Book, chapter: Chapter) -> None:
        notebook = source.read(book, chapter)
        self.checks = ledger.checks(chapter, notebook)[0]
        cells = [(number, cell.source) for number, cell in source.code_cells(notebook)]
        self.pieces = slices.pieces(cells, whole={check.number for check in self.checks})
        self.cells = {piece.cell: piece for piece in self.pieces}  # of checks: those are one piece
        self.needed = {check.number: slices.needed(self.pieces, self.cells[check.number]) for check in self.checks}
        self.functions = code_of({check.room for check in self.checks})
        self.entered: dict[int, set[str]] = {}
        self.seconds: dict[int, float] = {}
        self.variables = slices.namespace()

    def set_up(self) -> None:
        wanted = {piece.place for pieces in self.needed.values() for piece in pieces}
        for piece in self.pieces:
            if piece.place in wanted:
                start = time.process_time()
                with rooms.Visits(frozenset(self.functions)) as visits, silence():
                    slices.run(piece, self.variables)
                self.entered[piece.place] = {self.functions[code] for code in visits.entered}
                self.seconds[piece.place] = time.process_time() - start
        for check in self.checks:
            error = forked(functools.partial(self._outcome, check, []), 3600)
            if error != "":
                raise SystemExit(f"{check.where}: does not pass as it is: {error}; mutants would prove nothing")

    def _outcome(self, check: ledger.Check, again: list[slices.Piece]) -> str:
        """What the check raises; it may leave what it likes behind, because this is a fork."""
        with silence():
            try:
                for piece in [*again, self.cells[check.number]]:
                    slices.run(piece, self.variables)
            except Exception as error:
                return type(error).__name__
        return ""

    def _again(self, check: ledger.Check, function: str) -> list[slices.Piece]:
        """What stands before the check and comes out otherwise with the mutant, if it is quick."""
        changed: set[str] = set()
        chosen = []
        for piece in self.needed[check.number]:
            if function in self.entered[piece.place] or changed & piece.reads:
                chosen.append(piece)
                changed |= piece.sets
        return chosen if sum(self.seconds[piece.place] for piece in chosen) < PATIENCE_S else []

    def tried(self, mutant: Mutant) -> tuple[str, str]:
        own = [check for check in self.checks if check.room == mutant.room]
        function = f"{mutant.module}:{mutant.function}"

        def work() -> Any:
            mutation.put(mutant)
            for check in own:
                error = self._outcome(check, self._again(check, function))
                if error:
                    return [check.verifies[0], error]
            return []

        said = forked(work, 2 * LIMIT_S)
        if said is None:
            return "caught", "it stops, or runs for ever"
        return ("caught", f"{said[0]}, {said[1]}") if said else ("survived", f"{len(own)} checks")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- all of them ---------------------------------------------------------------------------------------------------


def key(mutant: Mutant, where: str) -> tuple[str, ...]:
    return where, mutant.room, mutant.name, code(mutant.module, mutant.function)


@functools.cache
def code(module: str, function: str) -> str:
    """What tells whether a verdict is about the present code of a function."""
    return hashlib.sha256(mutation.text(module, function).encode()).hexdigest()[:12]


def known() -> dict[tuple[str, ...], dict[str, Any]]:
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.is_file() else []
    records = map(json.loads, lines)
    return {(r["where"], r["room"], r["mutant"], r["code"]): r for r in records}


def write(records: Iterable[dict[str, Any]], mode: str) -> None:
    with RECORDS.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def run(book: Book, most: int, seed: int, only: list[str], again: bool = False) -> None:
    checks = ledger.collect(book).checks
    sampled = {room: mutation.mutants(room, most, seed) for room in sorted({check.room for check in checks})}
    done = known()
    codes = {(room, name, code(module, name)) for room in sampled for module, name in mutation.parts(room)}
    asked = set(places(checks))
    current = [
        record for _, record in sorted(done.items())
        if (record["where"], record["room"]) in asked
        and (record["room"], record["mutant"].partition(":")[0], record["code"]) in codes
    ]  # fmt: skip
    write(current, "w")  # what was said of code that is no more, is no more

    def waiting(where: str) -> list[Mutant]:
        chapter = any(name[0].isdigit() and where.startswith(name) for name in only)
        named = [room for place, room in places(checks) if place == where and (chapter or not only or room in only)]
        old = {name for name, record in done.items() if not (again and record["verdict"] == "survived")}
        return [mutant for room in named for mutant in sampled[room] if key(mutant, where) not in old]

    def record(where: str, mutants: list[Mutant], tried: Callable[[Mutant], tuple[str, str]]) -> None:
        for mutant in tqdm(mutants, desc=where, disable=None):
            start = time.perf_counter()
            verdict, by = tried(mutant)
            _, room, name, present = key(mutant, where)
            write([{
                "where": where, "room": room, "mutant": name, "code": present, "line": mutant.line,
                "before": mutant.before[:200], "after": mutant.after[:200], "verdict": verdict, "by": by,
                "s": round(time.perf_counter() - start, 1),
            }], "a")  # fmt: skip

    if mutants := waiting(TESTS):
        functions = code_of(sampled)
        files = {room: test_files(room, checks) for room in {mutant.room for mutant in mutants}}
        everything = sorted({file for own in files.values() for file in own})
        with silence():
            pytest.main(
                ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *everything]
            )  # imports them
        seen = watched_tests(everything, functions)
        record(TESTS, mutants, lambda mutant: tried_by_tests(mutant, seen, files[mutant.room]))
    for chapter in book.chapters:
        if mutants := waiting(chapter.slug):

            def work(chapter: Chapter = chapter, mutants: list[Mutant] = mutants) -> str:
                rehearsal = Rehearsal(book, chapter)
                rehearsal.set_up()
                record(chapter.slug, mutants, rehearsal.tried)
                return "done"

            alone(work)
    write((record for _, record in sorted(known().items())), "w")


def alone(work: Callable[[], Any]) -> None:
    """`work()` in a fork whose memory is given back, and whose words are heard."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as error:
            print(error, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise SystemExit("stopped; what was found out so far is kept")


def places(checks: Iterable[ledger.Check]) -> list[tuple[str, str]]:
    """Who is asked about which room."""
    chapters = {(check.chapter.slug, check.room) for check in checks}
    return sorted({(TESTS, room) for _, room in chapters} | chapters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="rooms, or beginnings of chapters' slugs; all without one")
    parser.add_argument("--most", type=int, default=SAMPLE, help="mutants of a room")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--again", action="store_true", help="try once more what survived: there is a new test or check"
    )
    given = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # of the chapters; this program has its own
    run(manifest.load(), given.most, given.seed, given.only, given.again)


if __name__ == "__main__":
    main()

"""What became of the mutants (`make mutants`), for the ledger: which were caught, by tests and by checks."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).with_name("mutants.jsonl")
EQUIVALENT = Path(__file__).with_name("equivalent.toml")  # mutants that do what the original does, each with a reason
TESTS = "tests"  # in the place of a chapter's slug


@dataclass(frozen=True)
class Score:
    """Of one chapter's rooms, or of all: mutants that are not equivalent, and how many of them were caught by whom."""

    rooms: int
    mutants: int
    by_tests: int
    by_checks: int


def read(records: Path = RECORDS) -> list[dict[str, Any]]:
    """The committed verdicts; `equivalent` holds the reason, or None."""
    reasons = {}
    if EQUIVALENT.is_file():
        for entry in tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("equivalent", []):
            reasons[entry["mutant"], entry["before"], entry["after"]] = entry["reason"]
    lines = records.read_text(encoding="utf-8").splitlines() if records.is_file() else []
    found = list(map(json.loads, lines))
    return [r | {"equivalent": reasons.get((r["mutant"], r["before"], r["after"]))} for r in found]


def score(records: Iterable[dict[str, Any]], slug: str) -> Score:
    """Of the rooms that the checks of this chapter name; where several do, its own count."""
    records = [record for record in records if record["equivalent"] is None]
    asked = {(record["room"], record["mutant"]): record for record in records if record["where"] == slug}
    tested = {
        (record["room"], record["mutant"])
        for record in records
        if record["where"] == TESTS and record["verdict"] == "caught"
    }
    caught = [mutant for mutant, record in asked.items() if record["verdict"] == "caught"]
    return Score(len({room for room, _ in asked}), len(asked), len(tested & set(asked)), len(caught))


def section(slugs: Iterable[str]) -> str:
    """The section of the ledger's page; empty where nothing was tried."""
    records = read()
    scores = {slug: score(records, slug) for slug in slugs if any(record["where"] == slug for record in records)}
    if not scores:
        return ""
    rows = [["Chapter", "Rooms", "Mutants", "Caught by tests", "Caught by its checks"]]
    for slug, own in scores.items():
        shares = [f"{caught} ({caught / own.mutants:.0%})" for caught in (own.by_tests, own.by_checks)]
        rows.append([f"{{doc}}`{slug}`", str(own.rooms), str(own.mutants), *shares])
    table = [":::{list-table}", ":header-rows: 1", ":widths: 40 10 12 19 19", ""]
    for row in rows:
        table += [f"{'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    parts = [HEAD, "\n".join([*table, ":::"])]
    for title, chosen in (
        ("Mutants that no test caught", [r for r in records if r["where"] == TESTS and _escaped(r)]),
        ("Mutants that a chapter's checks let pass", [r for r in records if r["where"] in scores and _escaped(r)]),
        ("Mutants that do what the original does", [r for r in records if r["where"] == TESTS and r["equivalent"]]),
    ):
        lines = [
            f"* `{record['room']}`, `{record['mutant'].partition(':')[0]}`, line {record['line'] + 1}: "
            f"`{record['before']}` → `{record['after']}`{_remark(record)}"
            for record in chosen
        ]
        if lines:
            parts.append(f":::{{admonition}} {title}: {len(lines)}\n:class: dropdown\n\n" + "\n".join(lines) + "\n:::")
    return "\n\n".join(parts)


def _escaped(record: dict[str, Any]) -> bool:
    return record["verdict"] == "survived" and record["equivalent"] is None


def _remark(record: dict[str, Any]) -> str:
    if record["equivalent"]:
        return f". {record['equivalent']}"
    return "" if record["where"] == TESTS else f" ({record['where'].partition('-')[0]})"


HEAD = """## Who notices a mistake?

`make mutants` draws at most twelve small mistakes for every room, a sign, an operator, a transpose, a number, a
statement that is left out, and puts them into the running code one at a time. The tests that belong to the room try to
catch each, and so do the checks that name it. A mistake in a helper that a room calls counts as the room's; what is
checked at its door does not count."""

"""The notation page: one letter, one meaning, but for those of which it says otherwise; a plain H is an inverse."""

import re

from tools.manifest import ROOT

PAGE = (ROOT / "chapters" / "notation.md").read_text(encoding="utf-8")
ROWS = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|") and "---" not in line][1:]
FORMULA = re.compile(r"\$([^$]+)\$")


def meanings():
    """Every symbol of the first column, with what it means; and letters that a meaning gives another meaning."""
    found = {}
    for symbol, meaning, *_ in ROWS:
        for formula in FORMULA.findall(symbol):
            found.setdefault(formula, []).append(meaning.strip())
        for letter in re.findall(r"in this context \$(\w)\$ is", meaning):
            found.setdefault(letter, []).append(meaning.strip())
    return found


def test_a_letter_with_two_meanings_is_named_as_such():
    [said] = re.findall(r"(\w+) letters of the table\s+keep two meanings, and the table gives both: ([^.]*)\.", PAGE)
    doubled = {letter for letter, known in meanings().items() if len(known) > 1}
    assert set(FORMULA.findall(said[1])) == doubled
    assert said[0] == ["No", "One", "Two", "Three"][len(doubled)]


def test_a_plain_h_is_an_inverse_and_nothing_else():
    inverses = {symbol: known for symbol, known in meanings().items() if re.match(r"H(_|$)", symbol)}
    assert {"H", "H_a", "H_g"} == inverses.keys()
    for symbol, (known,) in inverses.items():
        assert "inverse" in known or "^{-1}" in known, symbol
    assert all("Hessian" in known for symbol, (known, *_) in meanings().items() if symbol == r"\mathcal{H}")


def test_every_name_in_the_code_exists():
    """The last column: names stand in the package."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "kfqn_core").rglob("*.py")))
    for *_, names in (row for row in ROWS if "**" not in row[0]):
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", code), name

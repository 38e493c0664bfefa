"""The page of hyper-parameters is the code's: defaults, ranges, constants, presets, settings of peers, quotations."""

import ast
import importlib
import inspect
import re
from dataclasses import asdict, fields

import pytest
from torch import nn

from kfqn_core import KFQN, presets
from kfqn_core.training.options import LINEAR_OPTIONS, Options
from tools.manifest import ROOT

PAGE = (ROOT / "chapters" / "hyper-parameters.md").read_text(encoding="utf-8")
NOTES = (ROOT / "benchmarks" / "NOTES.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", NOTES, flags=re.MULTILINE)[1:]}
CODE = re.compile(r"(?<!\})`([^`]*)`")  # and no reference
SIGNATURE = {
    name: parameter.default
    for name, parameter in inspect.signature(KFQN).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
OF_GROUPS = {**SIGNATURE, "curvature": True}
NO_NUMBERS = {"params", "process_group"}
OF_METHOD = {**asdict(Options()), "linear": None}


def rows(heading):
    """The rows of the first table below a heading, each a list of fields."""
    lines = iter(PAGE[PAGE.index(f"## {heading}\n") :].splitlines())
    lines = [line for line in lines if line.startswith("|") or line.startswith("## ")]
    table = []
    for line in lines[3:]:
        if not line.startswith("|"):
            break
        table.append([field.strip() for field in line.strip("|").split("|")])
    return table


def code(field):
    """What stands in backticks in a field that holds nothing else."""
    [text] = CODE.findall(field)
    assert field == f"`{text}`"
    return text


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("heading", "defaults"), [("Options of a parameter group", OF_GROUPS), ("Options of the method", OF_METHOD)]
)
def test_every_option_has_its_default(heading, defaults):
    found = {code(row[0]): code(row[1]) for row in rows(heading)}
    assert found == {name: repr(value) for name, value in defaults.items() if name not in NO_NUMBERS}


OPTION_ROWS = [*rows("Options of a parameter group"), *rows("Options of the method")]


@pytest.mark.parametrize("row", [row for row in OPTION_ROWS if row[2]], ids=lambda row: row[0].strip("`"))
def test_a_range_is_what_the_code_demands(row):
    """The message for a value that no option takes names the range."""
    name, wrong = code(row[0]), object()
    options = {"pairs": "second_pass"} if name in ("memory", "safeguard") else {}
    if name == "curvature":
        options = {"params": [{"params": model().parameters(), name: wrong}]}
    else:
        options[name] = wrong
    expected = row[2].replace("`", "")
    with pytest.raises(ValueError, match=re.escape(f"{name} must be {expected}, got {wrong!r}")):
        KFQN(model(), **options)


def test_options_that_want_another():
    for wrong in ({"memory": 3}, {"safeguard": True}, {"safeguard": True, "pairs": "next_batch"},
                  {"pairs": "next_batch", "damping": 1.0}):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            Options(**wrong)
    Options(pairs="next_batch", pair_damping="levenberg-marquardt", damping=1.0)
    assert {"activation_decay", "pair_damping"} == LINEAR_OPTIONS


def test_constants_have_their_values():
    for name, value, *_ in rows("Numbers that are no options"):
        module, _, constant = code(name).partition(".")
        floor = "estimate" if module in ("activation", "inverses") else "training"
        found = getattr(importlib.import_module(f"kfqn_core.{floor}.{module}"), constant)
        assert repr(found) == code(value), name


def test_the_presets_side_by_side():
    table = rows("The presets")
    names = CODE.findall(PAGE[PAGE.index("| option | default | `KBFGS") :].partition("\n")[0])
    public = {name: value for name, value in vars(presets).items() if isinstance(value, dict) and name.isupper()}
    assert names == list(public)
    defaults = {**OF_METHOD, **SIGNATURE}
    for option, default, *values in table:
        assert code(default) == repr(defaults[code(option)])
        assert [code(value) for value in values] == [repr(preset[code(option)]) for preset in public.values()], option
    for preset in public.values():
        assert preset.keys() == {code(row[0]) for row in table}


def section(title):
    """The text of the section of NOTES whose title begins so."""
    [found] = [text for name, text in SECTIONS.items() if name.startswith(title)]
    return found


def test_every_quoted_section_of_notes_exists():
    for titles in re.findall(r"NOTES, ((?:\*[^*]+\*(?:, )?)+)", PAGE):
        for title in re.findall(r"\*([^*]+)\*", titles):
            assert section(title)


@pytest.mark.parametrize("row", rows("What was measured when one is changed"), ids=lambda row: f"{row[0]} {row[1]}")
def test_what_was_measured_stands_in_notes(row):
    name, changed, happened, where = row
    known = {**OF_METHOD, **OF_GROUPS} | {f"{code(r[0])}": None for r in rows("Numbers that are no options")}
    assert code(name) in known
    [title] = re.findall(r"\*([^*]+)\*", where)
    text = section(title)
    numbers = re.findall(r"\d*\.\d+|\b\d{2,}\b", re.sub(r"\bP\d+\b|10\^5", "", happened))
    assert numbers
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d]|\.\d)", text), (number, title)
    if code(name) in {field.name for field in fields(Options)}:
        Options(**{"pairs": "second_pass"} | {code(name): ast.literal_eval(CODE.findall(changed)[0])})


def settings_of(method):
    """Every setting of a method of the benchmarks: what is given, and the constructor's defaults."""
    from benchmarks import methods

    made = methods.METHODS[method].constructor
    if made is KFQN:
        return {**OF_METHOD, **SIGNATURE, **methods.METHODS[method].settings}
    peers = {"muon": methods.torch.optim.Muon, "soap": methods.SOAP, "shampoo": methods.ScalableShampoo}
    peers |= {"psgd": methods.Kron, "adam": methods.torch.optim.Adam, "sgd": methods.torch.optim.SGD}
    parameters = inspect.signature(peers.get(method, made)).parameters
    return {**{name: p.default for name, p in parameters.items()}, **methods.METHODS[method].settings}


def shown(value):
    return getattr(value, "name", None) or repr(value)


def test_settings_of_the_published_methods_are_those_of_the_benchmarks():
    pytest.importorskip("pytorch_optimizer", reason="the comparison's peers are not installed here")
    from benchmarks.methods import METHODS

    seen = set()
    for row in rows("The published methods and their settings"):
        if not row[0]:
            continue
        [method] = CODE.findall(row[0])
        settings = {**settings_of(method), "lr": METHODS[method].lr}
        for text in CODE.findall(row[3]):
            name, _, value = text.partition("=")
            tuned = METHODS[method].tuned
            found = f"{{{', '.join(map(repr, tuned[name]))}}}" if name in tuned else shown(settings[name])
            assert found == value, (method, name)
        seen.add(method)
        given = set(METHODS[method].settings) | set(METHODS[method].tuned)
        named = {text.partition("=")[0] for text in CODE.findall(row[3])}
        of_presets = set(presets.KBFGS_2020)  # which have a table of their own
        assert given - named - of_presets - {"fused", "activation_factor", "step_length"} == set(), method
    labels = {method.label.partition(",")[0] for method in METHODS.values()} - {"KFQN"}
    assert {METHODS[method].label for method in seen} == labels

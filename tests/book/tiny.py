"""A book of one or two small chapters, to break in every way the real one must not be broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.manifest import ROOT

BOOK = """[book]
title = "A tiny book"
authors = ["Somebody"]
description = "For tests"
language = "en"
src = "chapters"

[defaults]
timeout_s = 120
grading_s = 30
budget_s = 30
device = "cpu"
kernel = "python3"
"""

HEADER = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""

CLAIM = """
:::{prf:theorem} Sums
:label: thm-sum
$2 + 2 = 4$
:::

```{code-cell} ipython3
import torch
from kfqn_core.maths.algebra import kron_matvec

def number(x):
    return torch.tensor([[float(x)]])
```

```{code-cell} ipython3
---
verifies: thm-sum
room: maths.algebra.kron_matvec
test: tests/test_algebra.py::test_sum
broken_by: "kron_matvec = lambda A, G, V: A - V"
---
error = abs(kron_matvec(number(2), number(1), number(2)).item() - 4)
print(f"error {error}")
assert error < 1e-12  # whole numbers
```
"""

EXERCISE = """
:::{exercise-start} Twice
:label: ex-twice
:::
Double a number.
:::{exercise-end}
:::

:::{solution-start} ex-twice
:class: dropdown
:::
An explanation for those who opened it.

```{code-cell} ipython3
:level: 1
:minutes: 5
:nbgrader: {grade: false, grade_id: ex-twice, locked: false, schema_version: 3, solution: true, task: false}

def twice(x):
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION
```

:::{solution-end}
:::

```{code-cell} ipython3
:tags: [hide-input]
:nbgrader: {grade: true, grade_id: ex-twice-check, locked: true, points: 2, schema_version: 3, solution: false}

assert twice(3) == 6, "twice(3) should be 6"
print("ex-twice: correct")
```
"""

RUBRIC = """An explanation for those who opened it.

:::{admonition} The written answer: why it is twice
:class: rubric

* 1: adds the number to itself
* 2: says that this is what twice
  means
:::"""


def code(text: str) -> str:
    return f"\n```{{code-cell}} ipython3\n{text}\n```\n"


FIGURE = """
```{code-cell} ipython3
---
mystnb:
  figure:
    name: fig-line
    caption: A line.
  image:
    alt: A line from left to right.
---
import matplotlib.pyplot as plt
fig, ax = plt.subplots()
ax.plot([0, 1])
plt.show()
```
"""


def entry(slug: str, title: str, tier: str = "core", **more: object) -> str:
    lines = [f"{key} = {value if isinstance(value, int) else repr(value)}" for key, value in more.items()]
    return "\n".join(["[[part.chapter]]", f'slug = "{slug}"', f'title = "{title}"', f'tier = "{tier}"', *lines, "", ""])


def write(root: Path, *chapters: tuple[str, str, str], **more: dict[str, object]) -> Path:
    """A book of `(slug, title, text)` below `root`; `more` holds further keys by slug, `-` written as `_`."""
    (root / "chapters").mkdir(parents=True, exist_ok=True)
    listing = '\n[[part]]\ntitle = "Part one"\n\n'
    for slug, title, text in chapters:
        listing += entry(slug, title, **more.get("c" + slug.replace("-", "_"), {}))
        (root / "chapters" / f"{slug}.md").write_text(f"{HEADER}\n# {title}\n{text}", encoding="utf-8")
    (root / "book.toml").write_text(BOOK + listing, encoding="utf-8")
    (root / "constraints.txt").touch()
    (root / "tests").mkdir(exist_ok=True)
    (root / "tests" / "test_algebra.py").write_text("def test_sum():\n    assert 2 + 2 == 4\n", encoding="utf-8")
    return root


def install_tools(root: Path) -> Path:
    """Give a tiny book the real machinery and a package of its own, so that it stands alone."""
    for folder in ("tools", "site"):
        # The pages about the optimizer need the README and the whole package.
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "pages"))
    shutil.copy(ROOT / "conftest.py", root)
    (root / "pytest.ini").write_text("[pytest]\npythonpath = .\n", encoding="utf-8")
    source = 'def kron_matvec(A, G, V):\n    """The room."""\n    return G @ V @ A.mT\n'
    for name, text in (("__init__", ""), ("maths/__init__", ""), ("maths/algebra", source)):
        file = root / "kfqn_core" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return root


def run(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` in the tiny book, on a machine without a GPU, with further environment `variables`."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"} | variables
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )

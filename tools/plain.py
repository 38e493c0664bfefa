"""MyST into Markdown that every notebook program shows, with the numbers of the site written out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from tools.numbers import Numbers

FENCE = re.compile(r"^(?P<fence>:{3,})(?:\{(?P<name>[\w:-]+)\}[ \t]*(?P<title>.*))?$")
OPTION = re.compile(r"^:[\w-]+:")
CODE = re.compile(r"^(`{3,}|~{3,})")
EQUATION = re.compile(r"\$\$[ \t]*\(([\w-]+)\)")
ROLE = re.compile(r"(?<!`)\{([\w:]+)\}`([^`]+)`")
TARGET = re.compile(r"^(?P<text>.*?)\s*<(?P<target>[^>]+)>$", re.DOTALL)


@dataclass
class Plain:
    """A renderer that remembers what was cited."""

    numbers: Numbers
    cited: set[str] = field(default_factory=set)

    def text(self, myst: str) -> str:
        """Markdown for a piece of prose."""
        lines: list[str] = []
        open_boxes: list[tuple[str, str]] = []
        in_options, code = False, ""
        for line in myst.splitlines():
            if fence := CODE.match(line):
                code = "" if code and line.startswith(code) else code or fence[1]
            box = None if code else FENCE.match(line)
            if box and box["name"]:
                open_boxes.append((box["fence"], box["name"]))
                lines.append(f"{box['name']}\0{box['title'].strip()}")  # a heading, once its label is known
                in_options = True
            elif box and open_boxes and box["fence"] == open_boxes[-1][0]:
                if open_boxes.pop()[1] == "prf:proof":
                    lines += ["", "∎"]
                lines.append("")
            elif in_options and OPTION.match(line):
                if line.startswith(":label:"):
                    lines[-1] += f"\0{line.removeprefix(':label:').strip()}"
            else:
                in_options = False
                lines.append(line)
        rendered = "\n".join(self._heading(line) if "\0" in line else line for line in lines)
        rendered = EQUATION.sub(lambda match: rf"\tag{{{self._name(match[1])[1:-1]}}} $$", rendered)
        return re.sub(r"\n{3,}", "\n\n", ROLE.sub(self._role, rendered)).strip()

    def notebook(self, notebook: NotebookNode) -> list[NotebookNode]:
        """The cells of a chapter, each figure followed by its number and caption."""
        cells = []
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = self.text(cell.source)
            cells.append(cell)
            metadata = cell.metadata
            cell.metadata = NotebookNode({"jupyter": {"source_hidden": True}} if _is_hidden(cell) else {})
            if "figure" in metadata.get("mystnb", {}):
                figure = metadata.mystnb.figure
                caption = f"*{self._name(figure.name)}.* {figure.get('caption', '')}"
                cells.append(new_markdown_cell(self.text(caption.strip()), id=f"{cell.id}-caption"))
        return cells

    def bibliography(self) -> str:
        """What was cited so far, as a list."""
        return "\n".join(
            f"* {self.numbers.citation(key, in_text=True)}: *{self.numbers.title_of_reference(key)}*"
            for key in sorted(self.cited, key=self.numbers.citation)
        )

    def _name(self, label: str) -> str:
        return self.numbers.labels.get(label, label)

    def _heading(self, line: str) -> str:
        name, title, *label = line.split("\0")
        if name == "prf:proof":
            return "*Proof.*"
        kind = self._name(label[0]) if label else name.removeprefix("prf:").capitalize()
        return f"**{kind} ({title}).**\n" if title else f"**{kind}.**\n"

    def _role(self, match: re.Match[str]) -> str:
        role, content = match[1], match[2]
        if role.startswith("cite"):
            keys = [key.strip() for key in content.split(",")]
            self.cited.update(keys)
            if role == "cite:t":
                return " and ".join(self.numbers.citation(key, in_text=True) for key in keys)
            return f"({'; '.join(self.numbers.citation(key) for key in keys)})"
        explicit = TARGET.match(content)
        if explicit:
            return explicit["text"]
        return self.numbers.chapter(content) if role == "doc" else self._name(content)


def _is_hidden(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and "hide-input" in cell.metadata.get("tags", [])

"""JupyterLab shows what the site closes closed, and saving a chapter changes nothing but what was changed."""

import shutil

import pytest
from traitlets.config import PyFileConfigLoader

from tests.book import tiny
from tools import lab, manifest
from tools.manifest import ROOT

BOOK = manifest.read()


@pytest.fixture
def contents(tmp_path):
    for chapter in BOOK.chapters:
        shutil.copy(chapter.path, tmp_path)
    shutil.copy(BOOK.src / "jupytext.toml", tmp_path)
    return lab.Chapters(root_dir=str(tmp_path))


@pytest.mark.parametrize("chapter", BOOK.chapters, ids=lambda chapter: chapter.slug)
def test_saving_changes_nothing(contents, tmp_path, chapter):
    name = chapter.path.name
    model = contents.get(name, type="notebook")
    content = model["content"]
    content["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"  # as JupyterLab does
    content["metadata"]["language_info"] = {"name": "python", "version": "3.12.1"}
    contents.save({"type": "notebook", "format": "json", "content": content}, name)
    assert (tmp_path / name).read_text() == chapter.path.read_text()


def test_what_the_site_closes_is_closed(contents, tmp_path):
    (tmp_path / "01-one.md").write_text(f"{tiny.HEADER}\n# One\n{tiny.CLAIM}{tiny.EXERCISE}", encoding="utf-8")
    cells = contents.get("01-one.md", type="notebook")["content"]["cells"]
    assert cells[0]["source"] == lab.LINE
    shown = [cell["metadata"].get("jupyter") for cell in cells if cell["cell_type"] == "code"]
    assert shown == [None, None, {"source_hidden": True}, {"source_hidden": True}]  # the solution, the grader


def test_jupyter_reads_the_settings():
    settings = PyFileConfigLoader("lab.py", path=str(ROOT / "tools")).load_config()
    assert settings.ServerApp.contents_manager_class.__name__ == "Chapters"

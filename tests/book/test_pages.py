"""Generated pages and the README: tables, the reference, links that stay true."""

import inspect
import re
import shlex
import subprocess
import sys

import pytest

from tdlib import chapters, pages
from tdlib.chapters import ROOT

INTRO = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_markdown_table_keeps_order_and_escapes():
    table = pages.markdown_table([{"a": 1.23456, "b": "x|y"}, {"b": None, "c": float("nan")}])
    assert table.splitlines() == ["| a | b | c |", "|---|---|---|", "| 1.235 | x\\|y | – |", "| – | – | – |"]


def test_the_readme_table_is_up_to_date():
    assert pages.update_readme(check=True), "run: python -m tdlib.chapters readme"


def test_the_readme_first_screen_has_the_two_commands_and_a_picture():
    first = README[: README.index("## ")]
    assert "make book" in first and "make test" in first and "book/images/front.png" in first
    assert pages.BEGIN in first
    for path in re.findall(r'(?:src="|\]\()([^)":]+\.(?:png|svg|md))', README):
        assert (ROOT / path).is_file(), path


def test_make_knows_every_target_and_setting_that_the_texts_name():
    for command in re.findall(r"`(make [^`]+)`", README) + [
        line
        for block in blocks(INTRO, "bash") + blocks(README, "sh")
        for line in block.splitlines()
        if line.startswith("make ")
    ]:
        words = shlex.split(command.split("#")[0])
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for setting in (word for word in words if "=" in word):
            assert f"$({setting.split('=')[0]})" in (ROOT / "Makefile").read_text()


def test_every_page_of_the_reference_imports_and_lists_functions():
    text = pages.reference()
    assert "tdlib.planning" in text and ".. autofunction::" in text
    assert all(name.startswith("tdlib.") for name in pages.modules())


@pytest.mark.parametrize("name", pages.modules())
def test_docstrings_are_clean_restructured_text(name):
    """The book is built with warnings as errors; this names the docstring that would break it."""
    import importlib

    from docutils.core import publish_doctree
    from docutils.utils import Reporter
    from sphinx.ext.napoleon import Config
    from sphinx.ext.napoleon.docstring import GoogleDocstring

    def check(where, thing):
        text = inspect.getdoc(thing) or ""
        source = str(GoogleDocstring(text, Config(napoleon_google_docstring=True), what="function"))
        source = re.sub(r":(?:py:)?(?:func|class|mod|obj|meth|data|exc|attr|math|ref):`", "`", source)
        tree = publish_doctree(
            source,
            settings_overrides={
                "report_level": Reporter.SEVERE_LEVEL + 1,
                "halt_level": 5,
                "warning_stream": None,
            },
        )
        found = [
            n.astext()
            for n in tree.findall()
            if n.tagname == "system_message"
            and n["level"] >= 2
            and "Unknown interpreted text role" not in n.astext()
            and "No role entry" not in n.astext()
        ]
        assert found == [], f"{where}: {found}"

    module = importlib.import_module(name)
    check(name, module)
    for member in pages._defined(module):
        thing = getattr(module, member)
        check(f"{name}.{member}", thing)
        if inspect.isclass(thing):
            for key, method in vars(thing).items():
                if not key.startswith("_") and (inspect.isfunction(method) or isinstance(method, property)):
                    check(f"{name}.{member}.{key}", method)


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A folder with ``photos/`` (images in class folders) and ``scans.npz``, as the front page speaks of."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("cats", "dogs")):
            target = folder / "photos" / split / name
            target.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (16, 16, 3)) + 100 * label
                Image.fromarray(pixels.astype("uint8")).save(target / f"{i}.png")
    arrays = {
        f"{split}_{kind}": (
            rng.integers(0, 255, (n, 12, 12)).astype("uint8") if kind == "images" else np.arange(n) % 3
        )
        for split, n in (("train", 36), ("test", 9))
        for kind in ("images", "labels")
    }
    np.savez(folder / "scans.npz", **arrays)
    return folder


COMMANDS = [
    line for block in blocks(INTRO, "bash") for line in block.splitlines() if line.startswith("tdlib ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_front_page_commands_run(command, own_data):
    words = shlex.split(command.replace("device cuda", "device cpu"))  # the same command without a GPU
    code = f"import sys; from tdlib.cli import app; sys.argv = {words!r}; app()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=own_data, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if "--out" in words:
        assert (own_data / words[words.index("--out") + 1]).is_file()


@pytest.mark.parametrize("text", [*blocks(INTRO, "python"), *blocks(README, "python")])
def test_the_python_examples_run(text, own_data):
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=own_data, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_chapters_list_matches_the_notebooks(capsys):
    assert chapters.main(["list"]) == 0
    assert capsys.readouterr().out.split() == chapters.names()

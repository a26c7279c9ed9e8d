"""Generated pages and the README: tables, the reference, links that stay true."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys

import pytest

import tdlib
from tdbook import pages, reference, tables
from tdbook.figures import benchmarks
from tdbook.paths import ROOT
from tdbook.records import record

INTRO = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_markdown_table_keeps_order_and_escapes():
    table = tables.markdown([{"a": 1.23456, "b": "x|y", "n": 12345}, {"b": None, "c": float("nan")}])
    head, rule, *rows = table.splitlines()
    assert head == "| a | b | n | c |" and rule == "|---|---|---|---|" and tables.markdown([]) == ""
    assert rows == ["| 1.235 | x\\|y | 12345 | – |", "| – | – | – | – |"]


def test_older_records_are_shown_apart_and_say_what_they_lack(tmp_path, monkeypatch):
    for folder, name in ((tmp_path, "RESULTS"), (tmp_path / "old", "OLD_RESULTS")):
        about = {"dataset": f"of {name}", "method": "admm"}
        record("admm_tt", about, {"test_accuracy": 90.0}, directory=folder, device="cpu")
        monkeypatch.setattr(pages, name, folder)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    new, old = pages.records().split("## Older records")
    assert "of RESULTS" in new and "of OLD_RESULTS" not in new
    assert "of OLD_RESULTS" in old and "of RESULTS" not in old and "feed no verdict" in old
    chapter = pages.claims_of("admm-tt")
    assert "of OLD_RESULTS" in chapter[chapter.index("Older records") :] and "of RESULTS" not in chapter
    assert "Older records" not in pages.claims_of("rstd")


def test_the_readme_table_is_up_to_date():
    assert pages.update_readme(check=True), "run: python -m tdbook readme"


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


def test_the_reference_lists_every_public_name_and_module():
    text = reference.overview()
    for name in tdlib.__all__:
        thing = getattr(tdlib, name)
        place = f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else None
        assert f"~{place}\n" in text if place else thing.__name__ in reference.modules()
    for name in reference.modules():
        module = importlib.import_module(name)
        assert f"automodule:: {name}\n" in reference.page(name) and inspect.getdoc(module)
        for key, thing in vars(module).items():
            public = not key.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing))
            if public and thing.__module__ == name:
                assert inspect.getdoc(thing), f"{name}.{key} has no docstring"


@pytest.mark.parametrize(
    ("docstring", "rst"),
    [
        ("One line with *args and x_.", r"One line with \*args and x\_."),
        ("Code ``a*b`` and `c_`.", "Code ``a*b`` and ``c_``."),
        ("Head.\n\nseed: which\n  part", "Head.\n\n| seed: which\n|   part"),
        ("Head.\n\n    a  b\n    c  d\n\nTail.", "Head.\n\n::\n\n       a  b\n       c  d\n\nTail."),
        ("f(x) does\n    more\ng(x) too", "| f(x) does\n|     more\n| g(x) too"),
        ("Lead:\n- one\n- two_", "| Lead:\n| - one\n| - two\\_"),
        ("", ""),
    ],
)
def test_docstrings_become_restructured_text(docstring, rst):
    assert "\n".join(reference.to_rst(docstring.split("\n"))).strip() == rst


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
    (folder / "notebooks").symlink_to(ROOT / "notebooks")
    return folder


COMMANDS = [
    line for block in blocks(INTRO, "bash") for line in block.splitlines() if line.startswith("papermill ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_front_page_commands_run(command, own_data):
    words = shlex.split(command.replace("device cuda", "device cpu"))  # the same command without a GPU
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=own_data, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if "--help-notebook" not in words:
        assert (own_data / words[2]).is_file()


@pytest.mark.parametrize("text", [*blocks(INTRO, "python"), *blocks(README, "python")])
def test_the_python_examples_run(text, own_data):
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=own_data, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_benchmark_picture_is_the_same_for_the_same_rows_and_shows_each():
    rows = [
        {"topic": "speed", "name": f"case {n}", "b": "peer", "ratio": 2.0 + n, "quartiles": [1.5, 4.0],
         "target": 3.0, "met": n > 0}
        for n in range(2)
    ]  # fmt: skip
    one, two = benchmarks.svg(rows), benchmarks.svg(rows)
    assert one == two and "case 0 | peer" in one and "case 1 | peer" in one
    assert benchmarks.svg([rows[0] | {"ratio": None}]).startswith("<svg")

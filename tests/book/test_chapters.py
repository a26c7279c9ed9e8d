"""Running notebooks: what is cleaned, what is kept on failure, what is refused."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tdbook import chapters
from tdbook.__main__ import main
from tdbook.paths import ROOT
from tdlib.errors import TdlibError, UnknownName


def write(path, *cells):
    nb = new_notebook(cells=[new_markdown_cell("# T"), *(new_code_cell(c) for c in cells)])
    nb.cells[1].metadata["tags"] = ["parameters"]
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, str(path))
    return path


def test_two_equal_runs_give_identical_files(tmp_path):
    source = write(
        tmp_path / "a.ipynb", "n = 2", "import time\nfor i in range(n):\n    print(i)\n    time.sleep(.1)\nn"
    )
    first = chapters.execute(source, tmp_path / "one.ipynb", {"n": 3}, failed=tmp_path / "failed")
    second = chapters.execute(source, tmp_path / "two.ipynb", {"n": 3}, failed=tmp_path / "failed")
    assert first.read_bytes() == second.read_bytes()
    nb = nbformat.read(str(first), as_version=4)
    assert nb.cells[-1].outputs[0].text == "0\n1\n2\n"
    assert nb.cells[-1].outputs[1].data["text/plain"] == "3"
    assert "papermill" not in first.read_text()


def test_a_failing_chapter_names_itself_and_keeps_its_partial_notebook(tmp_path, capsys):
    source = write(tmp_path / "broken.ipynb", "n = 1", "print('reached')", "raise RuntimeError('no luck')")
    status = main(
        ["run", str(source), "--output", str(tmp_path / "out.ipynb"), "--failed", str(tmp_path / "failed")]
    )
    assert status == 1
    message = capsys.readouterr().err
    kept = tmp_path / "failed" / "broken.ipynb"
    assert "chapter broken failed" in message and "no luck" in message and str(kept) in message
    assert "reached" in kept.read_text()
    assert not (tmp_path / "out.ipynb").exists()
    assert chapters.failures(tmp_path / "failed") == [kept]


def test_a_successful_run_removes_the_trace_of_an_earlier_failure(tmp_path):
    source = write(tmp_path / "a.ipynb", "n = 1")
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "a.ipynb").write_text("{}")
    chapters.execute(source, tmp_path / "out.ipynb", failed=tmp_path / "failed")
    assert chapters.failures(tmp_path / "failed") == []


def test_unknown_chapters_and_parameters_are_refused_before_running(tmp_path):
    source = write(tmp_path / "a.ipynb", "seed = 1")
    with pytest.raises(UnknownName, match="seed"):
        chapters.execute(source, tmp_path / "out.ipynb", {"sed": 3})
    with pytest.raises(UnknownName, match="primer"):
        chapters.notebook("prime")


def test_sources_are_what_a_notebook_imports_directly_or_not(tmp_path):
    package = tmp_path / "tdbook"
    (package / "figures").mkdir(parents=True)
    texts = {
        "__init__.py": "", "__init__.pyi": "from .records import record as record", "records.py": "",
        "style.py": "", "pages.py": "from tdbook import style", "figures/__init__.py": "",
        "figures/common.py": "def f():\n    from tdbook import style", "figures/other.py": "",
        "figures/own.py": "import numpy\nfrom tdbook.figures.common import lines",
    }  # fmt: skip
    for name, text in texts.items():
        (package / name).write_text(text)
    cells = ("n = 1", "if n:\n    %pip install x\nfrom tdbook.figures import own as figures")
    found = chapters.sources(write(tmp_path / "a.ipynb", *cells), package)
    left = {"pages.py", "figures/other.py"}
    assert found == sorted(str(package / name) for name in set(texts) - left)


def test_clean_joins_streams_and_resolves_carriage_returns():
    cell = new_code_cell(
        "x",
        outputs=[
            new_output("stream", name="stdout", text="10 %\r20 %\r"),
            new_output("stream", name="stdout", text="30 %\ndone\n"),
            new_output("stream", name="stderr", text="w\n"),
        ],
    )
    nb = chapters.clean(new_notebook(cells=[cell]))
    assert [(o.name, o.text) for o in nb.cells[0].outputs] == [("stdout", "30 %\ndone\n"), ("stderr", "w\n")]


def test_strip_is_stable(tmp_path):
    source = write(tmp_path / "a.ipynb", "n = 1", "n + 1")
    done = chapters.execute(source, tmp_path / "done.ipynb", {}, failed=tmp_path)
    assert chapters.strip([done]) == [done]
    assert chapters.strip([done]) == []
    assert all(not c.get("outputs") for c in nbformat.read(str(done), as_version=4).cells)


def test_values_from_the_command_line():
    given = ["3", "2.5", "true", "null", "[1, 2]", "digits", "imagefolder:a/b"]
    assert [chapters.value(text) for text in given] == [
        3,
        2.5,
        True,
        None,
        [1, 2],
        "digits",
        "imagefolder:a/b",
    ]


def test_collect_joins_the_cells_records(tmp_path):
    for seed in (0, 1):
        cell = tmp_path / f"seed-{seed}"
        cell.mkdir()
        record = {"chapter": "c", "seed": seed, "parameters": {"ratio": 2, "list": [1]}}
        (cell / "r.json").write_text(json.dumps(record | {"metrics": {"accuracy": 90.0 + seed}}))
    table = chapters.collect([tmp_path / "seed-0.ipynb", tmp_path / "seed-1.ipynb"], tmp_path / "t.csv")
    assert table.read_text().splitlines() == [
        "cell,chapter,seed,ratio,accuracy",
        "seed-0,c,0,2,90.0",
        "seed-1,c,1,2,91.0",
    ]
    with pytest.raises(TdlibError, match="wrote no record"):
        chapters.collect([tmp_path / "seed-2.ipynb"], tmp_path / "t.csv")


def test_only_the_first_process_of_a_launch_writes(tmp_path, monkeypatch):
    source = write(tmp_path / "a.ipynb", "import os\nrank = os.environ['RANK']")
    monkeypatch.setenv("RANK", "1")
    chapters.execute(source, tmp_path / "out.ipynb", {}, failed=tmp_path / "failed")
    assert not (tmp_path / "out.ipynb").exists()
    assert os.environ["RANK"] == "1"


def test_kernels_side_by_side_do_not_meet(tmp_path):
    source = write(tmp_path / "a.ipynb", "n = 0", "import time\ntime.sleep(2)\nprint(n)")
    command = [sys.executable, "-m", "tdbook", "run", str(source), "--failed", str(tmp_path)]
    each = [["--output", str(tmp_path / f"{n}.ipynb"), "-p", f"n={n}"] for n in (1, 2)]
    running = [subprocess.Popen([*command, *own], cwd=ROOT) for own in each]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    for n in (1, 2):
        nb = nbformat.read(str(tmp_path / f"{n}.ipynb"), as_version=4)
        assert nb.cells[-1].outputs[0].text == f"{n}\n"

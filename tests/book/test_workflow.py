"""The Snakefile, its profiles, the Makefile and the continuous checks."""

import os
import subprocess
import sys

import pytest
import yaml

from tdbook import chapters
from tdbook.paths import ROOT


def snakemake(*arguments, folder=ROOT):
    command = [sys.executable, "-m", "snakemake", "--nolock", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_workflow_stays_readable():
    assert len((ROOT / "Snakefile").read_text().splitlines()) <= 100


def test_a_dry_run_builds_every_chapter_and_the_book():
    done = snakemake("-n", "--forceall", "--cores", "2")
    assert done.returncode == 0, done.stderr
    for name in chapters.names():
        assert f"book/_build/executed/{name}.ipynb" in done.stdout + done.stderr
    assert "book/_build/html/index.html" in done.stdout + done.stderr


@pytest.mark.parametrize("target", [["book"], ["sweep", "--config", "profile=full", "device=cuda"]])
def test_the_slurm_profile_dry_runs(target):
    done = snakemake("-n", "--forceall", "--profile", "profiles/slurm", *target)
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert "gres=gpu:1" in output and "slurm_partition=gpu" in output


def test_a_sweep_has_one_job_per_cell_of_its_grid():
    specs = yaml.safe_load((ROOT / "book" / "sweeps.yml").read_text())
    name, spec = next(iter(specs.items()))
    cells = 1
    for values in spec["grid"].values():
        cells *= len(values)
    done = snakemake("-n", "--forceall", "--cores", "2", "sweep", "--config", f"sweep={name}")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("rule sweep_cell:") == cells


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda p: p.name)
def test_github_workflows_are_well_formed(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["jobs"] and all("steps" in job for job in workflow["jobs"].values())


def test_ci_runs_the_two_commands_and_the_browser():
    text = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    lines = [line.strip() for line in text.splitlines()]
    assert [line for line in lines if line.startswith("make ")] == ["make book", "make test", "make browser"]
    assert subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT).returncode == 0


@pytest.fixture
def small_book(tmp_path):
    """A folder with this Snakefile, one chapter that works, one that fails, and a sweep of the first."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    (tmp_path / "Snakefile").write_text((ROOT / "Snakefile").read_text())
    for folder in ("notebooks", "book", "tdlib"):
        (tmp_path / folder).mkdir()
    (tmp_path / "book" / "sweeps.yml").write_text(
        "grid:\n  chapter: good\n  grid: {seed: [1, 2], profile: [quick]}\n"
    )
    (tmp_path / "_config.yml").write_text("")
    record = "import tdbook\ntdbook.record('good', {'seed': seed}, {'twice': 2 * seed})"
    for name, body in {"good": record, "bad": "print('so far')\nraise ValueError('not today')"}.items():
        nb = new_notebook(cells=[new_code_cell("profile = 'quick'\nseed = 0"), new_code_cell(body)])
        nb.cells[0].metadata["tags"] = ["parameters"]
        nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nb, str(tmp_path / "notebooks" / f"{name}.ipynb"))
    return tmp_path


def test_one_failing_chapter_fails_the_run_after_the_others_ran(small_book, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'book'}")
    executed = small_book / "book" / "_build" / "executed"
    done = snakemake("--cores", "1", "--keep-going", "book", folder=small_book)
    assert done.returncode != 0
    assert "chapter bad failed" in done.stderr and "not today" in done.stderr
    assert (executed / "good.ipynb").is_file() and not (executed / "bad.ipynb").exists()
    assert "so far" in (small_book / "book" / "_build" / "failed" / "bad.ipynb").read_text()

    before = (executed / "good.ipynb").stat().st_mtime_ns
    again = snakemake("--cores", "1", "book/_build/executed/good.ipynb", folder=small_book)
    assert again.returncode == 0 and (executed / "good.ipynb").stat().st_mtime_ns == before


def test_a_chapters_figure_executes_that_chapter_alone_and_a_shared_one_all(small_book):
    """Which chapters a dry run would execute after a file has changed."""
    import nbformat

    figures = small_book / "book" / "tdbook" / "figures"
    figures.mkdir(parents=True)
    executed = small_book / "book" / "_build" / "executed"
    executed.mkdir(parents=True)
    (figures / "common.py").write_text("")
    (figures.parent / "pages.py").write_text("")
    targets = []
    for name in ("good", "bad"):
        (figures / f"{name}.py").write_text("from tdbook.figures import common")
        path = small_book / "notebooks" / f"{name}.ipynb"
        nb = nbformat.read(path, 4)
        nb.cells[1].source = f"from tdbook.figures import {name} as figures"
        nbformat.write(nb, path)
        nbformat.write(nb, executed / f"{name}.ipynb")
        targets.append(f"book/_build/executed/{name}.ipynb")
    assert snakemake("--touch", "--cores", "1", *targets, folder=small_book).returncode == 0

    def executes_after(*place):
        path = small_book.joinpath(*place)
        before = path.read_text()
        path.write_text(before + "\n# changed\n")
        done = snakemake("-n", "--cores", "1", *targets, folder=small_book)
        path.write_text(before)
        assert snakemake("--touch", "--cores", "1", *targets, folder=small_book).returncode == 0
        output = done.stdout + done.stderr
        return [n for n in ("good", "bad") if f"output: book/_build/executed/{n}.ipynb" in output]

    assert executes_after("book", "tdbook", "figures", "good.py") == ["good"]
    assert executes_after("book", "tdbook", "figures", "common.py") == ["good", "bad"]
    assert executes_after("book", "tdbook", "pages.py") == []


def test_a_sweep_runs_every_cell_and_joins_the_records(small_book, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'book'}")
    done = snakemake("--cores", "1", "sweep", folder=small_book)
    assert done.returncode == 0, done.stderr
    lines = (small_book / "runs" / "sweeps" / "grid.csv").read_text().splitlines()
    assert lines[0] == "cell,chapter,seed,twice"
    assert lines[1:] == ["seed-1_profile-quick,good,1,2", "seed-2_profile-quick,good,2,4"]

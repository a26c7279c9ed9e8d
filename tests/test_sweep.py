"""A sweep packs jobs, keeps them apart, goes on after a failure, and does nothing twice."""

import json
import os
import time

import nbformat
import pytest

from tdlib import chapters, sweep
from tdlib.errors import DataError, TdlibError, UnknownName

CELL = """
import json, os, pathlib
assert number != 13, "unlucky"
folder = pathlib.Path(os.environ["TDLIB_RECORDS"])
folder.mkdir(parents=True, exist_ok=True)
record = {"chapter": "square", "seed": seed, "parameters": {"number": number}}
record["metrics"] = {"square": number**2}
(folder / "one.json").write_text(json.dumps(record))
print("threads", os.environ["OMP_NUM_THREADS"], "device", device)
"""
GRID = """
squares:
  chapter: square
  base: {profile: quick}
  grid: {number: [2, 13, 4], seed: [0]}
"""


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of one chapter, and a grid for it."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    parameters = nbformat.v4.new_code_cell(
        "number = 1\nseed = 0\nprofile = 'quick'\ndevice = 'cpu'", metadata={"tags": ["parameters"]}
    )
    nb = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(CELL)])
    nb.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(nb, notebooks / "square.ipynb")
    monkeypatch.setattr(chapters, "NOTEBOOKS", notebooks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    return tmp_path


def test_a_failure_stops_no_other_job_and_what_is_done_is_not_repeated(book):
    jobs = sweep.read_grid(book / "grid.yaml")["squares"]
    assert [job.cell for job in jobs] == ["number-2_seed-0", "number-13_seed-0", "number-4_seed-0"]
    out = book / "out"
    ended = []
    first = sweep.run_jobs(jobs, out, per_device=2, report=ended.append)
    assert sorted(o.state for o in first) == ["done", "done", "failed"] and ended == first
    failed = next(o for o in first if o.state == "failed")
    assert failed.job.parameters["number"] == 13 and "unlucky" in failed.message
    assert (out / "failed" / "squares" / "number-13_seed-0" / "square.ipynb").is_file()
    done = [job.notebook(out) for job in jobs if job.notebook(out).is_file()]
    records = [json.loads(next(path.with_suffix("").glob("*.json")).read_text()) for path in done]
    assert sorted(record["metrics"]["square"] for record in records) == [4, 16]
    share = max(1, (os.cpu_count() or 1) // 2)
    assert f"threads {share} device cpu" in done[0].read_text()
    table = chapters.collect(done, out / "squares.csv").read_text()
    assert "square" in table and len(table.splitlines()) == 3

    before = [path.stat().st_mtime_ns for path in done]
    second = sweep.run_jobs([job for job in jobs if job.parameters["number"] != 13], out)
    assert [o.state for o in second] == ["was done", "was done"]
    assert before == [path.stat().st_mtime_ns for path in done]


def test_time_limit_leaves_the_rest_for_the_next_call(book):
    jobs = sweep.read_grid(book / "grid.yaml")["squares"]
    started = time.monotonic()
    outcomes = sweep.run_jobs(jobs, book / "out", max_minutes=1e-4)
    assert time.monotonic() - started < 60
    assert {o.state for o in outcomes} <= {"not started", "failed"} and len(outcomes) == len(jobs)
    assert all(o.message == "time limit" for o in outcomes)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("a: {chapter: nothing, grid: {seed: [1]}}", UnknownName, "square"),
        ("a: {chapter: square, grid: {sed: [1]}}", UnknownName, "seed"),
        ("a: {chapter: square, grid: {seed: 1}}", DataError, "lists"),
        ("a: {chapter: square}", DataError, "grid"),
        ("a: {chapter: square, gird: {seed: [1]}}", UnknownName, "grid"),
        ("- a", DataError, "names of sweeps"),
        ("a: [", DataError, "not YAML"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(book, text, error, words):
    path = book / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(error, match=words):
        sweep.read_grid(path)


def test_missing_file_and_unwritable_folder(book):
    with pytest.raises(DataError, match="does not exist"):
        sweep.read_grid(book / "none.yaml")
    (book / "file").write_text("")
    with pytest.raises(TdlibError, match="cannot write"):
        sweep.run_jobs(sweep.read_grid(book / "grid.yaml")["squares"], book / "file")


def test_the_books_own_sweeps_are_readable():
    """The grid file that the Snakefile reads is one that `tdlib sweep` reads."""
    import yaml

    path = chapters.ROOT / "book" / "sweeps.yml"
    there = {spec["chapter"] for spec in yaml.safe_load(path.read_text()).values()}
    assert there <= set(chapters.names())
    assert all(sweep.read_grid(path).values())


def test_advice_on_sharing_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "no-pipe"))
    assert "mps" in sweep.hints(["cuda:0"], 8)[0]
    assert sweep.hints(["cuda:0"], 1) == sweep.hints(["cpu"], 8) == []

"""A chapter is one notebook and one line of the table of contents."""

import os
import shutil
import subprocess
import sys

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tdbook.paths import ROOT

BODY = """
from functools import partial
import tdlib
from tdbook.experiment import Arm, experiment
from tdlib.methods import planned
from tdlib.methods.direct import direct

data = tdlib.data.load(dataset, limit=100)
dense = lambda seed: tdlib.models.build("cnn", data.classes, input_shape=data.input_shape, width=8)
plan = lambda network, ratio, seed: planned(network, data, format="svd", ratio=ratio)
experiment(dense, data, {"direct": Arm(direct, plan)}, ratios=[1.5]).frame[["method", "test_accuracy"]]
"""


def test_a_notebook_and_a_line_of_the_table_of_contents_become_a_chapter(tmp_path):
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns(".*", "_build", "tests", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=skipped)
    parameters = new_code_cell("dataset = 'digits'", metadata={"tags": ["parameters"]})
    toy = new_notebook(cells=[new_markdown_cell("# A toy chapter"), parameters, new_code_cell(BODY.strip())])
    toy.metadata["chapter"] = {"question": "Does a toy work?"}
    toy.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(toy, tree / "notebooks" / "toy.ipynb")
    contents = tree / "book" / "_toc.yml"
    toc = yaml.safe_load(contents.read_text())
    toc["parts"][1]["chapters"].append({"file": "notebooks/toy"})
    contents.write_text(yaml.safe_dump(toc, sort_keys=False))

    def run(*arguments):
        path = os.pathsep.join([str(tree), str(tree / "book")])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "executed/toy.ipynb" in run("snakemake", "-n", "--cores", "1", "--nolock")
    run("tdbook", "run", "toy", "--output", "book/_build/executed/toy.ipynb")
    run("tdbook", "stage")
    staged = tree / "book" / "_build" / "src"
    assert "test_accuracy" in (staged / "notebooks" / "toy.ipynb").read_text()
    assert "notebooks/toy" in (staged / "_toc.yml").read_text()
    assert "Does a toy work?" in (staged / "book" / "_generated" / "map.md").read_text()

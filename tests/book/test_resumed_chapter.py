"""A chapter that trains, killed with its kernel and run again, writes the record of an unbroken run."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import torch
from nbformat.v4 import new_code_cell, new_notebook

from tdbook.paths import ROOT
from tdbook.records import read_record

CODE = """
from pathlib import Path
import torch, tdlib
from tdbook.experiment import Arm, Recorder, experiment
from tdlib.methods import planned
from tdlib.methods.direct import direct
from tdlib.train import fit, stage

data = tdlib.data.load("digits", limit=300)
kept = {"checkpoint": Path(folder) / "checkpoint", "checkpoint_steps": 1} if folder else {}
training = dict(batch_size=64, device="cpu", progress=False, **kept)

def dense(seed):
    torch.manual_seed(seed)
    network = tdlib.models.build("cnn", data.classes, input_shape=data.input_shape, width=8)
    fit(network, data, epochs=4, lr=0.05, **stage({**training, "seed": seed}, "dense", 0))
    return network

plan = lambda network, ratio, seed: planned(network, data, format="tucker2", ratio=ratio)
arms = {"tuned": Arm(direct, plan, finetune=dict(epochs=8, lr=0.01))}
experiment(dense, data, arms, ratios=[2], training=training, recorder=Recorder("toy", {}, directory=records))
"""


def found(folder):
    """The records of a run by method, without what a clock says."""
    rows = {}
    for path in folder.glob("*.json"):
        content = read_record(path)
        metrics = {k: v for k, v in content["metrics"].items() if k not in ("seconds", "speedup", "images")}
        epochs = [row for table in content["history"].values() for row in table]
        epochs = [{k: v for k, v in row.items() if k != "seconds"} for row in epochs]
        rows[content["parameters"]["method"]] = metrics, epochs, content["start"]
    return rows


def test_a_chapter_killed_while_it_trains_gives_the_record_of_an_unbroken_run(tmp_path):
    parameters = new_code_cell("folder = None\nrecords = None", metadata={"tags": ["parameters"]})
    toy = new_notebook(cells=[parameters, new_code_cell(CODE.strip())])
    toy.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(toy, tmp_path / "toy.ipynb")
    given = {"folder": str(tmp_path / "work"), "records": str(tmp_path / "killed")}
    command = [sys.executable, "-m", "tdbook", "run", "toy.ipynb", "--output", "done.ipynb"]
    command += [f"--failed={tmp_path}"] + [f"-p{name}={value}" for name, value in given.items()]
    path = os.pathsep.join([str(ROOT), str(ROOT / "book")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    kept = tmp_path / "work" / "checkpoint"
    for stage in ("tuned-2-params-0/finetune", None):
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as process:
            while stage and process.poll() is None and not (kept / stage / "checkpoint.tdlib").exists():
                time.sleep(0.005)
            if stage and process.poll() is None:
                for one in (*psutil.Process(process.pid).children(recursive=True), process):
                    os.kill(one.pid, signal.SIGKILL)
            error = process.communicate(timeout=120)[1]
        assert process.returncode == (-signal.SIGKILL if stage else 0), error
        assert (tmp_path / "done.ipynb").exists() == (tmp_path / "killed").exists() == (stage is None)
    exec(CODE, {"folder": None, "records": tmp_path / "unbroken"})
    whole, broken = found(tmp_path / "unbroken"), found(tmp_path / "killed")
    assert whole.keys() == {"tuned"} and whole == broken

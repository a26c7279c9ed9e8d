"""pyproject.toml, constraints.txt and environment.yml describe one environment."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import yaml
from packaging.requirements import Requirement

from tdbook.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!]+", line) for line in lines if line)
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def declared():
    """Requirements of the package and of its extras, other than extras that name another one of them."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(text) for group in groups for text in group]
    for extras in (requirement.extras for requirement in found if requirement.name == "tdlib"):
        assert extras <= set(PROJECT["optional-dependencies"])
    return [requirement for requirement in found if requirement.name != "tdlib"]


def test_every_declared_dependency_is_pinned_within_its_range():
    pinned = pins()
    for requirement in declared():
        pin = pinned[normal(requirement.name)]
        assert requirement.specifier.contains(pin, prereleases=True), requirement


def test_the_readme_explains_every_dependency():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## What it stands on")[1]
    rows = "\n".join(line for line in table.splitlines() if line.startswith("|"))
    tools = {"ipykernel", "nbformat", "pytest-xdist"}  # what papermill and pytest bring with them
    for requirement in declared():
        assert normal(requirement.name) in tools | {normal(word) for word in re.findall(r"[\w-]+", rows)}


#: What only training, the methods or the book may import.
EXTRA = "accelerate pandas sklearn matplotlib seaborn pydantic yaml papermill nbformat".split()
BASE = f"""
import sys
sys.modules |= dict.fromkeys({EXTRA!r})
import torch, tdlib
model = tdlib.models.build("cnn", 10, input_shape=(1, 8, 8))
plan = tdlib.plan(model, (1, 8, 8), format="tucker2", ratio=2.0)
small = tdlib.decompose(model, plan)
print(plan, tdlib.compare(model, small, (1, 8, 8), repeats=1))
tdlib.save(small, "small.safetensors")
assert tdlib.load("small.safetensors")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
assert not [name for name in sys.modules if name.startswith("tdbook")]
"""


def test_the_library_without_extras_plans_decomposes_and_saves(tmp_path):
    done = subprocess.run([sys.executable, "-c", BASE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_library_never_imports_the_book():
    for path in (ROOT / "tdlib").rglob("*.py"):
        assert "tdbook" not in path.read_text(encoding="utf-8"), path


def test_pins_name_no_place():
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "@" not in text


def test_conda_environment_installs_this_package_with_these_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert f"python{PROJECT['requires-python']}" in conda
    assert "--constraint constraints.txt" in pip
    (installed,) = [line for line in pip if line.startswith("--editable .")]
    extras = re.search(r"\[(.*)\]", installed)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"]) and {"book", "test"} <= set(extras)


def test_installed_versions_are_the_pinned_ones():
    pinned = pins()
    for name in ("torch", "tensorly", "numpy", "papermill", "snakemake", "jupyter-book"):
        assert metadata.version(name).split("+")[0] == pinned[name]

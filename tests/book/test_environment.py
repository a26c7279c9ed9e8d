"""pyproject.toml, constraints.txt and environment.yml describe one environment."""

import re
import tomllib
from importlib import metadata

import yaml

from tdlib.chapters import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!]+", line) for line in lines if line)
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def test_every_declared_dependency_is_pinned():
    declared = [
        *PROJECT["dependencies"],
        *(d for extra in PROJECT["optional-dependencies"].values() for d in extra),
    ]
    names = {normal(re.match(r"[A-Za-z0-9_.-]+", d)[0]) for d in declared}
    assert names <= set(pins())


def test_pins_lie_within_the_declared_ranges():
    from packaging.requirements import Requirement

    pinned = pins()
    for text in [
        *PROJECT["dependencies"],
        *(d for e in PROJECT["optional-dependencies"].values() for d in e),
    ]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[normal(requirement.name)], prereleases=True), text


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

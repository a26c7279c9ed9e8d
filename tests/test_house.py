"""The architecture as tests: who imports whom, how many files a call goes through, what a method needs."""

import ast
import graphlib
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tdlib
from tdlib.cli import app
from tdlib.errors import UnknownName
from tdlib.methods import METHODS, Method

ROOT = Path(tdlib.__file__).parent
#: From the ground floor up; each room imports rooms below it only.
ROOMS = (
    "errors", "files", "memory", "network",
    "decompositions", "formats", "calibration", "data", "models", "io", "train", "planning", "methods",
    "export", "cli",
)  # fmt: skip
#: One screen each and no algorithm: whoever reads one need not open them.
STANDING = {"errors.py", "files.py", "memory.py", "network.py"}


def sources() -> dict[str, ast.Module]:
    """Module name -> its syntax tree."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


SOURCES = sources()


def imports(module: str) -> list[tuple[str, str | None]]:
    """(imported module, name taken from it), also of imports inside functions."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import, line {node.lineno}"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole, None) if whole in SOURCES else (str(node.module), alias.name))
    return found


def inside(module: str) -> list[str]:
    """The modules of tdlib that a module imports; the root itself, which imports lazily, left out."""
    return [name for name, _ in imports(module) if name.startswith("tdlib.")]


def room(module: str) -> str:
    """The folder or file right below tdlib."""
    return module.split(".")[1]


def test_arrows_point_downwards():
    floor = {name: ROOMS.index(room(name)) for name in SOURCES if name != "tdlib"}
    above = [(module, name) for module in floor for name in inside(module) if floor[name] > floor[module]]
    assert not above
    assert not [module for module in SOURCES for name, _ in imports(module) if name.split(".")[0] == "tdbook"]


def test_the_plan_of_the_house_lists_every_room():
    assert {room(name) for name in SOURCES if name != "tdlib"} == set(ROOMS)


def test_there_are_no_circles():
    graphlib.TopologicalSorter({name: inside(name) for name in SOURCES}).prepare()


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_names_stay_in_their_module():
    for module, tree in SOURCES.items():
        taken = [(where, name) for where, name in imports(module) if where in SOURCES]
        assert not [(module, name) for _, name in taken if name and private(name)]
        modules = {where.rpartition(".")[2] for where, name in taken if name is None}  # used as module.name
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and private(node.attr)]
        owners = {node.value.id for node in used if isinstance(node.value, ast.Name)}
        assert not owners & modules, (module, owners & modules)


# -- how far a call goes


def visited(call):
    """The files of tdlib that have a function entered by the call, in the order of entry."""
    for package in ("methods", "train", "data", "models", "planning", "calibration"):
        for module in pkgutil.iter_modules([str(ROOT / package)], f"tdlib.{package}."):
            if module.name in SOURCES:
                importlib.import_module(module.name)  # what runs at import does not count
    files: dict[str, None] = {}

    def enter(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(f"{ROOT}/"):
            files.setdefault(code.co_filename.removeprefix(f"{ROOT}/"))

    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [name for name in files if name not in STANDING]


@pytest.fixture(scope="module")
def digits():
    return tdlib.data.load("digits", limit=200)


def cnn():
    torch.manual_seed(0)
    return tdlib.models.build("cnn", 10, input_shape=(1, 8, 8), width=8)


def test_planning_and_decomposing_a_convolution_goes_through_few_files():
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1))

    def call():
        tdlib.decompose(model, tdlib.plan(model, (16, 8, 8), format="tucker2", ratio=2))

    files = visited(call)
    assert "formats/tucker2.py" in files and len(files) <= 12, files


def test_compressing_under_sigma_goes_through_few_files(digits):
    files = visited(lambda: tdlib.compress(cnn(), "sequential", digits, ratio=2, progress=False))
    own = [name for name in files if not name.startswith(("data/", "models/"))]  # what the caller hands over
    assert "decompositions/sigma/tucker.py" in own and len(own) <= 24, own


# -- what an extension needs (a format: tests/formats/test_new_format.py)


def louder(model, data, plan, *, volume: float = 1.0, progress: bool = False):
    """A method of one's own: decompose, then scale the classifier."""
    small = tdlib.decompose(model, plan, progress=progress)
    with torch.no_grad():
        small.linear.weight.mul_(volume)
    return small, {"louder": [{"volume": volume}]}


@pytest.fixture
def own_method():
    METHODS["louder"] = Method(f"{__name__}:louder", "these tests", ("svd", "tt"), training="none")
    yield
    del METHODS["louder"]


@pytest.mark.usefixtures("own_method")
def test_a_method_is_one_function_and_one_row(digits):
    assert "volume" in tdlib.methods.hyperparameters("louder")
    assert tdlib.methods.available().loc["louder", "paper"] == "these tests"
    model = cnn()
    small = tdlib.compress(model, "louder", digits, ratio=1.5, volume=2.0, device="cpu", progress=False)
    assert torch.equal(small.linear.weight, 2 * model.linear.weight)
    about = tdlib.provenance(small)
    assert about.report["history"]["louder"] == [{"volume": 2.0}]
    assert {layer.format for layer in about.layers.values()} == {"svd"}
    assert about.report["params_ratio"] == pytest.approx(1.5, rel=0.02)
    with pytest.raises(UnknownName, match="Did you mean 'volume'"):
        tdlib.compress(model, "louder", digits, ratio=1.5, volumen=2.0)
    listed = CliRunner().invoke(app, ["methods"])
    assert listed.exit_code == 0 and "louder" in listed.output and "these tests" in listed.output


# -- what an import brings along


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_tdlib_does_not_import_torch():
    assert run("import sys, tdlib; print('torch' in sys.modules, len(dir(tdlib)) > 20)").split() == [
        "False",
        "True",
    ]


def test_the_core_needs_no_extra():
    """Plan, decompose, save and load, also under statistics, where no extra is installed."""
    code = """
import sys
from importlib.machinery import PathFinder

class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in EXTRAS else super().find_spec(name, path, target)

EXTRAS = {"accelerate", "sklearn", "pandas", "matplotlib", "seaborn", "pydantic", "jsonschema", "yaml",
          "papermill", "onnx", "onnxruntime", "onnxscript", "timm"}
sys.meta_path = [Core if finder is PathFinder else finder for finder in sys.meta_path]
import tempfile, numpy, torch, tdlib
from tdlib.errors import TdlibError
from tdlib.export import fold_batchnorm, to_onnx
model = tdlib.models.build("cnn", 3, input_shape=(1, 8, 8), width=8).eval()
plan = tdlib.plan(model, (1, 8, 8), "tucker2", 1.5)
statistics = tdlib.statistics(model, [torch.randn(32, 1, 8, 8)])
for small in (tdlib.decompose(model, plan), tdlib.decompose(model, plan, statistics)):
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        tdlib.save(small, file.name)
        assert torch.equal(tdlib.load(file.name)(torch.ones(2, 1, 8, 8)), small(torch.ones(2, 1, 8, 8)))
print(plan, tdlib.compare(model, small, (1, 8, 8), repeats=1))
fold_batchnorm(small)
with tempfile.NamedTemporaryFile(suffix=".npz") as file:
    images, labels = numpy.zeros((40, 8, 8), numpy.uint8), numpy.arange(40) % 3
    numpy.savez(file, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    data = tdlib.data.load(f"npz:{file.name}")
for call in (plan.to_frame, tdlib.methods.available, lambda: tdlib.data.load("digits"),
             lambda: tdlib.train.fit(model, data, epochs=1), lambda: to_onnx(model, "a.onnx", (1, 8, 8))):
    try:
        call()
    except TdlibError as error:
        print("missing:", error)
"""
    output = run(code)
    assert output.count("missing:") == 5 and output.count("pip install 'tdlib[train]'") == 4, output

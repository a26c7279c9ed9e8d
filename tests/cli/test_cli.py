"""The command line: the examples of every --help run, errors are one line with the right exit code."""

import json
import re
import shlex
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tdlib
from tdlib import cli
from tdlib.commands import common

RUNNER = CliRunner()
COMMANDS = {info.callback.__name__: info.callback for info in cli.app.registered_commands}


def run(*arguments):
    return RUNNER.invoke(cli.app, [str(argument) for argument in arguments])


def examples(text):
    """Commands after "Examples:" in a docstring, continuation lines joined."""
    found = text.split("Examples:")[1].replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in found.splitlines() if line.strip().startswith("tdlib ")]


def cases():
    rows = [("main", example) for example in examples(cli.EXAMPLES)]
    return rows + [
        (name, example) for name, function in COMMANDS.items() for example in examples(function.__doc__)
    ]


@pytest.mark.parametrize(
    ("command", "example"), [pytest.param(*row, id=" ".join(row[1])[:60]) for row in cases()]
)
def test_examples_of_the_help_work(user, command, example):
    if command == "compare":
        (user / "small.safetensors").symlink_to(user / "two.safetensors")
    result = run(*example)
    assert result.exit_code == 0, result.stderr
    assert "Traceback" not in result.output
    for flag in ("--out", "--onnx", "--dense-out"):
        if flag in example:
            assert (user / example[example.index(flag) + 1]).exists()


def test_every_command_has_examples_and_help():
    assert set(COMMANDS) == {"methods", "compress", "compare", "count", "plan"}
    for name, function in COMMANDS.items():
        assert examples(function.__doc__), name
        shown = run(name, "--help")
        assert shown.exit_code == 0 and "Examples:" in shown.output and "--debug" in shown.output


def test_help_does_not_import_torch():
    code = "import sys\nfrom tdlib.cli import app\ntry:\n    app(['compress', '--help'])\n"
    code += "except SystemExit as end:\n"
    code += "    heavy = {'torch', 'torchvision', 'pandas', 'tensorly', 'matplotlib'} & set(sys.modules)\n"
    code += "    sys.exit(f'imported {heavy}' if heavy else end.code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


COMPRESS = ["compress", "--model", "dense.safetensors", "--data", "imagefolder:photos", "--method", "direct"]
FOREIGN = ["compress", "--model", "cnn", "--weights", "five.safetensors", "--data", "imagefolder:photos"]
FOREIGN += ["--out", "x.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["count", "resnet21"], 2, "resnet20"),
        (["count", "missing.safetensors"], 2, "does not exist"),
        (["count", "resnet20"], 2, "--input-shape"),
        (["count", "resnet20", "--input-shape", "3,a"], 2, "3,32,32"),
        (["plan", "cnn", "--input-shape", "1,8,8", "--format", "tuker2"], 2, "tucker2"),
        (["plan", "cnn", "--input-shape", "1,8,8", "--ratio", "9999"], 1, "reach"),
        ([*COMPRESS, "--out", "dense.safetensors"], 2, "--force"),
        ([*COMPRESS, "--out", "no/such/folder.safetensors"], 2, "folder"),
        ([*COMPRESS, "--out", "x.safetensors", "--ratio", "0.5"], 2, "above 1"),
        ([*COMPRESS, "--out", "x.safetensors", "--by", "weight"], 2, "macs"),
        ([*COMPRESS, "--out", "x.safetensors", "--set", "epochz=3"], 2, "epochz"),
        ([*COMPRESS, "--out", "x.safetensors", "--set", "epochs"], 2, "key=value"),
        ([*COMPRESS, "--out", "x.safetensors", "--onnx", "x.safetensors"], 2, "different files"),
        ([*COMPRESS, "--out", "x.safetensors", "--method", "magic"], 2, "direct"),
        ([*COMPRESS, "--out", "x.safetensors", "--data", "imagefolder:none"], 1, "does not exist"),
        ([*COMPRESS, "--out", "x.safetensors", "--device", "cuda:99"], 2, "not available"),
        ([*COMPRESS, "--out", "x.safetensors", "--data", "npz:scans.npz"], 2, "channels"),
        (FOREIGN, 2, "for 5 classes, the data have 3; --train-epochs N"),
        (["compress", "--model", "cnn"], 2, "--data"),
        (["nonsense"], 2, "nonsense"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_an_exit_code(user, arguments, code, words):
    before = sorted(user.iterdir())
    result = run(*arguments)
    assert result.exit_code == code, result.output + result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 or "Usage" in result.stderr
    assert sorted(user.iterdir()) == before


def test_debug_shows_the_traceback(user):
    for arguments in (["--debug", "count", "resnet21"], ["count", "resnet21", "--debug"]):
        result = run(*arguments)
        assert isinstance(result.exception, tdlib.errors.UnknownName)
    assert run("count", "resnet21").stderr.startswith("error:")


def test_compress_reports_what_it_did_and_the_file_is_that_network(user):
    out = user / "new.safetensors"
    result = run(*COMPRESS, "--format", "tucker2", "--ratio", "2", "--out", out)
    assert result.exit_code == 0, result.stderr
    rows = {line.split("  ")[0]: line for line in result.stdout.splitlines() if line}
    assert float(re.search(r"([\d.]+)x$", rows["parameters without BatchNorm"]).group(1)) == pytest.approx(
        2, abs=0.05
    )
    assert rows.keys() >= {"MACs of one input", "test accuracy, %", "same prediction as dense, %"}
    small = tdlib.load(out)
    data = tdlib.data.load("imagefolder:photos")
    accuracy = tdlib.train.evaluate(small, data, "test", device="cpu")["accuracy"]
    assert f"{accuracy:.2f}" in rows["test accuracy, %"]
    assert run(*COMPRESS, "--format", "tucker2", "--out", out).exit_code == 2
    assert run(*COMPRESS, "--format", "tucker2", "--out", out, "--force").exit_code == 0


def test_same_seed_same_file(user):
    """The tensors; the order of a safetensors header is not fixed."""
    for name in ("a", "b"):
        arguments = [
            "compress",
            "--model",
            "cnn",
            "--train-epochs",
            "1",
            "--data",
            "npz:scans.npz",
            "--method",
            "direct",
        ]
        assert run(*arguments, "--seed", "3", "--out", f"{name}.safetensors").exit_code == 0
    a, b = (load_file(user / f"{name}.safetensors") for name in ("a", "b"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_machine_readable_output(user):
    rows = json.loads(run("count", "dense.safetensors", "--json").stdout)
    assert (
        sum(row["params"] for row in rows) == tdlib.count(tdlib.load("dense.safetensors"), (3, 16, 16)).params
    )
    plan = json.loads(run("plan", "dense.safetensors", "--ratio", "2", "--json").stdout)
    assert tdlib.planning.Plan.from_dict(plan).ratio == pytest.approx(2, rel=0.02)
    assert set(json.loads(run("methods", "--json").stdout)) >= {"direct", "admm", "distribution-aware"}


def test_values_of_settings():
    values = ["1", "1e-3", ".5", "true", "None", "[1, 2]", "tt", "npz:a.npz"]
    assert [common.parse_value(v) for v in values] == [1, 1e-3, 0.5, True, None, [1, 2], "tt", "npz:a.npz"]


def test_weights_of_other_classes_with_training_get_a_fresh_last_layer(user):
    result = run(
        *FOREIGN, "--train-epochs", "1", "--method", "direct", "--format", "tucker2", "--ratio", "1.5"
    )
    assert result.exit_code == 0, result.stderr
    assert tdlib.load(user / "x.safetensors")(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


@pytest.mark.filterwarnings("default:this is odd")
def test_a_warning_is_one_line(user, monkeypatch):
    count = tdlib.count

    def odd(*arguments, **options):
        warnings.warn("this is odd", stacklevel=2)
        return count(*arguments, **options)

    monkeypatch.setattr(tdlib, "count", odd)
    result = run("count", "resnet20", "--classes", "10", "--input-shape", "3,32,32")
    assert result.exit_code == 0 and "warning: this is odd\n" in result.stderr
    assert "UserWarning" not in result.stderr

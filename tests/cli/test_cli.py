"""The command line: the examples of every --help run, errors are one line with the right exit code."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tdlib
from tdlib import cli
from tdlib.cli import common

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
    assert set(COMMANDS) == {"methods", "count", "plan", "compare", "compress"}
    for name, function in COMMANDS.items():
        assert examples(function.__doc__), name
        shown = run(name, "--help")
        assert shown.exit_code == 0 and "Examples:" in shown.output and "--debug" in shown.output


def without(packages, *commands):
    """The output of commands of `tdlib` in a fresh process that cannot import these packages."""
    code = f"import sys; sys.modules |= dict.fromkeys({packages})\nfrom tdlib.cli import app\n"
    code += f"for words in {commands}:\n    try: app(words)\n    except SystemExit as e: assert not e.code"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_does_not_import_torch():
    heavy = ["torch", "torchvision", "tensorly", "numpy", "tabulate"]
    shown = without(heavy, ["--help"], *([name, "--help"] for name in COMMANDS))
    assert "--model" in shown and "tdlib methods" in shown


def test_tables_and_json_do_not_need_pandas(user):
    shown = without(["pandas"], ["methods"], ["count", "dense.safetensors", "--json"], ["methods", "--json"])
    assert "Yin et al., CVPR 2021" in shown and '"params"' in shown


COMPRESS = ["compress", "--model", "dense.safetensors", "--data", "imagefolder:photos", "--method", "direct"]
UNSORTED = ["compress", "--model", "dense.safetensors", "--data", "imagefolder:unsorted"]
UNSORTED += ["--method", "direct", "--out", "x.safetensors"]
TRAINED = ["compress", "--model", "cnn", "--train-epochs", "1", "--data", "imagefolder:photos"]
TRAINED += ["--method", "sequential", "--out", "x.safetensors"]
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
        (["plan", "cnn", "--input-shape", "1,8,8", "--set", "multiple=some"], 1, "a whole number"),
        (["plan", "cnn", "--input-shape", "1,8,8", "--set", "model=1"], 2, "order"),
        ([*COMPRESS, "--out", "dense.safetensors"], 2, "--force"),
        ([*COMPRESS, "--out", "no/such/folder.safetensors"], 2, "folder"),
        ([*COMPRESS, "--out", "x.safetensors", "--ratio", "0.5"], 2, "above 1"),
        ([*COMPRESS, "--out", "x.safetensors", "--ratio", "nan"], 2, "a number above 1"),
        ([*COMPRESS, "--out", "x.pt"], 2, "must end in .safetensors"),
        ([*COMPRESS, "--out", "x.safetensors", "--onnx", "x.net"], 2, "must end in .onnx"),
        ([*COMPRESS, "--out", "folder.safetensors", "--force"], 2, "is a folder"),
        ([*COMPRESS, "--out", "x.safetensors", "--ratio", "9999"], 1, "reach"),
        ([*COMPRESS, "--out", "x.safetensors", "--classes", "3"], 2, "leave it out here"),
        ([*COMPRESS, "--out", "x.safetensors", "--image-size", "24"], 2, "leave --image-size out"),
        ([*COMPRESS, "--out", "x.safetensors", "--mean", "0.5,0.5,0.5"], 2, "leave --mean out"),
        ([*COMPRESS, "--out", "x.safetensors", "--mean", "0.5,half"], 1, "mean must be numbers"),
        ([*COMPRESS, "--out", "x.safetensors", "--data", "imagefolder:others"], 2, "ant, bee, cow, the"),
        ([*UNSORTED, "--method", "admm"], 2, "has no labels"),
        ([*UNSORTED, "--set", "finetune_epochs=1"], 2, "has no labels"),
        ([*UNSORTED, "--train-epochs", "1"], 2, "has no labels"),
        ([*UNSORTED, "--model", "cnn"], 2, "--classes says how many"),
        ([*COMPRESS, "--out", "x.safetensors", "--data", "imagefolder:few"], 2, "no test images"),
        ([*TRAINED, "--ratio", "9999"], 1, "reach"),
        ([*TRAINED, "--train-lr", "-1"], 1, "lr > 0"),
        ([*TRAINED, "--train-lr", "1e30"], 1, "--train-lr 1e+30 is too large"),
        ([*COMPRESS, "--out", "x.safetensors", "--by", "weight"], 2, "macs"),
        ([*COMPRESS, "--out", "x.safetensors", "--format", "tuker2"], 2, "tucker2"),
        ([*COMPRESS, "--out", "x.safetensors", "--rule", "unifrom"], 2, "uniform"),
        ([*COMPRESS, "--out", "x.safetensors", "--set", "epochz=3"], 2, "epochz"),
        ([*COMPRESS, "--out", "x.safetensors", "--set", "epochs"], 2, "key=value"),
        ([*COMPRESS, "--out", "x.safetensors", "--onnx", "x.safetensors"], 2, "different files"),
        ([*COMPRESS, "--out", "x.safetensors", "--method", "magic"], 2, "direct"),
        ([*COMPRESS, "--out", "x.safetensors", "--data", "imagefolder:none"], 1, "does not exist"),
        ([*COMPRESS, "--out", "x.safetensors", "--device", "cuda:99"], 2, "not available"),
        ([*COMPRESS, "--out", "x.safetensors", "--data", "npz:scans.npz"], 1, "one for each of"),
        (FOREIGN, 2, "for 5 classes, the data have 3; --train-epochs N"),
        (["compress", "--model", "cnn"], 2, "--data"),
        (["compare", "dense.safetensors", "missing.safetensors"], 2, "does not exist"),
        (["compare", "dense.safetensors", "two.safetensors", "--batch", "0"], 2, "--batch"),
        (["nonsense"], 2, "nonsense"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_an_exit_code(user, arguments, code, words):
    (user / "folder.safetensors").mkdir()
    (user / "others").mkdir()
    for name in ("ant", "bee", "dog"):
        (user / "others" / name).symlink_to(user / "photos" / name.replace("dog", "cow"))
        (user / "few" / name).mkdir(parents=True)
        (user / "few" / name / "0.png").symlink_to(user / "photos" / "ant" / "0.png")
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
    assert not any("fine-tuning" in name for name in rows)
    assert run(*COMPRESS, "--format", "tucker2", "--out", out).exit_code == 2
    assert run(*COMPRESS, "--format", "tucker2", "--out", out, "--force").exit_code == 0


def test_accuracies_are_those_that_compress_measured(user):
    dense, small = tdlib.load("dense.safetensors"), tdlib.load("two.safetensors")
    stages = zip(("dense", "before", "after"), (90.0, 40.0, 80.0), strict=True)
    tdlib.provenance(small).report |= {stage: {"test": accuracy} for stage, accuracy in stages}
    table = cli.compress.before_after(dense, small, tdlib.data.load("imagefolder:photos"))
    assert re.search(r"before fine-tuning, % +90.00 +40.00 +-50.00\n", table)
    assert re.search(r"test accuracy, % +90.00 +80.00 +-10.00\n", table)


def test_same_seed_same_file(user):
    """The tensors; the order of a safetensors header is not fixed."""
    for name in ("a", "b"):
        arguments = ["compress", "--model", "cnn", "--train-epochs", "1", "--data", "npz:scans.npz"]
        arguments += ["--method", "direct"]
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
    assert set(json.loads(run("methods", "--json").stdout)) >= {"direct", "distribution-aware", "sequential"}


def test_settings_are_read_as_json_or_python():
    values = ["1", "1e-3", ".5", "true", "False", "None", "[1, 2]", "(8, 4)", "tt", "npz:a.npz", "tt-matrix"]
    read = [1, 1e-3, 0.5, True, False, None, [1, 2], (8, 4), "tt", "npz:a.npz", "tt-matrix"]
    assert [common.parse_value(value) for value in values] == read


def test_the_default_of_compress_is_ours_and_the_papers_method_keeps_its_name(user):
    start = ["compress", "--model", "dense.safetensors", "--data", "imagefolder:photos"]
    paper = run(*start, "--method", "distribution-aware", "--out", "paper.safetensors")
    ours = run(*start, "--out", "ours.safetensors")
    assert "\ndistribution-aware: " in paper.stderr and "\nsequential: " in ours.stderr
    rules = [tdlib.provenance(tdlib.load(f"{name}.safetensors")).plan["rule"] for name in ("paper", "ours")]
    assert rules == ["uniform", "global"]


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


def test_a_network_is_measured_as_it_was_trained(user):
    """At the size, the normalisation and the interpolation that its training had, also through --weights."""
    start = ["compress", "--model", "cnn", "--train-epochs", "1", "--data", "imagefolder:photos"]
    start += ["--image-size", "12", "--mean", "0.4,0.5,0.6", "--std", "0.3,0.2,0.1", "--method", "direct"]
    assert run(*start, "--out", "a.safetensors").exit_code == 0
    inputs = tdlib.provenance(tdlib.load("a-dense.safetensors")).inputs
    assert inputs == {
        "classes": ["ant", "bee", "cow"], "input_shape": [3, 12, 12], "mean": [0.4, 0.5, 0.6],
        "std": [0.3, 0.2, 0.1], "interpolation": "bilinear",
    }  # fmt: skip
    assert tdlib.provenance(tdlib.load("a.safetensors")).inputs == inputs
    again = ["--data", "imagefolder:photos", "--method", "direct", "--out"]
    from_file = run("compress", "--model", "a-dense.safetensors", *again, "b.safetensors")
    said = "3, 12, 12, mean 0.4, 0.5, 0.6, std 0.3, 0.2, 0.1, bilinear; a-dense.safetensors was trained so"
    assert from_file.exit_code == 0 and said in from_file.stderr
    weights = ["--model", "cnn", "--weights", "a-dense.safetensors"]
    from_weights = run("compress", *weights, *again, "c.safetensors")
    assert from_weights.exit_code == 0 and said in from_weights.stderr
    assert from_weights.stdout == from_file.stdout
    further = ["--train-epochs", "1", "--image-size", "16", *again]
    other = run("compress", "--model", "a-dense.safetensors", *further, "d.safetensors")
    assert other.exit_code == 0 and "a-dense.safetensors was trained otherwise" in other.stderr
    data = tdlib.data.load("imagefolder:photos", image_size=12, mean=inputs["mean"], std=inputs["std"])
    dense = tdlib.train.evaluate(tdlib.load("a-dense.safetensors"), data, "test", device="cpu")
    assert f"{dense['accuracy']:.2f}" in from_file.stdout
    cost = tdlib.count(tdlib.load("a.safetensors"), (3, 12, 12))
    assert run("count", "a.safetensors").stdout == f"{cost}\n"


def test_images_without_labels_give_agreement_and_no_accuracies(user):
    result = run(*UNSORTED, "--by", "macs")
    assert result.exit_code == 0, result.stderr
    assert "no labels" in result.stderr and "accuracy" not in result.stdout
    assert "MACs of one input" in result.stdout and "same prediction as dense, %" in result.stdout
    inputs = tdlib.provenance(tdlib.load("x.safetensors")).inputs
    assert inputs == tdlib.provenance(tdlib.load("dense.safetensors")).inputs  # classes too
    named = ["--model", "cnn", "--weights", "five.safetensors", "--force"]
    assert run(*UNSORTED, *named, "--classes", "5").exit_code == 0
    wrong = run(*UNSORTED, *named, "--classes", "4")
    assert wrong.exit_code == 2 and "for 5 classes: --classes 5" in wrong.stderr


def test_without_the_packages_of_onnx_nothing_starts(user, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = run(*TRAINED, "--onnx", "x.onnx")
    assert result.exit_code == 1 and "tdlib[onnx]" in result.stderr and "epochs" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distribution-aware", "samples=0"], "samples must be at least 1"),
        (["distribution-aware", "statistics=none"], "cannot read none"),
        (["direct", "multiple=some"], "multiple must be a whole number"),
        (["direct", "options=3"], "options must be a table"),
        (["direct", "finetune_epochs=1", "checkpoint=3"], "checkpoint must be text or a path"),
        (["direct", "finetune_epochs=1", "optimizer=none"], "adam, adamw, sgd"),
        (["admm", "epochs=some"], "epochs must be a whole number"),
        (["admm", "batch_size=0"], "batch_size >= 1"),
        (["iterative", "batch_size=0"], "batch_size >= 1"),
        (["iterative", "least=60"], "ranks of at least 60"),
    ],
)
def test_wrong_settings_of_a_method_are_seen_before_training(user, arguments, words):
    method, *settings = arguments
    given = [part for setting in settings for part in ("--set", setting)]
    result = run(*TRAINED, "--method", method, *given)
    assert result.exit_code and words in result.stderr, result.stderr
    assert "training the dense network" not in result.stderr and not list(user.glob("x*"))


def test_iterative_takes_rules_of_its_own(user):
    short = ["--method", "iterative", "--set", "stage_epochs=0", "--ratio", "1.3"]
    assert run(*TRAINED, *short, "--rule", "nx").exit_code == 0
    wrong = run(*TRAINED, *short, "--rule", "evbmf", "--force")
    assert wrong.exit_code == 2 and "nx, vbmf" in wrong.stderr and "epochs" not in wrong.stderr


def test_a_full_disk_is_seen_before_training(user, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    result = run(*TRAINED)
    assert result.exit_code == 2 and "1,000 left" in result.stderr and "epochs" not in result.stderr


def test_the_trained_network_is_there_when_what_follows_fails(user, monkeypatch):
    def fail(*_, **__):
        raise tdlib.errors.NonFiniteError("no")

    monkeypatch.setattr(tdlib, "compress", fail)
    assert run(*TRAINED).exit_code == 1
    assert tdlib.load("x-dense.safetensors")(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("folder", [None, "run"])
def test_signals_end_with_a_line_on_how_to_go_on(user, monkeypatch, number, code, folder):
    keep = ["--set", f"checkpoint={folder}"] if folder else []
    compress = tdlib.compress
    monkeypatch.setattr(tdlib, "compress", lambda *_, **__: signal.raise_signal(number))
    handler = signal.getsignal(signal.SIGTERM)
    stopped = run(*TRAINED, *keep)
    assert stopped.exit_code == code and signal.getsignal(signal.SIGTERM) is handler
    kept = "run: the same command with --force" if folder else "x-dense.safetensors: --model"
    assert f"kept in {kept}" in stopped.stderr
    monkeypatch.setattr(tdlib, "compress", compress)
    trained = load_file("x-dense.safetensors")
    went_on = run(*TRAINED, *keep, "--force")
    assert went_on.exit_code == 0, went_on.stderr
    again = load_file("x-dense.safetensors")
    assert all(torch.equal(trained[name], again[name]) for name in trained)

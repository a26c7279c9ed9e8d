"""The book as a workflow: chapters -> staged pages -> HTML, and sweeps of a chapter over a grid.

    snakemake --cores 2                                  every chapter (quick profile), then the book
    snakemake --cores 2 --config profile=full device=cuda chapters=admm_tt
    snakemake --cores 2 sweep --config sweep=admm_tt_ratio
    snakemake --profile profiles/slurm ...               the same rules as SLURM jobs

Any key of PARAMETERS given by --config is handed to the notebooks that declare it. A job is repeated
when its notebook, the library or its parameters changed, and not otherwise.
"""
import json
import shlex
import sys
from itertools import product
from pathlib import Path

import yaml

BUILD, SWEEPS = "book/_build", "runs/sweeps"
PARAMETERS = ("profile", "dataset", "model", "data_dir", "seed", "device")
ALL = sorted(path.stem for path in Path("notebooks").glob("*.ipynb"))
CHAPTERS = str(config["chapters"]).split(",") if "chapters" in config else ALL
LIBRARY = sorted(str(p) for p in Path("tdlib").rglob("*.py") if p.name not in ("pages.py", "cli.py"))
PAGES = sorted(str(p) for p in Path("book").glob("*.*") if p.is_file()) + sorted(
    str(p) for folder in ("images", "results", "static") for p in Path("book", folder).rglob("*") if p.is_file()) + sorted(
    str(p) for p in Path("benchmarks").glob("*.json"))
PYTHON = shlex.quote(sys.executable)
JUPYTER_BOOK = shlex.quote(str(Path(sys.executable).with_name("jupyter-book")))
GIVEN = {"profile": "quick"} | {k: config[k] for k in PARAMETERS if config.get(k) not in (None, "")}
SHARE = max(1, (workflow.cores or 8) // 2)  # threads of a chapter: two run side by side


def arguments(values):
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return " ".join(f"-p {shlex.quote(f'{name}={text}')}" for name, text in texts.items())


def cells(sweep):
    """Parameters of each cell of a sweep, by the cell's name: the product of its grid's lists."""
    grid = sweep["grid"]
    rows = (dict(zip(grid, values)) for values in product(*grid.values()))
    return {"_".join(f"{k}-{v}" for k, v in row.items()).replace("/", "-"): GIVEN | sweep.get("base", {}) | row for row in rows}


SWEEP_FILE = config.get("sweeps", "book/sweeps.yml")
SPECS = yaml.safe_load(Path(SWEEP_FILE).read_text()) or {}
GRIDS = {name: cells(sweep) for name, sweep in SPECS.items()}


wildcard_constraints:
    chapter="|".join(ALL),
    sweep="|".join(GRIDS) or "none",


rule book:
    input:
        chapters=expand(BUILD + "/executed/{chapter}.ipynb", chapter=CHAPTERS),
        library=[*LIBRARY, "tdlib/pages.py"], pages=PAGES, config="_config.yml",
    output: BUILD + "/html/index.html",
    shell:
        PYTHON + " -m tdlib.chapters stage && "
        + JUPYTER_BOOK + " build {BUILD}/src --path-output book -q -W -n --keep-going"


rule chapter:
    input: notebook="notebooks/{chapter}.ipynb", library=LIBRARY,
    output: BUILD + "/executed/{chapter}.ipynb",
    params: given=arguments(GIVEN),
    threads: SHARE
    shell:
        "OMP_NUM_THREADS={threads} " + PYTHON + " -m tdlib.chapters run {input.notebook:q} --output {output:q} "
        "--failed {BUILD}/failed --records {BUILD}/records/{wildcards.chapter} {params.given}"


rule sweep_cell:
    input: notebook=lambda w: f"notebooks/{SPECS[w.sweep]['chapter']}.ipynb", library=LIBRARY,
    output: SWEEPS + "/{sweep}/{cell}.ipynb",
    params: given=lambda w: arguments(GRIDS[w.sweep][w.cell]),
    threads: SHARE
    shell:
        "OMP_NUM_THREADS={threads} " + PYTHON + " -m tdlib.chapters run {input.notebook:q} --output {output:q} "
        "--failed {SWEEPS}/failed --records {SWEEPS}/{wildcards.sweep:q}/{wildcards.cell:q} {params.given}"


rule sweep_table:
    input: lambda w: [f"{SWEEPS}/{w.sweep}/{cell}.ipynb" for cell in GRIDS[w.sweep]],
    output: SWEEPS + "/{sweep}.csv",
    shell: PYTHON + " -m tdlib.chapters collect {input:q} --table {output:q}"


rule sweep:
    input: [f"{SWEEPS}/{name}.csv" for name in str(config.get("sweep", ",".join(GRIDS))).split(",") if name],

"""The book as a workflow: chapters -> staged pages -> HTML, and sweeps of a chapter over a grid.

    snakemake --cores 2                                  chapters, then the book
    snakemake --cores 2 --config profile=full device=cuda chapters=admm_tt
    snakemake --cores 2 sweep --config sweep=admm_tt_ratio
    snakemake --profile profiles/slurm ...               the same rules as SLURM jobs

Keys of PARAMETERS given by --config go to the notebooks that declare them; jobs=8 runs eight side by side, not two.
A job is repeated when its notebook, parameters or `code` changed, and not otherwise.
"""
import json
import os
import shlex
import sys
from glob import glob
from itertools import product
from pathlib import Path

import yaml

from tdbook.chapters import sources

BUILD, SWEEPS = "book/_build", "runs/sweeps"
PARAMETERS = ("profile", "dataset", "model", "data_dir", "seed", "device")
ALL = sorted(path.stem for path in Path("notebooks").glob("*.ipynb"))
CHAPTERS = str(config["chapters"]).split(",") if "chapters" in config else ALL
LIBRARY = sorted(map(str, Path("tdlib").rglob("*.py")))
PAPERS = {yaml.safe_load(Path(path).read_text())["key"]: path for path in sorted(glob("book/papers/*.yml"))}
TEXTS = ("*.*", "images/*", "papers/*.yml", "results/*", "static/*", "tdbook/**/*.py", "../benchmarks/*.json")
PAGES = sorted(os.path.normpath(p) for pattern in TEXTS for p in Path("book").glob(pattern))
PYTHON = shlex.quote(sys.executable)
JUPYTER_BOOK = shlex.quote(str(Path(sys.executable).with_name("jupyter-book")))
GIVEN = {"profile": "quick"} | {k: config[k] for k in PARAMETERS if config.get(k) not in (None, "")}
SHARE = max(1, (workflow.cores or 8) // int(config.get("jobs", 2)))  # threads of a chapter


def code(chapter):
    """What a chapter runs on beside its notebook: the library, what it imports of tdbook, the papers that it names."""
    path = Path(f"notebooks/{chapter}.ipynb")
    return LIBRARY + sources(path, "book/tdbook") + [f for key, f in PAPERS.items() if f'\\"{key}\\"' in path.read_text()]


def arguments(values):
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return " ".join(f"-p {shlex.quote(f'{name}={text}')}" for name, text in texts.items())


def cells(sweep):
    """Parameters of each cell of a sweep, by the cell's name: the product of its grid's lists."""
    grid = sweep["grid"]
    rows = (dict(zip(grid, values)) for values in product(*grid.values()))
    return {"_".join(f"{k}-{v}" for k, v in row.items()).replace("/", "-"): GIVEN | sweep.get("base", {}) | row for row in rows}


SPECS = yaml.safe_load(Path(config.get("sweeps", "book/sweeps.yml")).read_text()) or {}
GRIDS = {name: cells(sweep) for name, sweep in SPECS.items()}
wildcard_constraints:
    chapter="|".join(ALL),
    sweep="|".join(GRIDS) or "none",


rule book:
    input:
        chapters=expand(BUILD + "/executed/{chapter}.ipynb", chapter=CHAPTERS),
        library=LIBRARY, pages=PAGES, config="_config.yml",
    output: BUILD + "/html/index.html",
    shell:
        PYTHON + " -m tdbook stage && "
        + JUPYTER_BOOK + " build {BUILD}/src --path-output book -q -W -n --keep-going"


rule chapter:
    input: notebook="notebooks/{chapter}.ipynb", code=lambda w: code(w.chapter),
        records=lambda w: sorted(glob(f"book/results/{w.chapter}-*.json")),
    output: BUILD + "/executed/{chapter}.ipynb",
    params: given=arguments(GIVEN),
    threads: SHARE
    shell:
        "OMP_NUM_THREADS={threads} " + PYTHON + " -m tdbook run {input.notebook:q} --output {output:q} "
        "--failed {BUILD}/failed --records {BUILD}/records/{wildcards.chapter} {params.given}"


rule sweep_cell:
    input: notebook=lambda w: f"notebooks/{SPECS[w.sweep]['chapter']}.ipynb", code=lambda w: code(SPECS[w.sweep]["chapter"]),
    output: SWEEPS + "/{sweep}/{cell}.ipynb",
    params: given=lambda w: arguments(GRIDS[w.sweep][w.cell]),
    threads: SHARE
    shell:
        "OMP_NUM_THREADS={threads} " + PYTHON + " -m tdbook run {input.notebook:q} --output {output:q} "
        "--failed {SWEEPS}/failed --records {SWEEPS}/{wildcards.sweep:q}/{wildcards.cell:q} {params.given}"


rule sweep_table:
    input: lambda w: [f"{SWEEPS}/{w.sweep}/{cell}.ipynb" for cell in GRIDS[w.sweep]],
    output: SWEEPS + "/{sweep}.csv",
    shell: PYTHON + " -m tdbook collect {input:q} --table {output:q}"


rule sweep:
    input: [f"{SWEEPS}/{name}.csv" for name in str(config.get("sweep", ",".join(GRIDS))).split(",") if name],

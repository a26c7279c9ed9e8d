"""The committed notebooks: stripped, parameterised, and all in the table of contents."""

import re

import nbformat
import pytest
import yaml

from tdbook import chapters, paths

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
FIRST = ["dataset", "model", "profile", "data_dir", "seed", "device"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs_and_noise(path):
    nb = nbformat.read(str(path), as_version=4)
    nbformat.validate(nb)
    for cell in nb.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
        assert not {"papermill", "execution"} & set(cell.metadata)
    assert "papermill" not in nb.metadata
    before = path.read_text(encoding="utf-8")
    clean = nbformat.writes(chapters.clean(nb, outputs=False))
    assert clean.rstrip() == before.rstrip(), "run: python -m tdbook strip"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exactly_one_parameters_cell_with_the_common_names(path):
    nb = nbformat.read(str(path), as_version=4)
    tagged = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    declared = chapters.defaults(path)
    assert list(declared)[: len(FIRST)] == FIRST
    assert {name: declared[name].strip("\"'") for name in ("dataset", "profile", "device")} == {
        "dataset": "digits",
        "profile": "quick",
        "device": "cpu",
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_starts_with_a_title(path):
    nb = nbformat.read(str(path), as_version=4)
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")


def text_of(path):
    """Prose of a notebook or a page: without code, formulas and generated parts."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.read(str(path), as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    hidden = r"```.*?```|`[^`]*`|\$[^$]*\$|<!-- results:begin.*results:end -->"
    return re.sub(hidden, "", text, flags=re.DOTALL)


TYPED = re.compile(r"[^.\n]*\d\s*(?:%|percent|points?\b)(?! (?:confidence )?interval)[^.\n]*")
DATA = [paths.BOOK / "claims.yml", *sorted(paths.PAPERS.glob("*.yml"))]
PROSE = [*NOTEBOOKS, *sorted(paths.BOOK.glob("*.md")), paths.ROOT / "README.md"]


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_no_accuracy_is_typed(path):
    """Results are computed; the one percentage that prose may state is that of an interval's confidence."""
    assert TYPED.findall(text_of(path)) == []


def own_words(tree, of=("claim", "reason", "here", "why", "effect")):
    """What a ledger or a paper's file says in our words, the paper's figures left out."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from [value] if name in of and isinstance(value, str) else own_words(value, of)
    elif isinstance(tree, list):
        for value in tree:
            yield from own_words(value, of)


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.name)
def test_no_accuracy_is_typed_in_the_data_either(path):
    said = list(own_words(yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert said and not [text for text in said if TYPED.search(text)]


def test_the_table_of_contents_names_all_chapters_and_each_asks_its_question():
    toc = yaml.safe_load((paths.ROOT / "book" / "_toc.yml").read_text())
    files = [row["file"] for part in toc["parts"] for row in part["chapters"]]
    listed = [name.removeprefix("notebooks/") for name in files if name.startswith("notebooks/")]
    assert sorted(listed) == chapters.names()
    for path in NOTEBOOKS:
        assert nbformat.read(str(path), as_version=4).metadata["chapter"]["question"].endswith("?")

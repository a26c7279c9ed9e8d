"""One name and one colour for each thing, and figures that do not change from run to run."""

import io
import itertools

import numpy as np

from tdbook import style
from tdbook.figures import common


def test_both_spellings_and_names_in_the_text_mean_the_same():
    assert style.label("distribution_aware") == style.label("distribution-aware") == "distribution-aware"
    assert style.colour("ADMM") == style.colour("admm") == style.colour("ADMM, tuned")
    assert style.colour(style.label("tucker2")) == style.colour("tucker2")
    assert style.label("conv1") == "conv1"
    assert style.label("iterative, lower ranks") == "iterative, lower ranks"


def test_names_without_a_colour_get_those_that_are_left():
    found = style.palette(["tt", "mine", "yours", "tt"])
    assert found["tt"] == style.colour("tt") and len(set(found.values())) == len(found) == 3
    assert len(set(style.palette(f"layer{n}" for n in range(20)).values())) == 20


def test_equal_tables_give_equal_pictures_with_the_mean_of_each_point():
    runs = itertools.product((2, 4), ("tt", "cp"), range(3))
    rows = [{"ratio": r, "method": m, "test_accuracy": 90.0 - r * seed} for r, m, seed in runs]
    pictures = []
    for _ in range(2):
        figure, buffer = common.accuracy_against_ratio(rows, dense=95.0), io.BytesIO()
        figure.savefig(buffer, metadata={"Software": None})
        pictures.append(buffer.getvalue())
    assert pictures[0] == pictures[1]
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in figure.axes[0].get_lines()]
    assert any(np.allclose(values, [88.0, 86.0]) for values in drawn if len(values) == 2)

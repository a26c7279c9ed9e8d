"""Tables: what several seeds give, what is missing, and what markdown would take for its own."""

import pandas as pd

from tdbook import tables


def test_summary_gives_means_and_deviations_of_every_group():
    rows = [
        {"method": m, "ratio": 2, "seed": s, "accuracy": 90.0 + s, "lost": None if m == "a" else 1.0 * s}
        for m in ("b", "a")
        for s in (0, 2)
    ]
    rows.append({"method": "a", "ratio": 4, "seed": 0, "accuracy": 80.0, "lost": 3.0})
    frame = pd.DataFrame(rows)
    found = tables.summary(frame, ["method", "ratio", "absent"], {"accuracy": "acc", "lost": "lost"})
    assert found.index.names == ["method", "ratio"] and found.columns.tolist() == ["acc", "lost", "n"]
    assert found.reset_index().values.tolist() == [
        ["b", 2, "91.00 ± 1.41", "1.00 ± 1.41", 2],
        ["a", 2, "91.00 ± 1.41", "–", 2],
        ["a", 4, "80.00", "3.00", 1],
    ]
    rough = tables.summary(frame, ["method"], ["accuracy", "absent"], digits=0)
    assert rough["accuracy"].tolist() == ["91 ± 1", "87 ± 6"] and "absent" not in rough


def test_summary_of_records_takes_a_metric_before_the_parameter_of_its_name():
    frame = pd.DataFrame({"method": ["a"], "epochs": [8], "metric_epochs": [7.9]})
    assert tables.summary(frame, ["method"], ["epochs"])["epochs"].tolist() == ["7.90"]


def test_markdown_cells_stay_in_their_row():
    text = tables.markdown([{"a": "x|y\nz", "b": 1.23456}, {"a": None, "b": 2}])
    assert text.splitlines()[2:] == ["| x\\|y z | 1.235 |", "| – | 2 |"]

"""The error classes and the message for unknown names."""

import pytest

from tdlib import errors


def test_every_error_is_a_tdlib_error_and_a_value_error():
    for name in ("RankError", "BudgetError", "DataError", "CheckpointError", "NonFiniteError", "UnknownName"):
        assert issubclass(getattr(errors, name), errors.TdlibError)
    assert issubclass(errors.TdlibError, ValueError)


def test_unknown_lists_valid_names_and_the_closest():
    with pytest.raises(errors.UnknownName, match=r"unknown format 'tuker2'\. Did you mean 'tucker2'\?") as e:
        raise errors.unknown("format", "tuker2", ["tucker2", "tt", "cp"])
    assert str(e.value).endswith("Valid names: cp, tt, tucker2.")
    assert "Did you mean" not in str(errors.unknown("format", "zzz", ["tt"]))
    assert "none" in str(errors.unknown("format", 3, []))

"""For all tests."""

import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def terminal():
    """Ctrl-C as in a terminal, also where the tests run in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

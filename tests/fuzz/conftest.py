"""Makes ``fuzz_parts`` importable, and prints what `make fuzz` found."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_parts


def pytest_terminal_summary(terminalreporter):
    if fuzz_parts.MINUTES:
        terminalreporter.write_line("\n" + fuzz_parts.table())

"""Where the repository keeps what the book is made of."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
NOTEBOOKS = ROOT / "notebooks"
PAPERS = BOOK / "papers"
RESULTS = BOOK / "results"
OLD_RESULTS = RESULTS / "old"  # records that feed no verdict
BUILD = BOOK / "_build"

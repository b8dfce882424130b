"""Shared fixtures: where the local test assets lie, and a quiet, deterministic torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["page_fixtures"]
ROOT = Path(__file__).resolve().parents[1]


def assets_folder() -> Path | None:
    """The folder of real tokenizer files and the trained 260K Llama, or None where absent."""
    given = os.environ.get("PELLUCID_ASSETS")
    folder = Path(given) if given else ROOT.parent / "shared" / "assets"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real files that nobody on this project wrote; tests that ask for them skip without."""
    folder = assets_folder()
    if folder is None:
        pytest.skip("no test assets: put them in ../shared/assets or set PELLUCID_ASSETS")
    return folder

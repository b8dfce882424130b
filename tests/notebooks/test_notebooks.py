"""The notebooks of docs/notebooks run, and what they hold is what running them gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
_spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
assert _spec and _spec.loader
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)


@pytest.mark.parametrize("path", run.notebooks(), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_holds(path: Path):
    held, made = json.loads(path.read_text("utf-8")), run.execute(path)
    kinds = []
    for before, now in zip(held["cells"], made["cells"], strict=True):
        if now["cell_type"] == "code":
            assert before["execution_count"] == now["execution_count"], "not executed: run.py does"
            kinds += [output["output_type"] for output in now["outputs"]]
            assert [sorted(each.get("data", each)) for each in before["outputs"]] == [
                sorted(each.get("data", each)) for each in now["outputs"]
            ]
    assert len(kinds) > 4
    assert path.stat().st_size < 600_000


def test_a_cell_that_fails_says_where(tmp_path):
    book = {"cells": [{"cell_type": "code", "source": ["1 / 0"]}]}
    (tmp_path / "bad.ipynb").write_text(json.dumps(book))
    with pytest.raises(ZeroDivisionError) as failed:
        run.execute(tmp_path / "bad.ipynb")
    assert failed.value.__notes__ == ["bad.ipynb, cell 1"]

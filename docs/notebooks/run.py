"""Execute the notebooks in this process and write their outputs into them.

    python docs/notebooks/run.py [NOTEBOOK …]      all of them without one

Each cell runs as in Jupyter: what its last expression gives is shown as HTML, picture or text, by
the object's own `_repr_html_` and `_repr_png_`. No kernel, no further packages.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def notebooks() -> list[Path]:
    """The notebooks, in the order of their numbers."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of running its cells in turn, in an empty folder.

    Raises what a cell raises, with the notebook and the cell's number added.
    """
    book = json.loads(path.read_text("utf-8"))
    scope: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    with _empty_folder():
        for number, cell in enumerate(code, start=1):
            try:
                cell["outputs"] = list(_outputs("".join(cell["source"]), scope, number))
            except Exception as error:
                error.add_note(f"{path.name}, cell {number}")
                raise
            cell["execution_count"] = number
    return book


@contextlib.contextmanager
def _empty_folder() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _outputs(source: str, scope: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """Run a cell; what it printed, and its last expression's value as Jupyter shows it."""
    *statements, last = ast.parse(source).body
    shown = isinstance(last, ast.Expr)
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        body = statements if shown else [*statements, last]
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), scope)
        if shown:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), scope)
    if printed.getvalue():
        yield {"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())}
    if value is not None:
        told = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        yield told | {"data": _shown(value)}


def _shown(value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"text/plain": _lines(repr(value))}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = _lines(value._repr_html_())
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode()
    return data


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(names: list[str]) -> None:
    """Execute and write."""
    for path in [Path(name) for name in names] or notebooks():
        book = execute(path)
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

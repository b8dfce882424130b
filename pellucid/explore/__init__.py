"""Look into a model: a prompt's run, each of its numbers, and what changes when one is changed.

    runs = Runs({"demo": pellucid.load("demo")})
    run = runs.run("demo", "The cat")
    run["layers.3.attn.scores[2,1,0]"]             the number, as the model has it
    cell(run, "layers.3.attn.scores[2,1,0]")       and its arithmetic

A run keeps the residual stream; everything else is computed again when it is asked for, by the
model's own code, and checked against what was kept. ``pellucid serve`` shows all of this as a page.
"""

from __future__ import annotations

from pellucid.explore.cell import Cell, cell
from pellucid.explore.edits import Edit
from pellucid.explore.runs import ExploredRun, Gone, Runs

__all__ = ["Cell", "Edit", "ExploredRun", "Gone", "Runs", "cell"]

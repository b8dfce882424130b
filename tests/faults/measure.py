"""Measure the seeded faults and write the page about them.

    python tests/faults/measure.py > docs/diff-benchmark.md

Takes some minutes on one core. Models: two random ones, the demos, and the trained stories260K
where its files are (`PELLUCID_ASSETS`, or ../shared/assets).
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

import pellucid
from pellucid.diff.selftest.in_features import FEATURES
from pellucid.diff.selftest.run import Table, run_benchmark, run_healthy
from pellucid.diff.selftest.subjects import (
    from_language_model,
    random_features,
    random_gpt2,
    random_llama,
)
from pellucid.diff.selftest.table import by_fault, markdown

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path(os.environ.get("PELLUCID_ASSETS", ROOT.parent / "shared" / "assets"))
DTYPES = ("float32", "bfloat16", "float16")
HEALTHY_RUNS = 60  # of each model in each dtype
PAGE = """# The diff, measured

{faults} realistic faults, each put into a program that is not ours:
`pellucid/diff/selftest/engine.py` is a second implementation of the decoder with a switch for each
mistake, and the weight faults break what it loads. The diff holds our model against it. A
perfect tool names the first tensor that is wrong and what was done (`cause`).

Each fault of the weights or the config runs twice: once with everything visible, where the static
stages must name it before anything runs, and once with nothing but the tensors that the program
computed. A fault of the code alone shows only in the tensors.

In bfloat16 and float16 a fault can change its tensor by less than one rounding. Then the bits of
the values decide (see "Below one rounding" in diff.md); where even these are too few, the table
says "below rounding" (the size is that of the error in float32). What was not found is listed at
the end. Faults "hooks only" are seen as hooks on modules see a model: nothing between the
projections of queries, keys and values and the input of the output projection.

Measured with torch {torch} on the CPU, one thread, on: {models}. This page is the output of

```sh
python tests/faults/measure.py > docs/diff-benchmark.md
```

{table}
{features}
## False alarms

{healthy} runs of healthy ports on random prompts (1 to 60 tokens, 0 to 3 decoding steps, one row or
three of different length; split, permuted and merged products, fused attention, batches of four,
shifted positions), each judged from its tensors alone: **{fired} fired**.
"""

FEATURES_PAGE = """## Features of other families

What a family adds to a Llama can be left out, added, misplaced or read wrongly. Random models with
the features of {families}, in float32, with nothing but the tensors that the program computed
(where a fault lies in the weights, also with everything visible): of {runs} runs {detected} were
detected, {located} at the exact first tensor, {named} with the right cause.

{lines}"""


def features_part(table: Table) -> str:
    """The section about models with other families' features."""
    rows = [row for row in table.rows if not row.control]
    return FEATURES_PAGE.format(
        families=", ".join(dict.fromkeys(row.model.removesuffix("-like") for row in rows)),
        runs=len(rows),
        detected=sum(row.detected for row in rows),
        located=sum(row.located for row in rows),
        named=sum(row.named for row in rows),
        lines=by_fault(table),
    )


def subjects():
    """The models to measure on, those that are here."""
    found = [random_llama(), random_gpt2()]
    sources = {
        **{name: name for name in ("stdlib", "stdlib-gpt2", "demo", "demo-gpt2")},
        "stories260K": ASSETS / "stories260K/hf",
    }
    for name, source in sources.items():
        try:
            found.append(replace(from_language_model(pellucid.load(source)), name=name))
        except (OSError, ValueError) as error:
            print(f"without {name}: {error}", file=sys.stderr)
    return found


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    models = subjects()

    def progress(what: str) -> None:
        print(what, file=sys.stderr)

    table = run_benchmark(models, DTYPES, progress=progress)
    healthy = run_healthy(models, DTYPES, runs=HEALTHY_RUNS, progress=progress)
    featured = run_benchmark(random_features(), ["float32"], FEATURES, [], progress)
    print(page(table, healthy, features_part(featured)), end="")


def page(table: Table, healthy: Table, features: str) -> str:
    """The whole page of one measurement."""
    return PAGE.format(
        faults=len({row.fault for row in table.rows if not row.control}),
        torch=torch.__version__.split("+")[0],
        models=", ".join(dict.fromkeys(row.model for row in table.rows)),
        table=markdown(table),
        features=features,
        healthy=len(healthy.rows),
        fired=sum(not row.right for row in healthy.rows),
    )


if __name__ == "__main__":
    main()

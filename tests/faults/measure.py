"""Measure the seeded faults and write the page about them.

    python tests/faults/measure.py > docs/diff-benchmark.md

Takes an hour and a half on one core. Models: two random ones, the demos, the trained stories260K
where its files are (`PELLUCID_ASSETS`, or ../shared/assets), and smollm2 for weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import pellucid
from pellucid.diff.selftest.changes import CHANGES, CONTROLS, Outcome
from pellucid.diff.selftest.changes import measure as measure_changes
from pellucid.diff.selftest.in_features import FEATURES
from pellucid.diff.selftest.run import Table, run_benchmark, run_healthy
from pellucid.diff.selftest.subjects import (
    Subject,
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
{weights}
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


WEIGHTS_PAGE = """## Changes of weights

{changes} changes of a weight that no rounding and no quantisation explains (scaled, noise, adapters
merged, trained on, damaged groups …), in float32 and bfloat16, and {formats} formats (our own
int8, int6 and int4, llama.cpp's, NF4, float8, GPTQ, bfloat16, float16) as controls, told from the
values alone (`pellucid/diff/selftest/changes.py`). *Excused* is a change that reads as explained,
*accused* a format that does not. Of smollm2 three blocks are taken; its weights come from a file in
Q4_1 and Q8_0, so A itself stands on levels there, and a format of B's that is not a rounding of
the original can read as levels that are not A's. A change that leaves every bit of a bfloat16
weight as it was does not count.

| weights of | dtype | changes | excused | named | formats | accused |
|---|---|---|---|---|---|---|
{lines}

Accused: {accused}.
"""


def weights_part(outcomes: Sequence[Outcome]) -> str:
    """The section about changes of weights."""
    lines, accused = [], []
    for subject, dtype in dict.fromkeys((each.subject, each.dtype) for each in outcomes):
        here = [each for each in outcomes if (each.subject, each.dtype) == (subject, dtype)]
        changes = [each for each in here if not each.control and each.differs]
        formats = [each for each in here if each.control]
        wrong = [each.name for each in formats if each.accused]
        accused += [f"{name} on {subject} in {dtype}" for name in wrong]
        counts = (sum(each.excused for each in changes), sum(each.named for each in changes))
        cells = (subject, dtype, len(changes), *counts, len(formats), len(wrong))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return WEIGHTS_PAGE.format(
        changes=len(CHANGES),
        formats=len(CONTROLS),
        lines="\n".join(lines),
        accused=", ".join(accused) or "none",
    )


def real_model() -> list[Subject]:
    """Three blocks of smollm2, where it is installed."""
    try:
        subject = from_language_model(pellucid.load("smollm2"))
    except (OSError, ValueError) as error:
        print(f"without smollm2: {error}", file=sys.stderr)
        return []
    blocks = ("layers.0.", "layers.1.", "layers.29.")
    weights = {k: x for k, x in subject.weights.items() if k.startswith(blocks)}
    return [replace(subject, name="smollm2", weights=weights)]


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
        **{name: name for name in ("demo", "demo-gpt2")},
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
    outcomes = list(measure_changes([*models, *real_model()]))
    print(page(table, healthy, features_part(featured), weights_part(outcomes)), end="")


def page(table: Table, healthy: Table, features: str, weights: str) -> str:
    """The whole page of one measurement."""
    return PAGE.format(
        faults=len({row.fault for row in table.rows if not row.control}),
        torch=torch.__version__.split("+")[0],
        models=", ".join(dict.fromkeys(row.model for row in table.rows)),
        table=markdown(table),
        features=features,
        weights=weights,
        healthy=len(healthy.rows),
        fired=sum(not row.right for row in healthy.rows),
    )


if __name__ == "__main__":
    main()

"""What guessing tokens from the text itself brings (generate/lookup.py), in turns in one run.

    python benchmarks/lookup.py [--model smollm2] [--dtype bfloat16] [--rounds 3] [--out FILE]

Three greedy texts: a Python file written out again after itself, a passage that is quoted, and
prose that does not repeat. Each is written with guesses and without, in turns; both must be
equal. Told are tokens per pass and how many times as fast the median of the rounds is.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

import pellucid
from pellucid.generate import Sampling, generate_tokens, native

FILE = inspect.getsource(textwrap.TextWrapper._split_chunks) + inspect.getsource(textwrap.dedent)
PASSAGE = (inspect.getdoc(textwrap.TextWrapper) or "")[:900]
PROMPTS = {
    "a file written again": f"{FILE}\n# The same file once more:\n\n{FILE[:120]}",
    "a passage quoted": f"{PASSAGE}\n\nOnce more, word for word:\n\n{PASSAGE[:80]}",
    "prose": "On the first morning of the voyage the captain told the crew about the islands, and",
}


def write(lm: pellucid.LanguageModel, ids: list[int], tokens: int, lookup: bool) -> dict[str, Any]:
    """Seconds of the steps after the first, the tokens, and how many had been guessed."""
    steps = generate_tokens(
        lm.model, [ids], sampling=Sampling(temperature=0.0), max_new_tokens=tokens, fast=True,
        lookup=lookup,
    )  # fmt: skip
    text = list(next(steps))
    begin = time.perf_counter()
    text += [token for step in steps for token in step]
    return {"seconds": time.perf_counter() - begin, "text": text, "guessed": steps.guessed}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    lm = pellucid.load(asked.model, dtype=asked.dtype)
    native.settle(lm.model)
    found: dict[str, Any] = {
        "model": asked.model, "dtype": asked.dtype, "threads": torch.get_num_threads(),
        "instructions": native.library().pellucid_instructions().decode(),
        "machine": platform.processor() or platform.machine(), "texts": {},
    }  # fmt: skip
    for name, prompt in PROMPTS.items():
        ids = lm.encode(prompt)
        runs = {True: [], False: []}
        for _ in range(asked.rounds):
            for lookup in runs:
                runs[lookup].append(write(lm, ids, asked.tokens, lookup))
        if any(run["text"] != runs[False][0]["text"] for run in (*runs[True], *runs[False])):
            sys.stderr.write(f"{name}: the texts differ\n")
            return 1
        guessed = runs[True][-1]["guessed"]
        medians = {on: statistics.median(run["seconds"] for run in runs[on]) for on in runs}
        found["texts"][name] = {
            "tokens_per_pass": (asked.tokens - 1) / (asked.tokens - 1 - guessed),
            "times_as_fast": medians[False] / medians[True],
            "plain_tokens_per_second": (asked.tokens - 1) / medians[False],
        }
    text = json.dumps(found, indent=1)
    sys.stdout.write(text + "\n")
    if asked.out:
        asked.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What guessing tokens brings, from the text itself or by a draft, in turns in one run.

    python benchmarks/lookup.py [--model smollm2] [--dtype bfloat16] [--rounds 3] [--out FILE]
    python benchmarks/lookup.py --draft FOLDER      also with a draft, int4 or a smaller model

Three greedy texts: a Python file written out again after itself, a passage that is quoted, and
prose that does not repeat. Each is written without guesses, with those from the text (lookup.py)
and with those of the draft alone (draft.py), in turns; all must be equal. Told are tokens per pass,
the share of drafted tokens that was accepted, and how many times as fast as without guesses the
median of the rounds is, and the best of them.
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
from pellucid.generate.fast import FastSteps

FILE = inspect.getsource(textwrap.TextWrapper._split_chunks) + inspect.getsource(textwrap.dedent)
PASSAGE = (inspect.getdoc(textwrap.TextWrapper) or "")[:900]
PROMPTS = {
    "a file written again": f"{FILE}\n# The same file once more:\n\n{FILE[:120]}",
    "a passage quoted": f"{PASSAGE}\n\nOnce more, word for word:\n\n{PASSAGE[:80]}",
    "prose": "On the first morning of the voyage the captain told the crew about the islands, and",
}


def write(
    lm: pellucid.LanguageModel, ids: list[int], tokens: int, lookup: bool, draft: Any
) -> dict[str, Any]:
    """Seconds of the steps after the first, the tokens, and how many had been guessed."""
    steps = generate_tokens(
        lm.model, [ids], sampling=Sampling(temperature=0.0), max_new_tokens=tokens, fast=True,
        lookup=lookup, draft=draft,
    )  # fmt: skip
    text = list(next(steps))
    begin = time.perf_counter()
    text += [token for step in steps for token in step]
    seconds = time.perf_counter() - begin
    told = {"guessed": steps.guessed, "proposed": steps.proposed}
    return {"seconds": seconds, "text": text, **told}


def compared(plain: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What guesses brought over `plain`."""
    count, last = len(plain[0]["text"]) - 1, runs[-1]
    times = [[run["seconds"] for run in some] for some in (plain, runs)]
    accepted = last["guessed"] / last["proposed"] if last["proposed"] else None
    return {
        "tokens_per_pass": count / (count - last["guessed"]),
        "drafted": last["proposed"],
        "accepted": accepted,
        "times_as_fast": statistics.median(times[0]) / statistics.median(times[1]),
        "best_over_best": min(times[0]) / min(times[1]),
        "plain_tokens_per_second": count / statistics.median(times[0]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft", help="a folder or name, or int8, int6, int4")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    lm = pellucid.load(asked.model, dtype=asked.dtype)
    native.settle(lm.model)
    ways: dict[str, tuple[bool, Any]] = {"plain": (False, None), "lookup": (True, None)}
    if asked.draft:
        other = lm.draft_model(asked.draft)
        native.settle(other)
        ways["draft"] = (False, FastSteps(other, lm.config.context_length, True))
    found: dict[str, Any] = {
        "model": asked.model, "dtype": asked.dtype, "threads": torch.get_num_threads(),
        "instructions": native.library().pellucid_instructions().decode(),
        "machine": platform.processor() or platform.machine(), "texts": {},
    }  # fmt: skip
    for name, prompt in PROMPTS.items():
        ids = lm.encode(prompt)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(asked.rounds):
            for way, (lookup, draft) in ways.items():
                runs[way].append(write(lm, ids, asked.tokens, lookup, draft))
        plain = runs.pop("plain")
        if any(run["text"] != plain[0]["text"] for some in runs.values() for run in some):
            sys.stderr.write(f"{name}: the texts differ\n")
            return 1
        found["texts"][name] = {way: compared(plain, some) for way, some in runs.items()}
    text = json.dumps(found, indent=1)
    sys.stdout.write(text + "\n")
    if asked.out:
        asked.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

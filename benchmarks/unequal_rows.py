"""Eight prompts of unequal length: shared steps against a padded batch, in turns in one run.

    python benchmarks/unequal_rows.py [--model smollm2] [--dtype bfloat16] [--rounds 3] [--out FILE]

Prompts of 4 to 400 tokens get 8 to 100 new ones, greedily, through `generate_rows`, whose rows join
and leave between steps, and through the padded batch that `generate_tokens` makes of several
prompts: both in C. Told are tokens/s of the new tokens, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import pellucid
from pellucid.generate import Sampling, generate_rows, generate_tokens, native

PROMPTS = (4, 17, 400, 60, 9, 150, 33, 260)
NEW = (100, 24, 12, 64, 8, 40, 90, 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    lm = pellucid.load(asked.model, dtype=asked.dtype)
    native.settle(lm.model)
    some = torch.Generator().manual_seed(0)
    room = lm.config.context_length - max(NEW)
    prompts = [
        torch.randint(0, lm.config.vocab_size, (min(length, room),), generator=some).tolist()
        for length in PROMPTS
    ]
    options: dict[str, Any] = {
        "sampling": Sampling(temperature=0.0), "max_new_tokens": list(NEW), "fast": True
    }  # fmt: skip
    times: dict[str, list[float]] = {"shared": [], "padded": []}
    for _ in range(asked.rounds):
        for way, write in (("shared", generate_rows), ("padded", generate_tokens)):
            begin = time.perf_counter()
            written = sum(
                token is not None for step in write(lm.model, prompts, **options) for token in step
            )
            times[way].append(time.perf_counter() - begin)
            assert written == sum(NEW), "nothing ends a text early"
    medians = {way: statistics.median(some) for way, some in times.items()}
    found = {
        "model": asked.model, "dtype": asked.dtype, "threads": torch.get_num_threads(),
        "instructions": native.library().pellucid_instructions().decode(),
        "machine": platform.processor() or platform.machine(), "prompts": PROMPTS, "new": NEW,
        "tokens_per_second": {way: sum(NEW) / seconds for way, seconds in medians.items()},
        "shared_over_padded": medians["padded"] / medians["shared"],
        "best_over_best": min(times["padded"]) / min(times["shared"]),
    }  # fmt: skip
    text = json.dumps(found, indent=1)
    sys.stdout.write(text + "\n")
    if asked.out:
        asked.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

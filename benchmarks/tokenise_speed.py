"""Tokenising into shards against tiktoken alone, and what loading a batch takes.

    python benchmarks/tokenise_speed.py [TOKENIZER]

The text is this Python's standard library, once as many small files and once as one. Both sides run
in turns in one process, measured in processor time, and the best of the turns counts, so that what
else the machine does matters little. TOKENIZER is a folder with a byte-level BPE (default: demo's).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pellucid import checkpoints, tokenizers
from pellucid.train import Batches, stdlib_documents, tokenise

TURNS = 4
ROWS, CONTEXT, STEPS = 16, 1024, 200


def seconds(work: Callable[[], object]) -> float:
    """Processor time of `work`."""
    began = time.process_time()
    work()
    return time.process_time() - began


def lines() -> Iterator[str]:
    """The table, as it is measured."""
    given = sys.argv[1] if len(sys.argv) > 1 else checkpoints.open_checkpoint("demo").folder
    tokenizer = tokenizers.load(given)
    engine = tokenizer._engine  # tiktoken's own encoding, nothing of ours around it
    texts = [document.text for document in stdlib_documents()]
    whole = "\n".join(texts)
    megabytes = len(whole.encode()) / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "many").mkdir()
        for number, text in enumerate(texts):
            (folder / "many" / f"{number:05}.txt").write_text(text, "utf-8")
        (folder / "one.txt").write_text(whole, "utf-8")
        best: dict[str, float] = {}
        for turn in range(TURNS):
            out = folder / f"tokens-{turn}"
            work = {
                f"tiktoken, {len(texts)} texts": lambda: [*map(engine.encode_ordinary, texts)],
                f"shards, {len(texts)} files": lambda out=out: tokenise(
                    [folder / "many"], tokenizer, out / "many", begin=0, workers=1
                ),
                "tiktoken, one text": lambda: engine.encode_ordinary(whole),
                "shards, one file": lambda out=out: tokenise(
                    [folder / "one.txt"], tokenizer, out / "one", begin=0, workers=1
                ),
            }
            for what, do in work.items():
                best[what] = min(best.get(what, float("inf")), seconds(do))
        yield f"{megabytes:.1f} MB of text, {tokenizer}"
        for what, spent in best.items():
            yield f"{what:24} {megabytes / spent:6.2f} MB/s"
        corpus = tokenise([folder / "one.txt"], tokenizer, folder / "tokens-0" / "one", begin=0)
        for documents in (False, True):
            batches = Batches(
                corpus.training, context=CONTEXT, batch=ROWS, seed=0, documents=documents
            )
            spent = seconds(lambda b=batches: [b.at(step) for step in range(STEPS)]) / STEPS
            what = "masked documents" if documents else "packed"
            rate = ROWS * CONTEXT / spent / 1e6
            yield f"batch {ROWS} x {CONTEXT}, {what:16} {spent * 1e3:.3f} ms, {rate:.0f} M tokens/s"


if __name__ == "__main__":
    for line in lines():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

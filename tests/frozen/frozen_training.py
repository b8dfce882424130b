"""The runs that are frozen: how they were begun, and how to go on with one in another place."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from frozen_files import PLACE, put_back
from torch.optim.optimizer import register_optimizer_step_post_hook

from pellucid.cli import main

HERE = Path(__file__).resolve().parent
STEPS = 20
_SIZES = ["--vocab=270", "--width=12", "--layers=2", "--heads=2", "--context=16"]
_STEPS = [f"--steps={STEPS}", "--batch=4", "--micro-batch=2", "--warmup=2", "--precision=float32"]
_QUIET = ["--eval-every=5", "--sample-every=0", "--save-every=5", "--json"]
_NO_FILES = ["--no-tensorboard", "--no-plot"]
_HALF = ["--stop=10"]
_TEXT = ["train", "--data", f"{PLACE}/text.txt", *_SIZES, *_STEPS, *_QUIET, *_NO_FILES]
# name -> how it is begun, and what makes it end half way
RUNS = {
    "llama": ([*_TEXT, "--kv-heads=1", "--copies=0.25"], _HALF),
    "gpt2-dropout": ([*_TEXT, "--family=gpt2", "--dropout=0.2", "--order=random"], _HALF),
}
_TUNE = ["finetune", f"{PLACE}/llama-wide", f"--steps={STEPS}", "--batch=4", "--warmup=2"]
_TUNE += ["--lr=0.01", "--precision=float32", "--context=48", *_QUIET[:1], "--save-every=10"]
_TUNE += ["--json"]
# finetune has no --stop: these are stopped after step 10 by an interrupt (Ctrl-C)
_LORA = ["--data", f"{PLACE}/answers.jsonl", "--lora=2", "--dtype=float32", "--lora-dropout=0.1"]
FINETUNED = {"lora": ([*_TUNE, *_LORA], ["INTERRUPT"])}
SHARDED = (
    [*_TEXT, "--kv-heads=2", "--parallel=fsdp"],
    _HALF,
)


def sources(folder: Path, name: str) -> Path:
    """A place with what the run `name` reads: its text, or its examples and its model."""
    for file in ("text.txt", "answers.jsonl"):
        shutil.copyfile(HERE / file, folder / file)
    if name in FINETUNED:
        shutil.copytree(HERE / "models" / "llama-wide", folder / "llama-wide")
    return folder


def restored(folder: Path, name: str) -> Path:
    """The kept run `name`, which stopped half way, where it can be gone on with."""
    here = sources(folder.resolve(), name)
    put_back(HERE / "runs" / name, here / "run", here)
    return here / "run"


def begin(argv: list[str], here: Path) -> None:
    """Begin a run in `here`; INTERRUPT among the words stops it after half of its steps."""
    words = [word.replace(PLACE, str(here)) for word in argv if word != "INTERRUPT"]
    if len(words) == len(argv):
        assert main(words) == 0
        return
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == STEPS // 2:
            signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_post_hook(count)
    try:
        assert main(words) == 130
    finally:
        hook.remove()

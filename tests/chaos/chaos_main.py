"""Kills, full disks, damaged files: ``python tests/chaos/chaos_main.py --kills 100``.

Each kind of work is done once undisturbed. Then it is begun again and again, killed with ``kill
-9`` at a moment drawn from a seed, looked at, and finished; what is then there must be what the
undisturbed one made, byte for byte. Work is a fork of this process, which has imported everything,
so that moments of the work are met and not of the imports; two ranks are processes of torchrun.
Status 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo  # what optimisers import on first use

from pellucid import checkpoints, tokenizers
from pellucid.cli import main as pellucid
from pellucid.train.data.shards import open_corpus, tokenise

SHAPE = ["--family=llama", "--vocab=300", "--width=16", "--layers=1", "--heads=2", "--context=32"]
QUIET = ["--sample-every=0", "--no-tensorboard", "--no-plot", "--json"]
LIMIT = 300.0  # seconds that no piece of work takes


@dataclass(frozen=True)
class Work:
    """A kind of work: how it is begun and gone on with, what it makes, what must hold meanwhile.

    begin    called in a process of its own; `out` is where it writes
    go_on    the words that finish what was begun; None: begin again
    made     digest of what is there at the end
    look     AssertionError where a killed process left what nobody may meet
    """

    name: str
    begin: Callable[[Path], int]
    made: Callable[[Path], str]
    look: Callable[[Path], None]
    go_on: Callable[[Path], int] | None = None
    ranks: int = 1


def words(*given: object) -> Callable[[], int]:
    return lambda: pellucid([str(word) for word in given])


def digest(*paths: Path) -> str:
    """SHA-256 of files and of all in folders, with their names."""
    found = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found.update(f"{file.name}\0".encode() + file.read_bytes())
    return found.hexdigest()


def run_files(out: Path) -> str:
    """Weights and optimiser of a run's last checkpoint; not its times."""
    files = [
        *(out / "last").glob("*.safetensors"),
        *(out / "last" / "training").glob("*.safetensors"),
    ]
    return digest(*sorted(files))


def whole_checkpoint(out: Path) -> None:
    """What ``RUN/last`` leads to can be loaded, if there is one."""
    if (out / "last").exists() and (out / "last" / "config.json").exists():
        checkpoints.load_model(checkpoints.open_checkpoint((out / "last").resolve()))
    assert (out / "last").exists() or not (out / "last").is_symlink(), "last leads nowhere"


def whole_or_absent(out: Path) -> None:
    if out.exists():
        checkpoints.load_model(checkpoints.open_checkpoint(out))


def works(folder: Path) -> list[Work]:
    """Every kind of work, over one text and the shipped model."""
    text = folder / "text.py"
    text.write_text("\n".join(f"def one_{n}(x):\n    return x + {n}\n" for n in range(120)))
    train = ["--data", text, *SHAPE, "--steps=12", "--batch=2", "--warmup=1", "--save-every=2",
             "--precision=float32", "--eval-every=6", *QUIET]  # fmt: skip
    tune = ["demo", "--data", text, "--as", "text", "--lora", "2", "--steps", "6", "--batch", "1",
            "--context", "32", "--save-every", "2", "--json"]  # fmt: skip
    ours = tokenizers.load(checkpoints.open_checkpoint("demo").folder)

    def tokens(out: Path) -> int:
        begin = ours.eos_id if ours.eos_id is not None else 0
        try:
            tokenise([text], ours, out, begin=begin, workers=1, shard_bytes=1 << 10)
        except OSError as error:  # as the verbs say it
            print(error, file=sys.stderr)
            return 2
        return 0

    def whole_tokens(out: Path) -> None:
        with contextlib.suppress(ValueError):  # not whole yet, and says so
            open_corpus(out, ours)

    def resume(verb: str) -> Callable[[Path], int]:
        return lambda out: words(verb, "--out", out, "--resume", "--json")()

    return [
        Work("train", lambda out: words("train", "--out", out, *train)(), run_files,
             whole_checkpoint, resume("train")),
        Work("finetune", lambda out: words("finetune", *tune, "--out", out)(), run_files,
             lambda out: None, resume("finetune")),
        Work("convert", lambda out: words("convert", "demo", out, "--to", "meta", "--json")(),
             digest, whole_or_absent),
        Work("quantise", lambda out: words("convert", "demo", out, "--to", "int4", "--json")(),
             digest, whole_or_absent),
        Work("tokenise", tokens, digest, whole_tokens),
        Work("two ranks", lambda out: torchrun("train", "--out", out, *train), run_files,
             whole_checkpoint, lambda out: torchrun("train", "--out", out, "--resume", "--json"),
             ranks=2),
    ]  # fmt: skip


def torchrun(*given: object) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "pellucid"]  # fmt: skip
    os.execv(sys.executable, [*command, *map(str, given)])


class Process:
    """A fork that does some work in a session of its own; what it says goes into a file."""

    def __init__(
        self, work: Callable[[], int], said: Path, prepare: Callable[[], None] = int
    ) -> None:
        self.said = said
        sys.stdout.flush()
        self.id = os.fork()
        if self.id:
            return
        status = 70
        try:
            os.setsid()
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            prepare()
            status = work()
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def wait(self, seconds: float) -> int | None:
        """The exit status, negative for a signal; None where it is still going on."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(self.id, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """A signal to it and to all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.id, number)

    def end(self) -> int:
        """The exit status; a hang is killed and is a mistake."""
        status = self.wait(LIMIT)
        if status is None:
            self.kill()
            self.wait(10)
            raise AssertionError(f"still going on after {LIMIT:g} s")
        return status

    def text(self) -> str:
        return self.said.read_text(errors="replace")[-2000:]


class Known(NamedTuple):
    """A kind of work, what it makes undisturbed, and the seconds it takes."""

    work: Work
    made: str
    seconds: float


def undisturbed(work: Work, folder: Path) -> tuple[str, float]:
    """What the work makes, and the seconds it takes."""
    out, begin = folder / "whole", time.monotonic()
    process = Process(lambda: work.begin(out), folder / "said")
    assert process.end() == 0, process.text()
    return work.made(out), time.monotonic() - begin


def finished(work: Work, out: Path, folder: Path) -> None:
    """Go on with what is there, or begin again where nothing to go on from was written."""
    go_on = work.go_on if work.go_on and (out / "last").exists() else None
    process = Process(lambda: (go_on or work.begin)(out), folder / "said")
    status = process.end()
    if status == 2 and go_on is None and out.exists():  # "is there already": what was begun is told
        shutil.rmtree(out)
        process = Process(lambda: work.begin(out), folder / "said")
        status = process.end()
    assert status == 0, f"status {status}: {process.text()}"


def killed(one: Known, folder: Path, draw: random.Random) -> str:
    """One kill -9, or two in a row; where in the work it fell."""
    (work, made, seconds), out = one, folder / "out"
    moments = [draw.uniform(0, seconds) for _ in range(draw.choice((1, 1, 2)))]
    for moment in moments:
        go_on = work.go_on if work.go_on and (out / "last").exists() else work.begin
        process = Process(lambda go_on=go_on: go_on(out), folder / "said")
        status = process.wait(moment)
        process.kill()
        if status is None:
            process.wait(LIMIT)
        else:
            assert status in (0, 2), f"status {status}: {process.text()}"
        time.sleep(0.3 if work.ranks > 1 else 0.01)  # ranks that lost their agent
        work.look(out)
    finished(work, out, folder)
    assert work.made(out) == made, "another result than undisturbed"
    left = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
    assert not left, f"left behind: {left}"
    return " and ".join(f"{moment:.2f} s" for moment in moments)


def full_disk(one: Known, folder: Path, draw: random.Random) -> str:
    """A file may not grow beyond a size, as on a full disk: one line, and nothing half in place."""
    (work, made, _), out = one, folder / "out"
    size = draw.choice((0, 100, 3000, 20_000, 60_000))

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        os.dup2(told, 2)  # a pipe, which has no size

    reads, told = os.pipe()
    process = Process(lambda: work.begin(out), folder / "said", limited)
    os.close(told)
    with os.fdopen(reads, errors="replace") as pipe:
        said = pipe.read()
    status = process.end()
    assert status in (0, 2) or work.ranks > 1, f"files of {size} bytes: {status}: {said[-1500:]}"
    assert "Traceback" not in said, said[-1500:]
    work.look(out)
    finished(work, out, folder)
    assert work.made(out) == made, "another result than undisturbed"
    return f"files of at most {size} bytes: status {status}"


def asked_to_end(one: Known, folder: Path, draw: random.Random) -> str:
    """SIGTERM: training saves and ends; the run goes on to the same result."""
    (work, made, seconds), out = one, folder / "out"
    moment = draw.uniform(0.2, 0.9) * seconds
    process = Process(lambda: work.begin(out), folder / "said")
    ended = process.wait(moment)
    process.kill(signal.SIGTERM)
    status = process.end() if ended is None else ended
    saved = (out / "last").exists()
    assert status in (0, 130, -signal.SIGTERM), f"status {status}: {process.text()}"
    assert status == -signal.SIGTERM or saved, "ended without a checkpoint"
    assert "Traceback" not in process.text(), process.text()
    finished(work, out, folder)
    assert work.made(out) == made, "another result than undisturbed"
    return f"after {moment:.2f} s: status {status}"


def damaged(one: Known, folder: Path, draw: random.Random) -> str:
    """A bit of the last checkpoint flips: refused, the one before is named, and it goes on."""
    (work, made, _), out = one, folder / "out"
    process = Process(lambda: work.begin(out), folder / "said")
    assert process.end() == 0, process.text()
    last = (out / "last").resolve()
    file = draw.choice(sorted(path for path in last.rglob("*.safetensors")))
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    assert work.go_on is not None, "only runs have a last checkpoint"
    go_on = work.go_on
    process = Process(lambda: go_on(out), folder / "said")
    assert process.end() == 2, process.text()
    said = process.text()
    assert "is whole: to go on from there, ln -sfn" in said, said
    before = said.partition("ln -sfn ")[2].split()[0]
    (out / "last").unlink()
    (out / "last").symlink_to(before)
    finished(work, out, folder)
    assert work.made(out) == made, "another result than undisturbed"
    return file.name


@contextlib.contextmanager
def place(root: Path, name: str) -> Iterator[Path]:
    folder = root / name.replace(" ", "-")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="over all kinds of work")
    parser.add_argument("--more", type=int, default=4, help="full disks, SIGTERMs, damages of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="kinds of work (default: all)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    wrong: list[str] = []
    counts: dict[str, dict[str, int]] = {}
    chosen = [work for work in works(root) if not given.only or work.name in given.only]
    for number, work in enumerate(chosen):
        with place(root, f"{work.name} whole") as folder:
            made, seconds = undisturbed(work, folder)
        kills = (given.kills * (number + 1)) // len(chosen) - (given.kills * number) // len(chosen)
        one = Known(work, made, seconds)
        runs = work.go_on is not None and work.ranks == 1
        tries = {
            killed: kills,
            full_disk: given.more if work.ranks == 1 else 0,
            asked_to_end: given.more if runs else 0,
            damaged: given.more if runs else 0,
        }
        for attempt, times in tries.items():
            for turn in range(times):
                what = f"{work.name}, {attempt.__name__}, --seed {given.seed} turn {turn}"
                with place(root, f"{work.name} {attempt.__name__} {turn}") as folder:
                    try:
                        told = attempt(one, folder, random.Random(what))
                    except AssertionError as error:
                        told = f"WRONG: {error}"
                        wrong.append(f"{what}: {error}")
                print(f"{what}: {told}", file=sys.stderr, flush=True)
            counts.setdefault(attempt.__name__, {})[work.name] = times
    shutil.rmtree(root, ignore_errors=True)
    print(json.dumps({"counts": counts, "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

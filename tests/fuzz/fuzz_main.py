"""Fuzz in a process of its own: ``python tests/fuzz/fuzz_main.py --inputs 20000 --seed 0``.

Each input has a seed of its own, told with what went wrong: ``--only TARGET --seed N --inputs 1``
does the same again. Status 1 where an input raised what no user can cause, took more than 5 s of
processor time, cost more memory than ten times its size and 100 MB, started something, or lost a
file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzz_guard import Guard, Hang, at_most, most_memory
from fuzz_seeds import make_seeds
from fuzz_targets import SHARES, TARGETS, Target

SECONDS = 5.0  # of processor time; twelve times that by the clock
MEMORY = 100 << 20
USERS = (ValueError, OSError, NotImplementedError)  # as pellucid.cli.USER_ERRORS


class Place:
    """Folders: `seeds` with whole files, `here` for one input, `beside` that must stay as it is."""

    def __init__(self, root: Path) -> None:
        self.seeds, self.here, self.beside = (root / name for name in ("seeds", "here", "beside"))
        for folder in (self.seeds, self.here, self.beside):
            folder.mkdir()
        make_seeds(self.seeds)
        (self.beside / "theirs.txt").write_text("not the fuzzer's")
        self._told = self._digest()

    def prepare(self, target: Target) -> None:
        shutil.rmtree(self.here)
        self.here.mkdir()
        for name in target.needs:
            source = self.seeds / name
            if source.is_dir():
                shutil.copytree(source, self.here / name, symlinks=True)
            else:
                shutil.copy2(source, self.here / name)

    def untouched(self) -> bool:
        """Whether nothing outside `here` has changed."""
        return self._digest() == self._told

    def _digest(self) -> str:
        found = hashlib.sha256()
        for folder in (self.seeds, self.beside):
            for path in sorted(folder.rglob("*")):
                content = path.read_bytes() if path.is_file() else b""
                found.update(f"{path.relative_to(folder)}".encode() + b"\0" + content)
        return found.hexdigest()


def one_input(place: Place, guard: Guard, target: Target, seed: int, slow: float) -> str | None:
    """What was wrong with one input; None where it went as it should."""
    draw = random.Random(f"{target.name} {seed}")
    with guard.of_own():
        place.prepare(target)
        what = target.damage(place.here, draw)
        size = sum(path.stat().st_size for path in place.here.rglob("*") if path.is_file())
    before, guard.started, wrong = most_memory(), [], None
    begin = time.process_time()
    try:
        with at_most(SECONDS * slow):
            target.read(place.here, draw)
    except Hang as hang:
        wrong = f"{hang}\n{traceback.format_exc(limit=-4)}"
    except USERS:
        pass  # one line, as pellucid.cli says it
    except BaseException:
        wrong = traceback.format_exc(limit=-6)
    taken = most_memory() - before
    if guard.started:
        wrong = f"started {guard.started}"
    elif (place.here / "executed").exists() or Path("executed").exists():
        wrong = "executed what a file said"
    elif wrong is None and taken > MEMORY + 10 * size:
        wrong = f"took {taken / 1e6:.0f} MB for files of {size / 1e6:.2f} MB"
    if wrong is None:
        return None
    seconds = time.process_time() - begin
    return f"{target.name} --seed {seed}: {wrong}\n  input: {what} ({seconds:.1f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=sorted(TARGETS))
    parser.add_argument("--slow", type=float, default=1.0, help="factor on the 5 seconds")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long; 0: never")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    import torch

    torch.set_num_threads(1)
    chosen = [TARGETS[name] for name in given.only or TARGETS]
    weights = [SHARES.get(target.name, 1.0) for target in chosen]
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TMPDIR", "HOME"):
        (root / name).mkdir()
        os.environ[name] = str(root / name)
    tempfile.tempdir = str(root / "TMPDIR")
    place = Place(root)
    os.chdir(place.here)
    sys.stdin = open(os.devnull)  # noqa: SIM115  for verbs that read a prompt
    warm(place, chosen)
    guard = Guard(root)
    wrong: list[str] = []
    counts = dict.fromkeys(TARGETS, 0)
    end = time.monotonic() + (given.seconds or float("inf"))
    for number in range(given.inputs):
        if time.monotonic() > end:
            break
        seed = given.seed + number
        (target,) = random.Random(seed).choices(chosen, weights)
        counts[target.name] += 1
        found = one_input(place, guard, target, seed, given.slow)
        if found:
            wrong.append(found)
            print(found, file=sys.stderr, flush=True)
        if number % 50 == 49 and not place.untouched():
            wrong.append(f"before --seed {seed}: a file outside the input's folder has changed")
            break
    if not place.untouched():
        wrong.append("a file outside the inputs' folder has changed")
    report = {"inputs": sum(counts.values()), "wrong": wrong, "landlock": guard.kernel}
    print(json.dumps(report | {"counts": counts}))
    with guard.of_own():
        os.chdir("/")
        shutil.rmtree(root, ignore_errors=True)
    return 1 if wrong else 0


def warm(place: Place, chosen: list[Target]) -> None:
    """Read each kind whole once: imports and pools are no cost of an input."""
    refused = []
    for target in chosen:
        place.prepare(target)
        for seed in range(2):
            try:
                target.read(place.here, random.Random(seed))
            except USERS as error:
                refused += [f"{target.name}: {error}"] if target.damaged else []
            except AssertionError as error:
                refused.append(f"{target.name}: {error}")
    assert not refused, f"whole files are refused: {refused}"


if __name__ == "__main__":
    sys.exit(main())

"""One engine in a process of its own: a JSON object per line in, one per line out.

    → {"do": "load", "rows": [[5, 9, …]], "new": 64}      prepare, and the first token
    ← {"seconds": 0.41, "facts": {"decode_bytes": …, "settings": …}}
    → {"do": "warm", "rows": [[5, 9, …]], "new": 64}      once through, then settle
    → {"do": "prefill", "rows": [[5, 9, …]], "new": 64}   the prefill timed; 64 steps may follow
    → {"do": "decode", "steps": 16}                       the next 16 of them timed
    ← {"seconds": 1.3, "tokens": [[17], [4], …], "peak_bytes": …, "idle_share": 0.0}
    → {"do": "bandwidth"}, {"do": "gemm", …}              of the engine called "machine"
    ← {"error": "…"}                                      for anything that goes wrong

``python -m pellucid.bench.worker ENGINE PATH THREADS``. A process of its own means clean thread
settings and an honest peak of memory, a peer may live in another interpreter, and between its turns
a worker sleeps on its input. `idle_share` is the processor time it took while it should have been
asleep, per second: threads that spin would spoil the turns of the others.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

_STATUS = Path("/proc/self/status")


class _EngineCommands:
    """What can be asked of an engine."""

    def __init__(self, name: str, path: Path, threads: int) -> None:
        from pellucid.bench.engines import make

        self._engine = make(name, path, threads)

    def load(self, rows: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
        """Prepare and give a first token; the seconds of both together."""
        start = time.perf_counter()
        facts = self._engine.prepare()
        prepared = time.perf_counter()
        self._engine.prefill(rows, new)
        end = time.perf_counter()
        return {"seconds": end - start, "prepare_seconds": prepared - start, "facts": facts}

    def warm(self, rows: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
        """Decode once, and bring the engine to the state of a process that has run for long."""
        self._engine.prefill(rows, new)
        self._engine.decode(new)
        start = time.perf_counter()
        self._engine.settle()
        return {"seconds": time.perf_counter() - start}

    def prefill(self, rows: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
        """Time the prefill."""
        start = time.perf_counter()
        first = self._engine.prefill(rows, new)
        return {"seconds": time.perf_counter() - start, "tokens": [first]}

    def decode(self, steps: int) -> dict[str, Any]:
        """Time the next steps after a prefill."""
        start = time.perf_counter()
        tokens = self._engine.decode(steps)
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def close(self) -> dict[str, Any]:
        """Give the memory back."""
        self._engine.close()
        return {}


class _MachineCommands:
    """What can be asked of the machine."""

    def __init__(self, threads: int) -> None:
        from pellucid.bench.machine import Machine

        self._machine = Machine(threads)

    def bandwidth(self, repeats: int) -> dict[str, Any]:
        """Bytes/s that a plain sum reads."""
        return self._machine.bandwidth(repeats)

    def gemm(self, dtype: str, sizes: Sequence[int]) -> dict[str, Any]:
        """FLOP/s of a matrix product."""
        return self._machine.gemm(dtype, tuple(sizes))

    def close(self) -> dict[str, Any]:
        """Nothing to release: memory goes with the object."""
        return {}


def serve(commands: Any, lines: TextIO, replies: TextIO) -> None:
    """Answer line by line until "close" or the end of the input."""
    busy_until, wall_until = time.process_time(), time.perf_counter()
    idle_cpu = idle_wall = 0.0
    for line in lines:
        idle_cpu += time.process_time() - busy_until
        idle_wall += time.perf_counter() - wall_until
        command = json.loads(line)
        wanted = command.pop("do")
        try:
            ask: Callable[..., dict[str, Any]] = getattr(commands, wanted)
            reply = ask(**command)
        except Exception as error:  # reported as the reply; the worker goes on
            reply = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        share = idle_cpu / idle_wall if idle_wall > 0 else 0.0
        reply |= {"peak_bytes": peak_memory(), "idle_share": share}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        busy_until, wall_until = time.process_time(), time.perf_counter()
        if wanted == "close":
            return


def peak_memory() -> int:
    """The largest resident set of this process, bytes; mapped files count.

    From /proc where there is one: ``ru_maxrss`` of a child begins at its parent's size.
    """
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def answer(begin: Callable[[], Any]) -> None:
    """Say that it is ready, or why not, then serve what `begin` makes on the standard streams."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand between the replies
    try:
        commands = begin()
    except Exception as error:
        replies.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    replies.write(json.dumps({"ready": True, "resident_bytes": peak_memory()}) + "\n")
    replies.flush()
    serve(commands, sys.stdin, replies)


def main(argv: Sequence[str]) -> None:
    """Serve the engine that the command line names."""
    name, path, threads = argv[0], Path(argv[1]), int(argv[2])
    if name == "machine":
        answer(lambda: _MachineCommands(threads))
    else:
        answer(lambda: _EngineCommands(name, path, threads))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The workers, seen from the orchestrator: started when asked for, kept while memory allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pellucid

_PACKAGE_ROOT = str(Path(pellucid.__file__).resolve().parents[1])
_STOP_SECONDS = 10


class WorkerError(RuntimeError):
    """A worker that could not do what it was asked, with its own words."""


class Worker:
    """A process that answers commands as `pellucid.bench.worker.serve` does.

    start_seconds   until it was ready: the interpreter and its imports
    resident_bytes  what it took by then
    """

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `close`
        start = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=worker_environment(threads),
        )
        try:
            reply = self._receive()
        except WorkerError:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - start
        self.resident_bytes: int = reply["resident_bytes"]

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its reply; WorkerError with what went wrong."""
        try:
            _pipe(self._process.stdin).write(json.dumps({"do": do, **arguments}) + "\n")
            _pipe(self._process.stdin).flush()
        except BrokenPipeError:
            raise WorkerError(f"{self.name}: the worker has died; {self._last_words()}") from None
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise WorkerError(f"{self.name}: the worker has died; {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}: {reply['error']}")
        return reply

    def _last_words(self) -> str:
        """The last line it wrote on its standard error, and its exit status."""
        status = self._process.wait(_STOP_SECONDS)
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"exit status {status}{': ' + lines[-1] if lines else ''}"

    def close(self) -> None:
        """Ask it to end, and end it where it does not; harmless when it is gone already."""
        try:
            if self._process.poll() is None:
                self.ask("close")
                self._process.wait(_STOP_SECONDS)
        except (WorkerError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            for pipe in (self._process.stdin, self._process.stdout, self._log):
                if pipe is not None:
                    pipe.close()


def engine_worker(name: str, path: Path, threads: int, python: str = sys.executable) -> Worker:
    """A worker for one of the engines, or for the engine called "machine"."""
    command = [python, "-m", "pellucid.bench.worker", name, str(path), str(threads)]
    return Worker(name, command, threads)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "the worker's streams are pipes"
    return pipe


def worker_environment(threads: int) -> dict[str, str]:
    """The environment of a worker: its threads, this Pellucid, no network."""
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PELLUCID_THREADS")
    path = os.pathsep.join(filter(None, [_PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")]))
    return {
        **os.environ,
        **dict.fromkeys(counts, str(threads)),
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Workers:
    """Workers by name, at most `budget` bytes of them at a time.

    Engines take turns in a fixed order, so the one used last is needed again latest: it is the
    first to go where another does not fit.
    """

    def __init__(
        self, start: Callable[[str], Worker], sizes: Mapping[str, int], budget: int
    ) -> None:
        """start(name) gives a worker ready for its turns; `sizes` are their bytes, roughly."""
        self._start, self._sizes, self._budget = start, sizes, budget
        self._workers: dict[str, Worker] = {}  # the one used last stands last

    def worker(self, name: str) -> Worker:
        """The worker called `name`, started if need be."""
        held = self._workers.pop(name, None)
        if held is None:
            while self._workers and self._bytes_in_use() + self._sizes[name] > self._budget:
                self._workers.popitem()[1].close()
            held = self._start(name)
        self._workers[name] = held
        return held

    def fits(self, names: Iterable[str]) -> bool:
        """Whether all of these may be held at the same time."""
        return sum(self._sizes[name] for name in names) <= self._budget

    def _bytes_in_use(self) -> int:
        return sum(self._sizes[name] for name in self._workers)

    def dismiss(self, name: str) -> None:
        """End a worker; nothing happens where there is none."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """End them all."""
        for name in list(self._workers):
            self.dismiss(name)

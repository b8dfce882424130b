"""The turns: every engine a little at a time, A B C A B C …, the limit read around each turn.

A turn lasts a second or so, so what the machine does meanwhile (another guest, a slower clock)
falls on all engines alike, and a ratio of two of them means something even where neither number
does. Decoding is cut into `slices`: each engine keeps its place in its text while the others have
their turns. The limit of a turn is measured right before and right after it; the larger one counts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pellucid.bench.candidates import Candidate, files_for, size_of, weight_files
from pellucid.bench.crew import Worker, WorkerError, Workers, engine_worker
from pellucid.models import Config
from pellucid.system import cores

MEASURES = ("decode", "prefill", "batched")
_FIRST_PROMPT = 8  # tokens of the prompt whose first token ends the load time
_OVERHEAD_BYTES = 600 << 20  # of a worker beside its weights: interpreter, libraries, activations
_BLOCK = 16 << 20


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """What is measured, how often.

    rounds    times that each measure is begun anew
    slices    turns that a decoding is cut into, where all engines fit into memory together
    loads     fresh starts of each engine, timed to the first token
    prompt    tokens before decoding; `new` tokens are then decoded
    prefill   tokens of the prompt whose prefill is timed
    batch     rows that decode together; `batch_new` tokens each
    repeats   readings of the bandwidth, before and after each turn
    gemm      sizes of the matrix products
    threads   of every engine and of the limits
    measures  which of MEASURES
    """

    rounds: int = 2
    slices: int = 4
    loads: int = 1
    prompt: int = 128
    new: int = 64
    prefill: int = 512
    batch: int = 8
    batch_new: int = 16
    repeats: int = 3
    gemm: tuple[int, ...] = (1024, 2048, 4096)
    threads: int = 0
    measures: tuple[str, ...] = MEASURES

    def __post_init__(self) -> None:
        for measure in self.measures:
            if measure not in MEASURES:
                raise ValueError(f"unknown measure {measure!r}: expected {', '.join(MEASURES)}")
        for name in (
            "rounds",
            "slices",
            "prompt",
            "new",
            "prefill",
            "batch",
            "batch_new",
            "repeats",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        for name in ("loads", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more")
        if not self.threads:
            object.__setattr__(self, "threads", cores())

    def fitted(self, config: Config) -> BenchPlan:
        """The plan cut to a model's context; ValueError where not even a token fits."""
        room = config.context_length
        if room < 8:
            raise ValueError(f"a context of {room} tokens is too short to measure: expected 8")
        new = min(self.new, room // 4)
        return replace(
            self,
            new=new,
            batch_new=min(self.batch_new, new),
            prompt=min(self.prompt, room - new - 2),
            prefill=min(self.prefill, room - 3),
        )


def bench_plan(*, quick: bool, **stated: Any) -> BenchPlan:
    """The usual plan, or a quick one, with what is stated in it; None states nothing."""
    given = {name: value for name, value in stated.items() if value is not None}
    return replace(QUICK if quick else BenchPlan(), **given)


QUICK = BenchPlan(rounds=1, slices=1, new=16, batch_new=8, repeats=2, gemm=(1024, 2048))


class Rounds:
    """One run of the bench: `run` fills `record`, which is plain data and complete at any time."""

    def __init__(
        self,
        config: Config,
        candidates: Sequence[Candidate],
        plan: BenchPlan,
        home: Path,
        budget: int,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """home    folder for the files of this shape
        budget  bytes that the workers may take together
        say     told what happens, for a progress line
        """
        self._config, self._home = config, home
        self._say = say or (lambda text: None)
        self.plan = plan.fitted(config)
        self._candidates = {candidate.spec.name: candidate for candidate in candidates}
        self._paths: dict[str, Path] = {}
        self._warm: set[tuple[Worker, str]] = set()
        self._round = 0
        sizes = {name: self._size(name) for name in self._candidates}
        self._crew = Workers(self._start, sizes, budget)
        self.record: dict[str, Any] = {
            "settings": asdict(self.plan),
            "limits": {},
            "engines": {},
            "skipped": {},
            "turns": [],
        }

    def run(self) -> None:
        """All rounds; an engine that fails is left out from there on and its words are kept."""
        with closing(engine_worker("machine", self._home, self.plan.threads)) as self._machine:
            try:
                self._measure_limits()
                self.write_files()
                for number in range(self.plan.rounds):
                    self._round = number
                    self._one_round()
            finally:
                self._crew.close()

    def _size(self, name: str) -> int:
        numbers = _parameters(self._config)
        return int(numbers * self._candidates[name].spec.bits / 8) + _OVERHEAD_BYTES

    def _measure_limits(self) -> None:
        self._say("the machine: bandwidth and matrix product")
        limits = self.record["limits"]
        limits["bandwidth"] = self._machine.ask("bandwidth", repeats=self.plan.repeats + 2)
        limits["gemm"] = {dtype: self._gemm(dtype, self.plan.gemm) for dtype in self._dtypes()}

    def _dtypes(self) -> list[str]:
        return sorted({candidate.spec.dtype for candidate in self._candidates.values()})

    def _gemm(self, dtype: str, sizes: Sequence[int]) -> dict[str, Any]:
        return self._machine.ask("gemm", dtype=dtype, sizes=list(sizes))

    def write_files(self) -> None:
        """Everything the engines read, unless it is there; those it cannot be written for go."""
        for name in list(self._candidates):
            self._say(f"{name}: its files")
            try:
                self._paths[name] = files_for(self._candidates[name], self._home, self._config)
            except (ValueError, WorkerError) as error:
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        self.record["skipped"][name] = str(error)
        del self._candidates[name]
        self._crew.dismiss(name)

    def _one_round(self) -> None:
        for measure in ("load", *self.plan.measures):
            do = {"load": self._load, "prefill": self._prefill}.get(measure)
            if do is None:
                self._decode(measure)
                continue
            for name in list(self._candidates):
                self._attempt(name, measure, do)

    def _attempt(self, name: str, measure: str, do: Callable[..., None], *given: Any) -> None:
        """One engine's turn; an engine that fails is left out of later turns."""
        self._say(f"round {self._round + 1} of {self.plan.rounds}: {measure}, {name}")
        try:
            do(name, *given)
        except WorkerError as error:
            self._leave_out(name, error)

    def _load(self, name: str) -> None:
        if self._round < self.plan.loads:
            self._crew.dismiss(name)
            self._crew.worker(name)  # `_start` notes it

    def _start(self, name: str) -> Worker:
        """A worker that has given a first token; the way there is a turn of its own."""
        candidate, path = self._candidates[name], self._paths[name]
        read_seconds = read_once(path)
        worker = engine_worker(name, path, self.plan.threads, candidate.python)
        try:
            reply = worker.ask("load", rows=self._rows(1, _FIRST_PROMPT), new=1)
        except WorkerError:
            worker.close()
            raise
        known = self.record["engines"].setdefault(name, {})
        known |= {
            **reply.pop("facts"),
            "dtype": candidate.spec.dtype,
            "loads": candidate.spec.loads,
            "python": candidate.python,
            "file_bytes": size_of(path),
        }
        self._note(
            name,
            "load",
            self._round,
            reply,
            read_seconds=read_seconds,
            start_seconds=worker.start_seconds,
            imports_bytes=worker.resident_bytes,
        )
        return worker

    def _prefill(self, name: str) -> None:
        worker, rows = self._crew.worker(name), self._rows(1, self.plan.prefill)
        if (worker, "prefill") not in self._warm:
            worker.ask("prefill", rows=rows, new=1)
            self._warm.add((worker, "prefill"))
        self._turn(name, "prefill", self._round, self.plan.prefill, rows=rows, new=1)

    def _decode(self, measure: str) -> None:
        """Every engine reads the prompt, then they decode in turns, a slice at a time."""
        new = self.plan.batch_new if measure == "batched" else self.plan.new
        together = self._crew.fits(self._candidates)
        slices = min(self.plan.slices, new) if together else 1
        ends = [new * (number + 1) // slices for number in range(slices)]
        if together:
            for name in list(self._candidates):
                self._attempt(name, measure, self._begin_decoding, measure, new)
        for number, (begin, end) in enumerate(pairwise([0, *ends])):
            for name in list(self._candidates):
                if not together:
                    self._attempt(name, measure, self._begin_decoding, measure, new)
                if name in self._candidates:
                    turn = self._round * slices + number
                    self._attempt(name, measure, self._decode_slice, measure, turn, end - begin)

    def _begin_decoding(self, name: str, measure: str, new: int) -> None:
        """Read the prompt; a fresh worker decodes once untimed before it does, and settles."""
        worker = self._crew.worker(name)
        rows = self._rows(self.plan.batch if measure == "batched" else 1, self.plan.prompt)
        if (worker, measure) not in self._warm:
            settling = worker.ask("warm", rows=rows, new=new)["seconds"]
            self.record["engines"][name].setdefault("settle_seconds", settling)
            self._warm.add((worker, measure))
        worker.ask("prefill", rows=rows, new=new)

    def _decode_slice(self, name: str, measure: str, turn: int, steps: int) -> None:
        rows = self.plan.batch if measure == "batched" else 1
        self._turn(name, measure, turn, rows * steps, steps=steps)

    def _turn(self, name: str, measure: str, turn: int, tokens: int, **given: Any) -> None:
        """So many tokens, timed between two readings of the limit."""
        worker = self._crew.worker(name)
        before = self._limit(name, measure)
        reply = worker.ask("prefill" if measure == "prefill" else "decode", **given)
        limits = [before, self._limit(name, measure)]
        per_second = tokens / reply["seconds"]
        self._note(name, measure, turn, reply, per_second=per_second, limits=limits)

    def _limit(self, name: str, measure: str) -> float:
        """Bytes/s for what decodes, FLOP/s in the engine's number type for a prefill."""
        if measure == "prefill":
            size = min(2048, max(self.plan.gemm))
            return self._gemm(self._candidates[name].spec.dtype, [size])["best"]
        return self._machine.ask("bandwidth", repeats=self.plan.repeats)["best"]

    def _rows(self, count: int, tokens: int) -> list[list[int]]:
        """The same random token ids for every engine."""
        draw = random.Random(f"{count} {tokens}")
        return [
            [draw.randrange(self._config.vocab_size) for _ in range(tokens)] for _ in range(count)
        ]

    def _note(self, name: str, measure: str, turn: int, reply: dict[str, Any], **more: Any) -> None:
        # The first round's tokens tell whether engines agree; those of the others add nothing.
        tokens = reply.pop("tokens", None)
        if tokens is not None and self._round == 0:
            known = self.record["engines"][name].setdefault("tokens", {})
            known.setdefault(measure, []).extend(tokens)
        about = {"at": time.time(), "round": turn, "engine": name, "measure": measure}
        self.record["turns"].append({**about, **reply, **more})


def _parameters(config: Config) -> int:
    from pellucid.models.census import census

    return census(config).total


def read_once(path: Path) -> float:
    """Seconds to read the weight files once from the file cache (a first reading fills it)."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        for file in weight_files(path):
            with file.open("rb", buffering=0) as opened:
                block = bytearray(_BLOCK)
                while opened.readinto(block):
                    pass
        seconds = time.perf_counter() - start
    return seconds

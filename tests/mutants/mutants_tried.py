"""Where mutants are tried: for each module a process that has collected the module's tests.

Importing and collecting take seconds, a test that notices a mutant mostly less than one. So a fork
of that process gets the mutant's code put into the module's functions and runs the tests that run
the changed line, themselves or in a fixture of theirs, the quickest first. What runs at import (a
constant, a field of a class, a function that is called while the tests are collected) is changed in
the file, and a new process imports it and runs all of the module's tests.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, Protocol

import pytest


class Change(Protocol):
    """What is tried; see mutants_main.Mutant."""

    @property
    def statement(self) -> range: ...
    @property
    def inside(self) -> bool: ...
    @property
    def source(self) -> str: ...


class Collected:
    """The tests of one module, collected in a process that waits for mutants.

    file   the module, in a copy of the project
    tests  paths of its tests in that copy
    """

    def __init__(self, file: Path, tests: Sequence[str]) -> None:
        self.file, self.tests = file, [*tests]
        self.home = next(parent.parent for parent in file.parents if parent.name == "pellucid")
        self.told = self.home / f"{file.stem}-{os.getpid()}-{id(self)}.json"
        self._whole = file.read_text("utf-8")
        self._ask, self._answers = self._started()
        self.seconds: dict[str, float] = {}  # of each test
        self.lines: dict[str, list[int]] = {}  # of the module, that each test runs; "": collecting

    def pass_as_they_are(self, seconds: float) -> bool:
        """Whether the tests pass without a mutant; what each costs and runs is kept."""
        if not self._passes(None, seconds):
            return False
        self.seconds, self.lines = json.loads(self.told.read_text())
        return True

    def pass_with(self, mutant: Change) -> bool:
        """Whether the tests pass with a mutant; a hang is noticed as well as a failure."""
        order = sorted(self.seconds, key=self.seconds.__getitem__)
        chosen = [test for test in order if self._runs(test, mutant.statement)]
        ask = {"source": mutant.source, "order": chosen, "limits": self.seconds}
        seconds = 20 + 2 * sum(self.seconds.values())
        self.file.write_text(mutant.source, "utf-8")
        try:
            if mutant.inside and not self._runs("", mutant.statement):
                return not chosen or self._passes(ask, seconds)
            anew = Collected(self.file, self.tests)
            try:
                return anew._passes(ask | {"source": None, "order": order}, seconds)
            finally:
                anew._ask.close()
        finally:
            self.file.write_text(self._whole, "utf-8")

    def _runs(self, test: str, statement: range) -> bool:
        return not set(statement).isdisjoint(self.lines[test])

    def _passes(self, ask: dict[str, Any] | None, seconds: float) -> bool:
        with contextlib.suppress(BrokenPipeError):  # a mutant that ends the tests' collecting
            self._ask.write(json.dumps([ask, seconds]) + "\n")
            self._ask.flush()
        return self._answers.readline() == "True\n"

    def _started(self) -> tuple[Any, Any]:
        """Begin the process; the pipes to it and from it."""
        ask, asks = os.pipe()
        answer, answers = os.pipe()
        if os.fork():
            os.close(ask)
            os.close(answers)
            return open(asks, "w"), open(answer)
        os.setsid()
        os.close(asks)
        os.close(answer)
        os.chdir(self.home)
        sys.path.insert(0, str(self.home))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        plugin = Trying(self.file, self._whole, self.told, os.fdopen(ask), os.fdopen(answers, "w"))
        words = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", "not peers and not long"]
        status = 1
        try:
            status = int(pytest.main([*words, *self.tests], [plugin]))
        finally:
            os._exit(status)


# A function's lines are noted in its first so many calls of a test: to note them takes long.
MOST_CALLS = 300


class Trying:
    """The pytest plugin of that process: once tests are collected, each fork runs them."""

    def __init__(self, file: Path, whole: str, told: Path, asks: Any, answers: Any) -> None:
        self.file, self.whole, self.told = file, whole, told
        self._name = str(file)
        self.asks, self.answers = asks, answers
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, list[int]] = {}
        self.limits: dict[str, float] = {}  # of tests with a mutant, in processor seconds
        self._of_fixtures: dict[int, set[int]] = {}
        self._calls: dict[CodeType, int] = {}
        self._seen: set[int] = set()
        self._watching = True
        self._watch(True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        self._watch(False)
        self.lines[""] = sorted(self._seen)
        for line in self.asks:
            ask, seconds = json.loads(line)
            child = os.fork()
            if child == 0:
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
                if ask is not None:
                    self._prepare(session, **ask)
                return  # pytest goes on with the tests, in this fork
            self.answers.write(f"{_ended_well(child, seconds)}\n")
            self.answers.flush()
        os._exit(0)

    def _prepare(
        self,
        session: pytest.Session,
        source: str | None,
        order: list[str],
        limits: dict[str, float],
    ) -> None:
        self._watching, self.limits = False, limits
        place = {test: number for number, test in enumerate(order)}
        session.items[:] = [item for item in session.items if item.nodeid in place]
        session.items.sort(key=lambda item: place[item.nodeid])
        session.testscollected = len(session.items)
        if source is not None:
            put_code_in(self.file, self.whole, source)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if not self._watching:  # one that hangs is killed by this timer, which nothing catches
            signal.setitimer(signal.ITIMER_PROF, 5 + 10 * self.limits[item.nodeid])
            return (yield)
        begin = time.process_time()
        self._watch(True)
        try:
            return (yield)
        finally:
            self._watch(False)
            self.seconds[item.nodeid] = time.process_time() - begin
            of_test = getattr(item, "_fixtureinfo", None)
            for fixtures in of_test.name2fixturedefs.values() if of_test is not None else ():
                self._seen.update(*(self._of_fixtures.get(id(each), ()) for each in fixtures))
            self.lines[item.nodeid] = sorted(self._seen)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """What a fixture of several tests runs, each of these runs."""
        if not self._watching or fixturedef.scope == "function":
            return (yield)
        before, self._seen = self._seen, set()
        try:
            return (yield)
        finally:
            self._of_fixtures.setdefault(id(fixturedef), set()).update(self._seen)
            self._seen |= before

    def pytest_sessionfinish(self) -> None:
        if self._watching:
            self.told.write_text(json.dumps([self.seconds, self.lines]), "utf-8")

    def _watch(self, on: bool) -> None:
        if on:
            self._seen, self._calls = set(), {}
        threading.settrace(self._call if on else None)
        sys.settrace(self._call if on else None)

    def _call(self, frame: FrameType, event: str, given: Any) -> Any:
        code = frame.f_code
        if code.co_filename != self._name:
            return None
        self._calls[code] = self._calls.get(code, 0) + 1
        return self._line if self._calls[code] <= MOST_CALLS else None

    def _line(self, frame: FrameType, event: str, given: Any) -> Any:
        self._seen.add(frame.f_lineno)
        return self._line


def put_code_in(file: Path, before: str, after: str) -> None:
    """Give the functions that were imported from `before` the code that `after` has for them."""
    old, new = (list(_codes(compile(text, file, "exec", dont_inherit=True)))
                for text in (before, after))  # fmt: skip
    assert len(old) == len(new), f"{file}: a mutant with other functions"
    changed = {was: now for was, now in zip(old, new, strict=True) if was != now}
    for each in gc.get_objects():
        if type(each) is FunctionType and each.__code__ in changed:
            each.__code__ = changed[each.__code__]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _ended_well(child: int, seconds: float) -> bool:
    """Whether a fork's tests pass; one that waits takes no processor time, and is ended."""
    end = time.monotonic() + 10 * seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False

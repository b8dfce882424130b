"""Counters in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pellucid.serve.queue import ServedModel


class Metrics:
    """What was asked, answered and written since the start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (path, status)
        self.read: Counter[str] = Counter()  # tokens of prompts, by model
        self.written: Counter[str] = Counter()

    def count(self, model: str, read: int, written: int) -> None:
        """Tokens of a request."""
        self.read[model] += read
        self.written[model] += written

    def text(self, engines: Iterable[ServedModel]) -> str:
        """All of it, a line a number."""
        engines = list(engines)
        lines = [
            *_head("requests_total", "counter", "requests answered"),
            *(
                f'pellucid_requests_total{{path="{_escaped(path)}",status="{status}"}} {count}'
                for (path, status), count in sorted(self.requests.items())
            ),
        ]
        rows = (
            ("prompt_tokens_total", "counter", "tokens read", lambda e: self.read[e.name]),
            ("new_tokens_total", "counter", "tokens written", lambda e: self.written[e.name]),
            ("drafted_tokens_total", "counter", "tokens drafted", lambda e: e.together.proposed),
            ("guessed_tokens_total", "counter", "guesses accepted", lambda e: e.together.guessed),
            ("turns_total", "counter", "turns of requests", lambda e: e.turns),
            ("requests_live", "gauge", "requests that take turns", lambda e: e.live),
            ("requests_waiting", "gauge", "requests that wait", lambda e: e.waiting),
        )
        for name, kind, what, value in rows:
            lines += _head(name, kind, what)
            for engine in engines:
                model = _escaped(engine.name)
                lines.append(f'pellucid_{name}{{model="{model}"}} {value(engine)}')
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP pellucid_{name} {what}", f"# TYPE pellucid_{name} {kind}"]


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

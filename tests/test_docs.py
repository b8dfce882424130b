"""What README and docs show is run here: their commands, their Python and what both print.

A ``console`` block holds commands after ``$`` and what they print; a ``pycon`` block an interpreter
session. In the expected text ``…`` stands for anything. A block after the comment
``<!-- not run: REASON -->`` is left alone.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

import pellucid
from pellucid.cli import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<mark><!-- not run: .+? -->\s*)?^```(?P<kind>console|pycon)\n(?P<body>.*?)^```",
    re.M | re.S,
)


def blocks(page: Path, kind: str) -> list[str]:
    found = BLOCK.finditer(page.read_text("utf-8"))
    return [match["body"] for match in found if match["kind"] == kind and not match["mark"]]


def fits(expected: str, printed: str) -> bool:
    """Whether `printed` is `expected`, … standing for anything; white space at line ends aside."""
    expected, printed = (
        "\n".join(line.rstrip() for line in text.strip().splitlines())
        for text in (expected, printed)
    )
    pattern = ".*?".join(map(re.escape, expected.split("…")))
    return re.fullmatch(pattern, printed, re.S) is not None


def commands(block: str) -> list[tuple[str, str]]:
    """(command, expected output) of a console block; a backslash continues a command."""
    parts = re.split(r"^\$ ", block, flags=re.M)[1:]
    found = []
    for part in parts:
        lines = part.split("\n")
        last = next(i for i, line in enumerate(lines) if not line.endswith("\\"))
        command = " ".join(line.rstrip("\\").strip() for line in lines[: last + 1])
        found.append((command, "\n".join(lines[last + 1 :])))
    return found


def run(command: str) -> str:
    """What a command prints, in this process: another would take seconds to import torch."""
    words = shlex.split(command)
    assert words[0] == "pellucid", f"docs run pellucid, not {words[0]}"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words[1:])
        except SystemExit as ended:  # after --help
            status = int(ended.code or 0)
    assert status in (0, 1), f"{command}\n{err.getvalue()}"
    return out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    for block in blocks(page, "console"):
        for command, expected in commands(block):
            printed = run(command)
            assert fits(expected, printed), f"$ {command}\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sessions(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    sessions = blocks(page, "pycon")
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    source = "\n".join(sessions).replace("…", "...")
    test = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), 0)
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=options)
    with contextlib.redirect_stderr(report):
        runner.run(test, out=report.write)
    assert not runner.failures, report.getvalue()


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            if page.parent.name == "docs":  # in the site a folder is no page
                assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_every_page_stands_in_the_sites_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    listed = [page for entry in site["nav"] for page in _pages(entry)]
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    there = sorted(str(page.relative_to(ROOT / "docs")) for page in pages)
    assert sorted(listed) == there


def _pages(entry: Any) -> list[str]:
    """The pages of one entry: it maps a title to a page or to further entries."""
    (below,) = entry.values()
    return [below] if isinstance(below, str) else [page for one in below for page in _pages(one)]


def test_every_public_name_stands_in_the_reference():
    text = "".join(p.read_text("utf-8") for p in (ROOT / "docs" / "reference").glob("*.md"))
    names = re.findall(r"^(?:::: | {6}heading: )pellucid\.(\w+)$", text, re.M)
    assert sorted(names) == sorted(pellucid.__all__)


def test_the_cookbook_takes_no_more_lines_than_its_peers():
    """The table's lines are those of each task's first block, and no peer's are fewer."""
    text = (ROOT / "docs" / "cookbook.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) [^|]+\| (\d+) \| (\d+) \| (\d+|–) \|$", text, re.M)
    tasks = re.split(r"^## \d+\. ", text, flags=re.M)[1:]
    assert len(rows) == len(tasks) == 10
    for (number, ours, *peers), task in zip(rows, tasks, strict=True):
        block = re.search(r"^```pycon\n(.*?)^```", task, re.M | re.S)
        assert block is not None
        lines = [line for line in block[1].splitlines() if line.startswith((">>> ", "... "))]
        assert len(lines) == int(ours), f"task {number}"
        assert int(ours) <= min(int(peer) for peer in peers if peer != "–"), f"task {number}"

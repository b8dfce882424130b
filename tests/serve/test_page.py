"""The page's files: complete, self-contained, and without a number that no model made."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path, PurePosixPath

import pytest

import pellucid.serve

PAGE = Path(pellucid.serve.__file__).parent / "page"
FILES = {path.relative_to(PAGE).as_posix(): path.read_text() for path in PAGE.rglob("*.*")}
MODULES = {name: text for name, text in FILES.items() if name.endswith(".js")}
IMPORT = re.compile(r'^import\s[^;"]*"([^"]+)";', re.M)
FILE_LINES = 400
BYTES = 600_000  # of the whole page


def imports(name: str) -> list[str]:
    """The modules that one imports, as paths inside the page's folder."""
    folder = PurePosixPath(name).parent
    parts = [str(folder / found) for found in IMPORT.findall(MODULES[name])]
    return [re.sub(r"[^/]+/\.\./|\./", "", re.sub(r"^\./", "", part)) for part in parts]


def test_the_page_is_as_small_as_it_says():
    assert sum(len(text.encode()) for text in FILES.values()) < BYTES
    assert {name for name, text in MODULES.items() if text.count("\n") > FILE_LINES} == set()


def test_every_file_is_named_in_index_and_every_name_is_a_file():
    named = re.findall(r'(?:href|src)="([^"]+)"', FILES["index.html"])
    assert all(name.startswith("/page/") for name in named)
    assert {name.removeprefix("/page/") for name in named} == set(FILES) - {"index.html"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_import_is_a_module_of_the_page(name: str):
    assert len(re.findall(r"^import\b", MODULES[name], re.M)) == len(IMPORT.findall(MODULES[name]))
    assert set(imports(name)) <= set(MODULES)


def test_imports_go_round_in_no_circle():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " imports ".join((*above, name))
        if name not in done:
            for imported in imports(name):
                visit(imported, (*above, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_comes_from_elsewhere(name: str):
    text = FILES[name].replace("http://www.w3.org/2000/svg", "")  # the name of SVG, no address
    assert not re.search(r"https?://|//[a-z0-9-]+\.[a-z]{2,}/|@import|url\(", text)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_number_is_made_up_and_nothing_becomes_code(name: str):
    assert not re.search(r"Math\.random|crypto\.|\beval\(|new Function|outerHTML", MODULES[name])
    markup = MODULES[name].count("innerHTML")
    assert markup == (1 if name == "html.js" else 0), "only html.js parses markup, its own"


def test_the_policy_of_the_server_suffices():
    assert "<style" not in FILES["index.html"]
    assert not re.search(r"<script(?![^>]*src=)", FILES["index.html"])
    for name, text in MODULES.items():
        assert not re.search(r'\sstyle="', text), f"{name}: styles are set by `css=`"
        assert not re.search(r"\son[a-z]+=", text), f"{name}: listeners are set by @"


def test_a_wheel_holds_every_file_of_the_page_and_the_widget():
    package = Path(pellucid.serve.__file__).parents[1]
    project = tomllib.loads((package.parent / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["pellucid"]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for path in PAGE.rglob("*.*") if path.is_file()} <= packed
    assert PAGE.parent / "widget.js" in packed

"""The library in the cache: only what this user compiled, whole, is ever loaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, random_model

from pellucid.generate import Sampling, generate_tokens, native
from pellucid.generate.native import build, kept

FUNCTIONS = ("open", "step", "close", "multiply", "instructions")
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def compile_c(text: str, to: Path) -> Path:
    source = to.with_suffix(".c")
    source.write_text(text)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", to, source], check=True)
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A small library with all functions, in place of the real one, which takes seconds."""
    text = "".join(f"void *pellucid_{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    return compile_c(text, tmp_path_factory.mktemp("made") / "whole.so")


@pytest.fixture
def lacking(tmp_path) -> Path:
    return compile_c("int pellucid_open(void) { return 0; }", tmp_path / "lacking.so")


@pytest.fixture
def evil(tmp_path) -> tuple[Path, Path]:
    """A library that leaves a mark as soon as it is loaded, and the mark."""
    mark = tmp_path / "mark"
    text = "".join(f"void *pellucid_{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    text += "#include <stdio.h>\n__attribute__((constructor)) void begin(void)\n"
    text += f'{{ fclose(fopen("{mark}", "w")); }}\n'
    return compile_c(text, tmp_path / "evil.so"), mark


class Compiler:
    """A compiler that copies a library (or runs `does`) and counts how often it is called."""

    def __init__(self, folder: Path, gives: Path, does: str = "") -> None:
        self.path, self._log = folder / "compiler", folder / "calls"
        self.path.write_text(
            f'#!/bin/sh\necho >> {self._log}\n{does}\nwhile [ "$1" != -o ]; do shift; done\n'
            f'cp {gives} "$2"\n'
        )
        self.path.chmod(0o755)

    @property
    def calls(self) -> int:
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache folder, empty and not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "pellucid"
    monkeypatch.undo()
    forget()


def forget() -> None:
    """As in a new process."""
    native.library.cache_clear()
    native.building.cache_clear()


def library():
    forget()
    return native.library("baseline")


@pytest.fixture
def compiler(tmp_path, made, cache, monkeypatch) -> Compiler:
    compiler = Compiler(tmp_path, made)
    monkeypatch.setenv("CC", str(compiler.path))
    return compiler


def kept_file(cache: Path) -> Path:
    (path,) = cache.glob("*.so")
    return path


def test_a_library_is_compiled_once_and_kept_for_this_user_alone(cache, compiler):
    before = os.umask(0)
    try:
        library()
    finally:
        os.umask(before)
    library()
    assert compiler.calls == 1
    names = sorted(path.name for path in cache.iterdir())
    assert names == [kept_file(cache).name, f"{kept_file(cache).name}.sha256"]
    modes = [path.stat().st_mode & 0o777 for path in (cache, *sorted(cache.iterdir()))]
    assert modes == [0o700, 0o600, 0o600]


@pytest.mark.parametrize("left", [0, 1, 64, 1000, 4096, 8000, -1])
def test_a_cut_library_is_compiled_anew_and_that_is_said_once(cache, compiler, left):
    library()
    path = kept_file(cache)
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    with pytest.warns(RuntimeWarning, match="not what its checksum says: compiling it anew"):
        library()
    assert path.read_bytes() == whole
    library()  # warnings are errors here
    assert compiler.calls == 2


@pytest.mark.parametrize("which", ["library", "one bit", "checksum", "no checksum", "not text"])
def test_garbage_is_compiled_anew(cache, compiler, which):
    library()
    path = kept_file(cache)
    checksum = path.with_name(f"{path.name}.sha256")
    if which == "library":
        path.write_bytes(b"garbage" * 2000)
    elif which == "one bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif which == "no checksum":
        checksum.unlink()
    else:
        checksum.write_bytes(b"\xff\xfe" if which == "not text" else b"0" * 64)
    with pytest.warns(RuntimeWarning, match="checksum"):
        library()
    library()
    assert compiler.calls == 2


def keep(cache: Path, content: bytes) -> None:
    with kept.KeptLibrary(kept_file(cache)) as place:
        place.write(content)


def test_a_library_without_its_functions_is_compiled_anew(cache, compiler, lacking):
    library()
    for content, message in ((lacking.read_bytes(), "lacks a function"), (b"x", "does not load")):
        keep(cache, content)
        with pytest.warns(RuntimeWarning, match=message):
            library()
    assert compiler.calls == 3


@pytest.mark.parametrize("content", ["lacking", "empty"])
def test_a_compiler_that_makes_no_good_library_is_asked_once(
    cache, tmp_path, lacking, monkeypatch, content
):
    gives = lacking if content == "lacking" else tmp_path / "empty"
    gives.touch()
    compiler = Compiler(tmp_path, gives)
    monkeypatch.setenv("CC", str(compiler.path))
    with pytest.raises(native.NotBuilt, match="what .*compiler compiled (lacks|does not load)"):
        library()
    assert compiler.calls == 1
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("printf '\\377\\376 wrong \\033[31m\\nmore' >&2; exit 1", r"decoder: \\xff\\xfe wrong \?"),
        ("exit 3", "could not compile the decoder: no message"),
        ("exit 0", "reported no error, but made no library"),
        ('while [ "$1" != -o ]; do shift; done; mkdir "$2"; exit 0', "made no library"),
    ],
)
def test_what_a_compiler_may_do_wrong_is_one_line(
    cache, tmp_path, made, monkeypatch, does, message
):
    monkeypatch.setenv("CC", str(Compiler(tmp_path, made, does).path))
    with pytest.raises(native.NotBuilt, match=message) as problem:
        library()
    assert str(problem.value).isprintable()
    assert not list(cache.iterdir())


def leave_open(cache: Path) -> None:
    cache.chmod(0o777)


def leave_parent_open(cache: Path) -> None:
    cache.parent.chmod(0o777)


def leave_file_open(cache: Path) -> None:
    kept_file(cache).chmod(0o666)


def link_elsewhere(cache: Path) -> None:
    path = kept_file(cache)
    path.rename(cache.parent / "elsewhere.so")
    path.symlink_to(cache.parent / "elsewhere.so")


def give_away_the_folder(cache: Path) -> None:
    os.chown(cache, 54321, 54321)


def give_away_the_file(cache: Path) -> None:
    os.chown(kept_file(cache), 54321, 54321)


@pytest.mark.parametrize(
    "change",
    [
        leave_open,
        leave_parent_open,
        leave_file_open,
        link_elsewhere,
        pytest.param(give_away_the_folder, marks=as_root),
        pytest.param(give_away_the_file, marks=as_root),
    ],
)
def test_what_others_could_have_written_is_never_loaded(cache, compiler, evil, change):
    library()
    content, mark = evil
    keep(cache, content.read_bytes())
    change(cache)
    with pytest.raises(native.NotBuilt, match="the cache of the decoder is not used: .*"):
        library()
    assert not mark.exists()
    assert compiler.calls == 1


def test_the_mark_of_the_test_above_would_be_seen(cache, compiler, evil):
    library()
    content, mark = evil
    keep(cache, content.read_bytes())
    library()
    assert mark.exists()


def test_what_is_loaded_is_what_was_read(cache, compiler, evil, made):
    library()
    with kept.KeptLibrary(kept_file(cache)) as place:
        content = place.read()
        kept_file(cache).write_bytes(evil[0].read_bytes()[:5000])  # after the check
        assert content == made.read_bytes()
        assert kept.load_content(content).pellucid_step() == 0
    assert not evil[1].exists()


def test_several_libraries_in_one_process_are_not_taken_for_each_other(tmp_path, monkeypatch):
    texts = [f"int number(void) {{ return {number}; }}" for number in range(3)]
    contents = [compile_c(text, tmp_path / "number.so").read_bytes() for text in texts]
    for memory in (True, False):
        if not memory:
            monkeypatch.delattr(os, "memfd_create")
        assert [kept.load_content(content).number() for content in contents] == [0, 1, 2]


def test_two_processes_that_build_at_once_compile_once(cache, tmp_path, made, monkeypatch):
    compiler = Compiler(tmp_path, made, "sleep 1")
    monkeypatch.setenv("CC", str(compiler.path))
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "from pellucid.generate import native; native.library('baseline')"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert compiler.calls == 1


@pytest.mark.parametrize("place", ["/proc/nothing", "FILE"])
def test_no_place_for_a_cache_is_a_line(compiler, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", place.replace("FILE", str(tmp_path / "file")))
    with pytest.raises(native.NotBuilt, match="decoder (cannot be kept in|is not used)"):
        library()


def test_no_home_is_a_line_and_a_relative_cache_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "pellucid"

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(native.NotBuilt, match="no home folder .*set XDG_CACHE_HOME"):
        library()


def decoded() -> list[list[int | None]]:
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    greedy = Sampling(temperature=0.0)
    return list(generate_tokens(model, [[1, 2, 3]], sampling=greedy, max_new_tokens=6))


def test_whatever_goes_wrong_the_plain_path_decodes_and_says_why_once(cache, monkeypatch):
    def breaks(instructions: str | None = None):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text\nat all")

    monkeypatch.setattr(build, "library", breaks)
    forget()
    with pytest.warns(RuntimeWarning) as said:
        first = decoded()
    assert [re.sub(".*: Unicode", "Unicode", str(one.message)) for one in said] == [
        "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: no text at all"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded() == first


def test_a_verb_decodes_all_the_same_and_says_why_in_one_line(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    command = [sys.executable, "-m", "pellucid", "generate", "import", "--temperature", "0", "-n4"]
    done = subprocess.run(
        command,
        env=os.environ | {"XDG_CACHE_HOME": str(shared)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip()
    assert re.fullmatch(
        r"pellucid generate: tokens are decoded by the model's own code, not in C: .*others may "
        r"write in .*shared .mode 0777. .*choose a folder of your own\n",
        done.stderr,
    )

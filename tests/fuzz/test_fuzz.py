"""A small share of the fuzzing in each run of the tests; ``make fuzz`` runs 20,000 inputs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import fuzz_mutations as mutations
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pellucid.checkpoints.formats.peft_config import _searched
from pellucid.diff.sides.maps import read_map
from pellucid.files import parse_json, parse_toml, parse_yaml
from pellucid.serve.fields import RequestError, read_json

HERE = Path(__file__).resolve().parent
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
CHANCE = st.randoms(use_true_random=False)  # whose choices hypothesis shortens


def test_every_reader_bears_damaged_files():
    """Nothing raised but what users can cause, nothing started, nothing lost, nothing slow."""
    command = [sys.executable, str(HERE / "fuzz_main.py"), "--inputs", "400"]
    command += ["--seconds", "15", "--seed", "70000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["inputs"] >= 50 and not told["wrong"]


def guarded(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Code in a process with the fuzzer's fences around `folder`."""
    begin = (
        f"import sys, os, pathlib; sys.path.insert(0, {str(HERE)!r})\n"
        "from fuzz_guard import Guard, Hang, at_most\n"
        f"guard = Guard(pathlib.Path({str(folder)!r}))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", begin + code], capture_output=True, text=True, check=False
    )


def test_the_fence_keeps_everything_outside_the_folder(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("theirs")
    (inside / "link").symlink_to(outside)
    code = f"""
outside, inside = {str(outside)!r}, {str(inside)!r}
open(inside + "/new", "w").write("a"); os.rename(inside + "/new", inside + "/moved")
open("/dev/null", "w").write("a")
def refused(call, *given):
    try: call(*given)
    except OSError: return
    raise AssertionError((call, given))
refused(open, outside, "w"); refused(open, inside + "/link", "a"); refused(os.remove, outside)
refused(os.rename, outside, inside + "/theirs"); refused(os.system, "touch " + inside + "/ran")
refused(os.remove, "/dev/null"); refused(os.mkdir, outside + "-folder")
refused(os.symlink, inside, outside + "-link"); refused(os.truncate, outside, 0)
assert any("os.system" in each for each in guard.started)
print(guard.kernel)
"""
    done = guarded(code, inside)
    assert done.returncode == 0, done.stderr
    assert outside.read_text() == "theirs" and not (inside / "ran").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "outside"]


def test_the_fuzzer_sees_a_hang_an_execution_and_a_bug(tmp_path):
    """What it would report, seeded: three readers that are not to be had."""
    code = f"""
sys.argv = ["fuzz"]
import pickle, time, fuzz_main, fuzz_targets, random
class Gadget:
    def __reduce__(self): return os.system, ("touch executed",)
data = pickle.dumps(Gadget())
def one(name, read, slow=10):
    target = fuzz_targets.Target(name, (), (), read)
    class Place:
        here = pathlib.Path({str(tmp_path)!r})
        def prepare(self, target): pass
    return fuzz_main.one_input(Place(), guard, target, 1, slow)
assert "longer than" in one("hang", lambda folder, draw: time.sleep(3), 0.02)
def busy(folder, draw):
    while True:
        try: sum(range(10000))
        except Exception: pass
assert "longer than" in one("busy", busy, 0.1)
assert "os.system" in one("pickle", lambda folder, draw: pickle.loads(data))
assert "KeyError" in one("bug", lambda folder, draw: {{}}["a"])
assert "MB for files" in one("memory", lambda folder, draw: b"a" * (900 << 20))
def user(folder, draw): raise ValueError("a file is wrong")
assert one("user", user) is None
"""
    done = guarded(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()


@QUICK
@given(CHANCE)
def test_values_from_outside_are_values_or_one_line(draw: random.Random):
    for read, text in (
        (parse_json, json.dumps({"a": [1, {"b": "c"}]})),
        (parse_toml, "[a]\nb = 1\nc = [1, 2]\n"),
        (parse_yaml, "a: {b: 1}\nc: [1, 2]\n"),
    ):
        damage = mutations.damaged_json if read is parse_json else mutations.damaged_text
        given = damage(text, draw).decode("utf-8", "replace")
        try:
            read(given, "x")
        except ValueError as error:
            assert str(error).startswith("x") and "\n" not in str(error)


@QUICK
@given(CHANCE)
def test_a_request_is_read_or_refused(draw: random.Random):
    body = mutations.damaged_json('{"model": "demo", "prompt": "a", "max_tokens": 3}', draw)
    try:
        read_json(body)
    except RequestError as refused:
        assert str(refused)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x\n",  # an alias
        "a: &x {b: *x}\n",  # of itself
        "!!python/object/apply:os.system ['true']\n",
        "a: 2026-13-45\n",
        "? [a]\n: b\n",
        "[" * 3000,
    ],
)
def test_yaml_that_grows_runs_or_is_none(text):
    with pytest.raises(ValueError, match="^name map x is not YAML: "):
        read_map(text, "x")


@pytest.mark.parametrize("digits", [101, 400, 5000])
def test_numbers_that_nothing_can_compute_with(digits):
    for read, text in (
        (parse_json, f'{{"a": [{"9" * digits}]}}'),
        (parse_toml, f"a = [{'9' * digits}]"),
    ):
        with pytest.raises(ValueError, match="digits|not TOML"):
            read(text, "x")
    assert parse_json(f"[{'9' * 31}]", "x") == [int("9" * 31)]


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj"),
        (r"model\.layers\.(?:0|1)\.mlp\.down_proj", "model.layers.1.mlp.down_proj"),
        (r".*\.layers\.[0-3]\..*_proj", "model.layers.2.self_attn.v_proj"),
        (r"layers\.\d+\.self_attn\.(q|v)_proj", "model.layers.12.self_attn.q_proj"),
    ],
)
def test_patterns_that_adapters_have(pattern, module):
    assert _searched(pattern).match(module)
    assert not _searched(pattern).match("model.embed_tokens")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "a?" * 30 + "a" * 30,
        "(a|a)" * 40,
        ".*.*.*.*x",
        "(",
        "a{99999}",
        "(?=a)b",
    ],
)
def test_patterns_that_take_years_are_refused(pattern):
    with pytest.raises(ValueError, match="^adapter_config.json: pattern"):
        _searched(pattern)


def test_mutations_are_those_of_their_seed():
    text = '{"a": [1, 2, {"b": "c"}]}'
    for damage in (mutations.damaged_json, mutations.damaged_text):
        assert damage(text, random.Random(3)) == damage(text, random.Random(3))
    made = {mutations.damaged_json(text, random.Random(seed)) for seed in range(50)}
    assert len(made) > 25 and text.encode() not in made

"""Do the tests bite? Seeded mistakes, one at a time: ``python tests/mutants/mutants_main.py``.

A mutant is one changed operator, comparison, constant, condition or argument in a core module. The
package is copied, the copy changed, and the tests of that module run against it; a mutant that they
let pass is a hole, or changes nothing that can be observed (said in docs/security.md). mutmut and
cosmic-ray run the whole suite from the changed tree or need one test command for all modules; here
each module names its own tests, so 300 mutants take an hour and not a week.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy  # noqa: F401  imported once, before every fork
import pytest
import safetensors.torch  # noqa: F401
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
# Core modules, and what tests them.
MODULES = {
    "models/quantised.py": "tests/models/test_quantised.py tests/models/test_quantised_slices.py",
    "models/attention.py": "tests/models/test_attention.py",
    "models/rope.py": "tests/models/test_rope.py",
    "models/rope_scaling.py": "tests/models/test_rope.py",
    "models/cache.py": "tests/models/test_cache.py tests/generate/test_generate_cache.py",
    "models/adapters.py": "tests/train/finetune/test_finetune_lora.py "
    "tests/train/finetune/test_finetune_peft_format.py tests/test_load_adapter.py",
    "generate/sample.py": "tests/generate/test_generate_sample.py",
    "generate/engine.py": "tests/generate/test_generate_engine.py",
    "diff/replay/statistics.py": "tests/diff/test_diff_statistics.py",
    "diff/replay/judge.py": "tests/diff/test_diff_judge.py tests/diff/test_diff_replay.py",
    "checkpoints/formats/meta.py": "tests/checkpoints/test_checkpoint_layouts.py "
    "tests/checkpoints/test_checkpoint_config.py tests/checkpoints/test_checkpoint_errors.py",
    "checkpoints/formats/peft_config.py": "tests/test_load_adapter.py "
    "tests/train/finetune/test_finetune_peft_format.py",
    "families/rope_keys.py": "tests/checkpoints/test_checkpoint_config.py "
    "tests/families/test_families.py",
    "families/config.py": "tests/checkpoints/test_checkpoint_config.py "
    "tests/families/test_families.py",
    "train/data/batches.py": "tests/train/test_train_batches.py",
    "train/optim.py": "tests/train/test_train_optim.py",
    "train/data/shuffle.py": "tests/train/test_train_order.py",
    "train/cross_entropy.py": "tests/train/test_train_cross_entropy.py",
    "evaluate/windows.py": "tests/evaluate/test_evaluate_text.py",
    "tokenizers/bytelevel.py": "tests/tokenizers/test_tokenizer_bytelevel.py",
    "tokenizers/base.py": "tests/tokenizers/test_tokenizer_base.py",
    "files.py": "tests/checkpoints/test_small_readers.py tests/checkpoints/test_beside.py "
    "tests/cli/test_cli_outputs.py",
}
_OTHER = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: the module, the line, what stood there and what stands there now."""

    module: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"pellucid/{self.module}:{self.line}: {self.before}  ->  {self.after}"


def mutants(module: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    text = (ROOT / "pellucid" / module).read_text("utf-8")
    tree = ast.parse(text)
    outside = {id(inner) for node in ast.walk(tree) for inner in _unobserved(node)}
    lines, found = text.encode().splitlines(keepends=True), []
    for node in ast.walk(tree):
        if id(node) in outside or not hasattr(node, "lineno"):
            continue
        for changed in _changes(node):
            begin = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
            end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
            data, after = text.encode(), ast.unparse(changed)
            source = data[:begin] + f"({after})".encode() + data[end:]
            made = Mutant(module, node.lineno, ast.unparse(node), after, source.decode())
            found.append(made)
    return sorted(found, key=lambda each: (each.line, each.after))


def _unobserved(node: ast.AST) -> Iterator[ast.AST]:
    """What no test can or should see: messages, annotations, decorators, docstrings."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        yield from ast.walk(node)
    if isinstance(node, ast.AnnAssign):
        yield from ast.walk(node.annotation)
    if isinstance(node, ast.FunctionDef):
        for part in (*node.decorator_list, node.returns, node.args):
            yield from ast.walk(part) if part is not None else ()
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        yield from ast.walk(node)


def _changes(node: ast.AST) -> Iterator[ast.expr]:
    """What a node could be by mistake."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OTHER:
        yield ast.BinOp(node.left, _OTHER[type(node.op)](), node.right)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _OTHER:
        ops = [_OTHER[type(node.ops[0])](), *node.ops[1:]]
        yield ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(_OTHER[type(node.op)](), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1 if node.value != 1 else 2)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Attribute) and node.attr in ("float32", "float64"):
        other = "float64" if node.attr == "float32" else "float32"
        yield ast.Attribute(node.value, other, node.ctx)


def survives(mutant: Mutant, copy: Path, seconds: float) -> bool:
    """Whether the module's tests pass all the same; a hang is noticed as well as a failure."""
    target = copy / "pellucid" / mutant.module
    whole = target.read_text("utf-8")
    target.write_text(mutant.source, "utf-8")
    try:
        return tests_pass(mutant.module, copy, seconds)
    finally:
        target.write_text(whole, "utf-8")


def tests_pass(module: str, copy: Path, seconds: float) -> bool:
    """Whether a module's tests pass in `copy`, within `seconds` of processor time.

    A fork runs them: this process has imported what is not under test, which takes seconds.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        words = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", "not peers and not long"]
        status = 1
        try:
            status = int(pytest.main([*words, *MODULES[module].split()]))
        finally:
            os._exit(status)
    end = time.monotonic() + 10 * seconds  # one that waits takes no processor time
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def copied(folder: Path) -> Path:
    """The package and its tests in `folder`, where they are changed and run."""
    for part in ("pellucid", "tests", "docs"):
        shutil.copytree(ROOT / part, folder / part,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)
    os.environ |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=sorted(MODULES))
    parser.add_argument("--seconds", type=float, default=300, help="of a module's tests")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so long; 0: never")
    parser.add_argument("--least", type=float, default=0.93, help="share to be killed")
    given = parser.parse_args()
    every = [mutant for module in given.only or MODULES for mutant in mutants(module)]
    chosen = random.Random(given.seed).sample(every, min(given.mutants, len(every)))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = copied(Path(folder))
        limits = {}
        for module in sorted({mutant.module for mutant in chosen}):
            begin = time.monotonic()
            if not tests_pass(module, copy, given.seconds):
                print(f"{module}: its tests fail without a mutant", file=sys.stderr)
                return 2
            taken = time.monotonic() - begin
            limits[module] = 20 + 5 * taken
            print(f"{module}: {taken:.1f} s of tests", file=sys.stderr, flush=True)
        survivors, done = [], 0
        end = time.monotonic() + (60 * given.minutes or float("inf"))
        for mutant in chosen:
            if time.monotonic() > end:
                break
            alive, done = survives(mutant, copy, limits[mutant.module]), done + 1
            survivors += [str(mutant)] if alive else []
            print(f"{done}/{len(chosen)} {'SURVIVED' if alive else 'killed'} {mutant}",
                  file=sys.stderr, flush=True)  # fmt: skip
    killed = 1 - len(survivors) / done
    print(json.dumps({"mutants": done, "of": len(every), "killed": round(killed, 3),
                      "survivors": survivors}, indent=1, ensure_ascii=False))  # fmt: skip
    return 0 if killed >= given.least else 1


if __name__ == "__main__":
    sys.exit(main())

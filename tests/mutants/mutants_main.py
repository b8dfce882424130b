"""Do the tests bite? Seeded mistakes, one at a time: ``python tests/mutants/mutants_main.py``.

A mutant is one changed operator, comparison, constant, condition or argument in a core module. The
package is copied, the copy changed, and the tests of that module run against it (mutants_tried.py);
a mutant that they let pass is a hole, or changes nothing that can be observed: then
mutants_explained.py says why. It is not counted as killed all the same. Which mutants a seed draws
depends on each one's own text, so that a change of the code changes few of them.

mutmut and cosmic-ray run the whole suite from the changed tree or need one test command for all
modules, and import everything for each mutant; here each module names its own tests, which are
imported once, so 300 mutants take an hour and not a week.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy  # noqa: F401  imported once, before every fork
import safetensors.torch  # noqa: F401
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutants_explained import EXPLAINED
from mutants_tried import Collected

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
_FAMILIES = "tests/families/test_families.py"
_CONFIGS = " ".join([
    "tests/checkpoints/test_checkpoint_config.py",
    *(f"{_FAMILIES}::test_{name}" for name in (
        "writing_and_reading_a_config_is_the_identity", "kinds_of_layers", "errors_are_one_line",
        "the_spelling_of_transformers_4_says_the_same", "defaults_are_those_of_each_class",
        "layers_in_the_spelling_of_transformers_4", "null_says_something_else_than_absence",
        "longrope_sharpens_nothing_within_its_own_context",
    )),
])  # fmt: skip
_BYTES = "tests/tokenizers/test_tokenizer_bytelevel.py"
# Core modules, and what tests them; of a file that also has slow tests of other things, some.
MODULES = {
    "models/quantised.py": "tests/models/test_quantised.py tests/models/test_quantised_slices.py "
    "tests/models/test_levels.py",
    "models/attention.py": "tests/models/test_attention.py",
    "models/rope.py": "tests/models/test_rope.py",
    "models/rope_scaling.py": "tests/models/test_rope.py",
    "models/cache.py": "tests/models/test_cache.py "
    "tests/generate/test_generate_cache.py::test_crop_and_rewrite_leave_a_trace_as_it_was",
    "models/adapters.py": "tests/train/finetune/test_finetune_lora.py "
    "tests/train/finetune/test_finetune_peft_format.py tests/test_load_adapter.py",
    "generate/sample.py": "tests/generate/test_generate_sample.py",
    "generate/engine.py": "tests/generate/test_generate_engine.py "
    "tests/generate/test_generate_lookup.py tests/generate/test_generate_together.py "
    "tests/generate/test_generate_draft.py",
    "diff/replay/statistics.py": "tests/diff/test_diff_statistics.py "
    "tests/diff/test_diff_bounds.py",
    "diff/replay/judge.py": "tests/diff/test_diff_judge.py "
    "tests/diff/test_diff_sources.py tests/diff/test_diff_bounds.py",
    "checkpoints/formats/meta.py": "tests/checkpoints/test_checkpoint_layouts.py "
    "tests/checkpoints/test_checkpoint_config.py tests/checkpoints/test_checkpoint_errors.py",
    "checkpoints/formats/peft_config.py": "tests/test_load_adapter.py "
    "tests/train/finetune/test_finetune_peft_format.py",
    "families/rope_keys.py": _CONFIGS,
    "families/config.py": _CONFIGS,
    "train/data/batches.py": "tests/train/test_train_batches.py",
    "train/optim.py": "tests/train/test_train_optim.py",
    "train/data/shuffle.py": "tests/train/test_train_order.py",
    "train/cross_entropy.py": "tests/train/test_train_cross_entropy.py",
    "evaluate/windows.py": "tests/evaluate/test_evaluate_text.py",
    "tokenizers/bytelevel.py": " ".join(f"{_BYTES}::test_{name}" for name in (
        "encodes_as_the_textbook_does", "long_white_space_is_cut_where_the_pattern_cuts_it",
        "no_long_white_space_is_overlooked", "white_space_means_what_the_engine_means",
        "merges_become_ranks_only_where_that_is_the_same", "tokens_as_written_in_files",
        "ranks_made_of_merges_do_what_the_merges_do", "incomplete_ranks_are_refused",
        "ids_without_a_token_are_refused",
    )),
    "tokenizers/base.py": "tests/tokenizers/test_tokenizer_base.py",
    "files.py": "tests/checkpoints/test_small_readers.py tests/checkpoints/test_beside.py "
    "tests/cli/test_cli_outputs.py",
}  # fmt: skip
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
    """One change: the module, the line, what stood there and what stands there now.

    statement    the lines of the statement around it; of one with a body, those of its head
    inside       whether it is in a function, which runs again when it is called
    source       the whole module with it
    code         the line that it changes, as it was
    """

    module: str
    line: int
    statement: range
    inside: bool
    before: str
    after: str
    source: str
    code: str

    def __str__(self) -> str:
        return f"pellucid/{self.module}:{self.line}: {self.before}  ->  {self.after}"


def mutants(module: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    text = (ROOT / "pellucid" / module).read_text("utf-8")
    tree = ast.parse(text)
    outside = {id(inner) for node in ast.walk(tree) for inner in _unobserved(node)}
    statements = {id(inner): lines for node in ast.walk(tree) if isinstance(node, ast.stmt)
                  for inner, lines in _of_statement(node)}  # fmt: skip
    inside = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
              for part in node.body for inner in ast.walk(part)}  # fmt: skip
    lines, found = text.encode().splitlines(keepends=True), []
    for node in ast.walk(tree):
        if id(node) in outside or not hasattr(node, "lineno"):
            continue
        for changed in _changes(node):
            begin = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
            end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
            data, after = text.encode(), ast.unparse(changed)
            source = data[:begin] + f"({after})".encode() + data[end:]
            where = statements.get(id(node), range(node.lineno, node.end_lineno + 1))
            found.append(
                Mutant(module, node.lineno, where, id(node) in inside, ast.unparse(node), after,
                       source.decode(), lines[node.lineno - 1].decode().strip())
            )  # fmt: skip
    return sorted(found, key=lambda each: (each.line, each.after))


def drawn(every: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """`count` mutants at random; another line elsewhere changes nothing about who is drawn."""
    seen: dict[str, int] = {}
    places = {}
    for mutant in every:
        text = f"{seed} {mutant.module} {mutant.code} {mutant.before} {mutant.after}"
        seen[text] = seen.get(text, 0) + 1  # the same change twice in one line, or in equal lines
        places[hashlib.sha256(f"{text} {seen[text]}".encode()).digest()] = mutant
    return [places[place] for place in sorted(places)[:count]]


def explained(mutant: Mutant) -> str:
    """Why a mutant changes nothing that can be observed; empty: it should be killed."""
    lines, known = mutant.source.splitlines(), EXPLAINED.get(mutant.module, {})
    above, changed = (line.strip() for line in lines[mutant.line - 2 : mutant.line])
    return known.get(changed, "") or known.get(f"{above} {changed}", "")


def _of_statement(node: ast.stmt) -> Iterator[tuple[ast.AST, range]]:
    """Each node of a statement but those in its body, with the lines where it stands."""
    body = getattr(node, "body", None)
    last = body[0].lineno - 1 if isinstance(body, list) else node.end_lineno
    lines = range(node.lineno, max(node.lineno, last or node.lineno) + 1)
    for part in ast.iter_child_nodes(node):
        if not isinstance(part, ast.stmt):
            yield from ((inner, lines) for inner in ast.walk(part))


def _unobserved(node: ast.AST) -> Iterator[ast.AST]:
    """What no test can or should see: messages, annotations, decorators, docstrings.

    A union of types with another operator is a TypeError for whoever runs the line: it says nothing
    about tests.
    """
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and _is_type(node.right):
        yield from ast.walk(node)
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        yield from ast.walk(node)
    if isinstance(node, ast.AnnAssign):
        yield from ast.walk(node.annotation)
    if isinstance(node, ast.FunctionDef):
        for part in (*node.decorator_list, node.returns, node.args):
            yield from ast.walk(part) if part is not None else ()
    if isinstance(node, ast.ClassDef):
        for part in node.decorator_list:
            yield from ast.walk(part)
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        yield from ast.walk(node)


def _is_type(node: ast.AST) -> bool:
    """Whether an operand is None or a class by its name: the rest of a union, not of a number."""
    name = getattr(node, "id", getattr(node, "attr", ""))
    return name in dir(builtins) or (name[:1].isupper() and not name.isupper()) or (
        isinstance(node, ast.Constant) and node.value is None)  # fmt: skip


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
    parser.add_argument("--number", type=int, action="append", help="of the drawn, try this one")
    parser.add_argument("--seconds", type=float, default=300, help="of a module's tests")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so long; 0: never")
    parser.add_argument("--least", type=float, default=0.93, help="share to be killed")
    given = parser.parse_args()
    every = [mutant for module in MODULES for mutant in mutants(module)]
    chosen = [
        (number, mutant)
        for number, mutant in enumerate(drawn(every, given.mutants, given.seed), 1)
        if mutant.module in (given.only or MODULES) and number in (given.number or [number])
    ]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = copied(Path(folder))
        tests: dict[str, Collected] = {}
        holes, equal, wrong, done = [], {}, [], 0
        end = time.monotonic() + (60 * given.minutes or float("inf"))
        for number, mutant in chosen:
            if time.monotonic() > end:
                break
            module = mutant.module
            if module not in tests:
                tests[module] = Collected(copy / "pellucid" / module, MODULES[module].split())
                if not tests[module].pass_as_they_are(given.seconds):
                    print(f"{module}: its tests fail without a mutant", file=sys.stderr)
                    return 2
                print(f"{module}: {sum(tests[module].seconds.values()):.0f} s of tests",
                      file=sys.stderr, flush=True)  # fmt: skip
            alive, done, why = tests[module].pass_with(mutant), done + 1, explained(mutant)
            if alive and why:
                equal[str(mutant)] = why
            elif alive:
                holes.append(str(mutant))
            elif why:
                wrong.append(str(mutant))
            print(f"{number}/{given.mutants} {'SURVIVED' if alive else 'killed'} {mutant}"
                  f"{f' ({why})' if why else ''}", file=sys.stderr, flush=True)  # fmt: skip
    killed = 1 - (len(holes) + len(equal)) / max(done, 1)
    print(json.dumps({"mutants": done, "of": len(every), "killed": round(killed, 3),
                      "survivors": holes, "change nothing": equal,
                      "explained, but killed": wrong}, indent=1, ensure_ascii=False))  # fmt: skip
    return 0 if killed >= given.least and not holes + wrong else 1


if __name__ == "__main__":
    sys.exit(main())

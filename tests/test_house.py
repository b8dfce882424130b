"""The rules of the house, as tests: budgets, floors, circles, imports, what may be committed."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_samples import SAMPLES
from tiny import GPT, LLAMA, random_tokens

import pellucid
from pellucid.families import FAMILIES
from pellucid.families.config import read_config
from pellucid.models import Config, Layer, build

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pellucid"
FILES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

FILE_LINES = 500  # a question whether the file has outgrown its idea
FUNCTION_LINES = 60
READING_DISTANCE = 300  # lines to open for one forward pass, of every family

# Imports run downward; rooms of one floor may import each other, never in a circle.
FLOORS = {
    "cli": 6,
    "serve": 6,
    "bench": 5,
    "doctor": 5,
    "show": 5,
    "diff": 4,
    "train": 4,
    "evaluate": 4,
    "explore": 4,
    "quantise": 4,
    "interpret": 4,
    "language_model": 3,
    "prompt_walk": 3,
    "checkpoints": 3,
    "families": 3,
    "generate": 3,
    "source": 3,
    "walk": 3,
    "models": 2,
    "prompts": 2,
    "trace": 2,
    "trace_plan": 2,
    "callable_module": 1,
    "devices": 1,
    "edits": 1,
    "files": 1,
    "gguf_file": 1,
    "graph": 1,
    "ownership": 1,
    "names": 1,
    "notebook": 1,
    "numerics": 1,
    "spelling": 1,
    "step_recording": 1,
    "system": 1,
    "tokenizers": 1,
}
FRONT_DOOR = ("pellucid", "pellucid.__main__")


def module_of(path: Path) -> str:
    """Dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a syntax tree imports, relative imports resolved."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield node.lineno, whole if whole in MODULES else source


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def at_module_level(tree: ast.Module) -> ast.Module:
    """What runs when a module is imported: no function bodies, nothing for the type checker."""

    class Pruned(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            return None if is_type_checking(node) else self.generic_visit(node)

    return Pruned().visit(ast.parse(ast.unparse(tree)))


# ── Budgets ──────────────────────────────────────────────────────────────────────────────────────


def test_files_fit_the_budget():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert not {path: lines for path, lines in lengths.items() if lines > FILE_LINES}


def test_functions_fit_the_budget():
    long = {
        f"{module}.{node.name}": node.end_lineno - node.lineno + 1
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    }
    assert not long


def undocumented(module: str, tree: ast.Module) -> Iterator[str]:
    """Public names without a docstring; not asked of what a base class or a registry describes."""
    if not ast.get_docstring(tree):
        yield module
    inside = [(module, node) for node in tree.body]
    for owner, node in inside:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        registered = any(isinstance(decorator, ast.Call) for decorator in node.decorator_list)
        if node.name.startswith("_") or (registered and isinstance(node, ast.FunctionDef)):
            continue
        if not ast.get_docstring(node):
            yield f"{owner}.{node.name}"
        if isinstance(node, ast.ClassDef) and not node.bases:
            inside.extend((f"{owner}.{node.name}", inner) for inner in node.body)


def test_everything_public_says_what_it_does():
    assert not [name for module, tree in TREES.items() for name in undocumented(module, tree)]


def lines_opened(codes: set) -> dict[str, int]:
    """Lines of the package's functions that ran, and of the head of each class they belong to.

    A function counts whole. The head of a class is everything before its first method (docstring,
    fields) and its ``__init__``. Docstrings, comments and blank lines inside count.
    """
    ran = {(code.co_filename, code.co_firstlineno) for code in codes}
    opened = {}
    for module, path in MODULES.items():
        for node in TREES[module].body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            parts = methods if isinstance(node, ast.ClassDef) else [node]
            executed = [part for part in parts if (str(path), first_line(part)) in ran]
            lines = sum(part.end_lineno - first_line(part) + 1 for part in executed)
            if executed and isinstance(node, ast.ClassDef):
                lines += first_line(methods[0]) - first_line(node)
                setup = [m for m in methods if m.name == "__init__" and m not in executed]
                lines += sum(m.end_lineno - first_line(m) + 1 for m in setup)
            if lines:
                opened[f"{module}.{node.name}"] = lines
    return opened


def first_line(node) -> int:
    """Where a function or class begins, its decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


W, NOPE = Layer(window=True), Layer(rope="")
FORWARDS = {
    "gpt2": GPT,
    "granite_swa": replace(
        LLAMA, sinks=True, embed_scale=3.0, residual_scale=0.5, logit_scale=0.2, score_scale=0.3,
        window=4, layers=(W, NOPE),
    ),
    "nanochat": replace(
        LLAMA, norm_weight=False, embed_norm=True, qk_norm="head", qk_norm_last=True, gated=False,
        activation="relu2", logit_cap=15.0,
    ),
    **{family: read_config(sample, family) for family, sample in SAMPLES.items()},
}  # fmt: skip
_SCALING = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4},
}  # fmt: skip


def scaled(sample: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same ``config.json`` with another type of RoPE, in each of its tables."""

    def table(stated: dict[str, Any]) -> dict[str, Any]:
        kept = ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta")
        theirs = {key: value for key, value in stated.items() if key in kept}
        return theirs | {"rope_type": kind} | _SCALING[kind]

    stated = sample["rope_parameters"]
    one = "rope_type" in stated
    tables = table(stated) if one else {key: table(inner) for key, inner in stated.items()}
    return sample | {"rope_parameters": tables}


def lines_of_a_forward(config: Config) -> dict[str, int]:
    """What a newcomer opens to understand one whole forward pass, as `lines_opened` counts."""
    model, tokens = build(config).eval(), random_tokens(config, 1, 8)
    codes = set()
    sys.setprofile(lambda frame, event, _: codes.add(frame.f_code))
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        sys.setprofile(None)
    opened = lines_opened(codes)
    assert {"pellucid.models.decoder.Decoder", "pellucid.trace.tap"} < set(opened)
    return opened


@pytest.mark.parametrize("family", FORWARDS)
def test_reading_distance_of_a_forward(family):
    opened = lines_of_a_forward(FORWARDS[family])
    assert sum(opened.values()) <= READING_DISTANCE, opened


@pytest.mark.parametrize("kind", _SCALING)
def test_reading_distance_with_scaled_rope(kind):
    """Every family whose config may state this type; longrope is among the samples."""
    counted = {}
    for family, sample in SAMPLES.items():
        if "rope_parameters" not in sample:
            continue
        try:
            config = read_config(scaled(sample, kind), family)
        except ValueError:  # no type of this family
            continue
        ropes = [rope for rope in (config.rope, config.second_rope) if rope]
        assert kind in {rope.type for rope in ropes}
        if kind != "dynamic" or all(config.rotary_width(rope) > 2 for rope in ropes):
            counted[family] = sum(lines_of_a_forward(config).values())
    assert len(counted) > 20
    assert not {name: lines for name, lines in counted.items() if lines > READING_DISTANCE}


# ── Floors ───────────────────────────────────────────────────────────────────────────────────────


def floor(module: str) -> int:
    """Floor of a module; the front door holds only the version and is below all."""
    return 0 if module in FRONT_DOOR else FLOORS[module.split(".")[1]]


def test_every_part_of_the_package_has_a_floor():
    parts = {name.split(".")[1] for name in MODULES if "." in name} - {"__main__"}
    assert parts <= set(FLOORS), f"no floor for {sorted(parts - set(FLOORS))}"


def test_imports_run_downward():
    wrong = []
    for module, tree in TREES.items():
        if module in FRONT_DOOR:
            continue  # it names what it opens lazily
        for line, target in imports(tree, module):
            if target.split(".")[0] != "pellucid" or target == "pellucid":
                continue
            if floor(target) > floor(module):
                wrong.append(f"{module}:{line} imports {target}")
    assert not wrong


def test_no_circles():
    """Imports inside functions and those for the type checker count: a reader follows them too."""
    graph = {
        module: {t for _, t in imports(tree, module) if t in MODULES} - {module, *FRONT_DOOR}
        for module, tree in TREES.items()
        if module not in FRONT_DOOR  # it names what it opens lazily
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules that import each other: {error.args[1]}")


# ── Imports ──────────────────────────────────────────────────────────────────────────────────────


def distribution(requirement: str) -> str:
    return re.split(r"[<>=!~ \[;]", requirement, maxsplit=1)[0].replace("-", "_").lower()


CORE = {distribution(line) for line in PROJECT["project"]["dependencies"]} | {"yaml"}  # pyyaml
OPTIONAL = {
    distribution(line)
    for lines in PROJECT["project"]["optional-dependencies"].values()
    for line in lines
} | {"google"}  # protobuf's import name


def foreign(tree: ast.AST, module: str) -> set[str]:
    names = {target.split(".")[0] for _, target in imports(tree, module)}
    return names - set(sys.stdlib_module_names) - {"pellucid"}


def test_what_is_imported_is_declared():
    undeclared = {m: foreign(tree, m) - CORE - OPTIONAL for m, tree in TREES.items()}
    assert not {module: names for module, names in undeclared.items() if names}


def test_optional_packages_are_imported_where_they_are_used():
    eager = {m: foreign(at_module_level(tree), m) - CORE for m, tree in TREES.items()}
    assert not {module: names for module, names in eager.items() if names}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_every_module_imports_silently_with_the_core_dependencies_alone():
    result = run_python(
        f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(OPTIONAL)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from importlib import import_module
import threading
for module in {sorted(set(MODULES) - {"pellucid.__main__"})!r}:
    import_module(module)
assert threading.active_count() == 1, threading.enumerate()
assert "matplotlib.pyplot" not in sys.modules, "pyplot at import"
"""
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ["pellucid", "pellucid.cli"])
def test_the_way_in_waits_for_nothing_heavy(module):
    result = run_python(
        f"import sys, {module}\n"
        "heavy = {'torch', 'numpy', 'rich', 'matplotlib', 'tokenizers', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert result.stdout == "[]\n", result.stderr


def test_the_lazy_front_door_opens():
    assert pellucid.load.__name__ == "load"
    assert {"load", "LanguageModel", "Trace"} <= set(pellucid.__all__)
    assert pellucid.tokenizers.__name__ == "pellucid.tokenizers"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pellucid.nothing


# ── Habits ───────────────────────────────────────────────────────────────────────────────────────


def test_printing_is_for_the_command_line():
    lint = PROJECT["tool"]["ruff"]["lint"]
    assert "T20" in lint["select"]  # ruff's rule against print
    assert "T20" not in lint.get("ignore", [])
    free = [glob for glob, rules in lint["per-file-ignores"].items() if "T20" in rules]
    assert sorted(free) == ["pellucid/cli/*", "tests/*"]
    assert "noqa: T20" not in "".join(path.read_text() for path in FILES)


def test_a_forward_pass_reads_no_environment():
    for module, tree in TREES.items():
        if floor(module) in (1, 2):
            reads = [
                ast.unparse(node)
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute | ast.Name)
                and ast.unparse(node).endswith(("environ", "getenv"))
            ]
            assert not reads, f"{module}: {reads}"


def test_taps_have_constant_leaves():
    """An f-string there would make the compiler build one graph per layer."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tap", "trace.tap"):
                leaf = node.args[1]
                assert isinstance(leaf, ast.Constant), f"{module}:{node.lineno}"


# Classes that still share a public name; the bench's Runners are one interface for each peer
SHARED_NAMES = {
    "Answer", "Engine", "Fault", "Layout", "Order", "Piece", "Place", "Row", "Run", "Runner",
    "Writer",
}  # fmt: skip


def test_a_class_name_has_one_meaning():
    homes: dict[str, list[str]] = {}
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    several = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert several.keys() <= SHARED_NAMES, several


ASKING = re.compile(
    r"""\bfamily\s*(?:==|!=|\bin\b)|isinstance\([^)]*\b(?:Llama|GPT)|\bis_llama\b"""
)


def asks_by_name(node: ast.AST) -> bool:
    """Whether a line compares something with the name of a family, or is called after such a test.

    `ModelConfig.rounding` has names of families and is a feature.
    """
    if isinstance(node, ast.Compare):
        words = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
        return bool(words & FAMILIES.keys()) and "rounding" not in ast.unparse(node)
    asked = isinstance(node, ast.FunctionDef) and re.match(
        r"_?(is|for|has)_.*(llama|gpt)", node.name
    )
    return bool(asked)


def test_nothing_is_compared_with_the_name_of_a_family():
    asking = {
        f"{module}:{node.lineno}": ast.unparse(node)[:80]
        for module, tree in TREES.items()
        if not module.startswith("pellucid.families")
        for node in ast.walk(tree)
        if asks_by_name(node)
    }
    assert not asking


def test_features_decide_and_families_do_not():
    """What a model computes follows from its config's features, not from the name of its family."""
    sources = [path for kind in ("*.py", "*.c", "*.h") for path in sorted(PACKAGE.rglob(kind))]
    asking = {
        f"{path.relative_to(PACKAGE)}:{number}": line.strip()
        for path in sources
        if not str(path.relative_to(PACKAGE)).startswith("families/")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if ASKING.search(line) and not line.strip().startswith("for ")
    }
    assert not asking


def test_the_type_checker_is_never_silenced():
    silenced = re.compile(r"#\s*(type:\s*ignore|pyright:)")
    assert not [str(path) for path in FILES if silenced.search(path.read_text())]


def test_test_files_have_names_of_their_own():
    """pytest imports them by their bare names, and so do the tests their helpers."""
    names: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name not in ("conftest.py", "__init__.py"):
            names.setdefault(path.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in names.items() if len(paths) > 1}


# ── The repository ───────────────────────────────────────────────────────────────────────────────


def tracked_files() -> list[Path]:
    result = subprocess.run(
        ["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if result.returncode:
        pytest.skip("no git repository here")
    return [ROOT / name for name in result.stdout.split("\0") if name]


OTHERS = ("tokenizer.model", "vocab.bpe", "encoder.json", "*.pth", "*.pt", "*.bin", "*.gguf")


def test_no_file_of_others_is_committed():
    assert not [path for path in tracked_files() if any(fnmatch(path.name, n) for n in OTHERS)]


@pytest.mark.assets
def test_no_test_asset_is_committed_under_another_name(assets):
    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    known = {digest(p): p for p in assets.rglob("*") if p.is_file() and p.stat().st_size > 1000}
    copies = [p for p in tracked_files() if p.is_file() and digest(p) in known]
    assert not copies


def test_a_commit_runs_the_checks_of_ci():
    """What `make lint` runs, which CI runs before the tests, and no more."""
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe
    linted = re.findall(r"\$\(BIN\)/(.+)", recipe[1])
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in config["repos"][0]["hooks"]]
    assert entries == [re.sub(r" --no-cache| \.$", "", line) for line in linted]
    assert re.search(r"^test: .*\blint\b", makefile, re.MULTILINE)
    assert "make --no-print-directory test" in (ROOT / ".ci" / "run").read_text()


def test_decisions_are_numbered_and_say_what_they_decide():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    for number, page in enumerate(pages, start=1):
        text = page.read_text()
        assert page.name.startswith(f"{number:04}-") and text.startswith(f"# {number}. ")
        assert "**Situation.**" in text and "**Decision.**" in text
        assert len(text.splitlines()) <= 40


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(name for name in headings if name != "Unreleased") == pellucid.__version__


def test_the_map_names_every_room_and_none_that_is_gone():
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = text.split("```")[1]
    parts = {name.split(".")[1] for name in MODULES if name.count(".") >= 1} - {"__main__"}
    rooms = {f"{part}/" if (PACKAGE / part).is_dir() else f"{part}.py" for part in parts}
    named = set(re.findall(r"^.{8}([a-z_]+(?:/|\.py)) ", drawn, re.MULTILINE))
    assert named == rooms
    floors = [floor(name) for name in room_order(drawn)]
    assert floors == sorted(floors, reverse=True), "the map draws the floors from the top down"


def room_order(drawn: str) -> list[str]:
    """The rooms of the map as module names, in the order of its lines."""
    found = re.findall(r"^.{8}([a-z_]+)(?:/|\.py) ", drawn, re.MULTILINE)
    return [f"pellucid.{name}" for name in found]

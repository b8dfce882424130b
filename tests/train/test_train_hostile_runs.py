"""Run folders of strangers: nothing in them is run, and what is wrong with them is one line."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import older_format
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

import pellucid
from pellucid import checkpoints
from pellucid.cli import main
from pellucid.train import Schedule, TrainConfig, TrainState
from pellucid.train.slices import digest
from pellucid.train.state import read_state

PACKAGE = Path(pellucid.__file__).parent
MODEL = ["--family=gpt2", "--vocab=300", "--width=16", "--layers=1", "--heads=2", "--context=16"]
STEPS = ["--steps=6", "--batch=4", "--warmup=2", "--precision=float32", "--stop=3"]
QUIET = ["--eval-every=4", "--sample-every=0", "--no-tensorboard", "--no-plot", "--json"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("begun")
    text = folder / "text.py"
    text.write_text("\n".join(f"def one_{n}(x):\n    return x + {n}\n" for n in range(40)))
    out = folder / "run"
    assert main(["train", "--data", str(text), "--out", str(out), *MODEL, *STEPS, *QUIET]) == 0
    return out


@pytest.fixture(scope="module")
def begun_before(begun: Path, tmp_path_factory) -> Path:
    """The same run, its state as several ranks of the version before wrote it."""
    out = tmp_path_factory.mktemp("before") / "run"
    shutil.copytree(begun, out, symlinks=True)
    last = out / "last"
    model = checkpoints.load_model(checkpoints.open_checkpoint(last), dtype=torch.float32)
    config = TrainConfig(schedule=Schedule(peak=1.0, final=1.0, warmup=0, steps=6))
    state = TrainState.load(last, model, config)
    torch.set_rng_state(state.random["cpu"])
    shutil.rmtree(last / "training")
    older_format.save(last.resolve(), model, state)
    return out


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run", symlinks=True))


@pytest.fixture
def run_before(begun_before: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun_before, tmp_path / "before", symlinks=True))


class Gadget:
    """What a pickle calls when it is read: here, something that leaves a mark."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def gadgets(marker: Path) -> dict[str, Any]:
    touch = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    dotted = b"\x80\x04\x8c\x24torch.distributed.checkpoint.metadata\x8c\x0fMetadata.__init__\x93."
    return {
        "system": Gadget(subprocess.getoutput, f"touch {marker}"),
        "eval": Gadget(eval, touch),
        "exec": Gadget(exec, touch),
        "open": Gadget(open, str(marker), "w"),
        "partial": Gadget(partial(open, str(marker), "w")),
        "getattr": Gadget(getattr, Path(marker), "touch"),
        "torch.load": Gadget(torch.load, str(marker)),
        "dotted": dotted,
    }


def refused(run: Path, marker: Path, capsys, said: str = "") -> None:
    """`--resume` ends with status 2 and one line; nothing was run."""
    capsys.readouterr()
    assert main(["train", "--out", str(run), "--resume", "--stop=6", "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert said in printed.err
    assert not marker.exists()


def note_checksums(run: Path) -> None:
    """Make the checksums of a state of before fit its files, as whoever changed them would."""
    inside = run / "last" / "sharded"
    facts = json.loads((inside / "facts.json").read_text())
    facts["sha256"] = {file.name: digest(file) for file in inside.glob("__*.distcp")}
    (inside / "facts.json").write_text(json.dumps(facts))


def test_a_run_of_before_goes_on_bit_for_bit(run: Path, run_before: Path, tmp_path: Path):
    whole = shutil.copytree(run, tmp_path / "whole", symlinks=True)
    for out in (whole, run_before):
        assert main(["train", "--out", str(out), "--resume", "--stop=6", "--json"]) == 0
    one, other = (checkpoints.open_checkpoint(out / "last").weights for out in (whole, run_before))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (run_before / "last" / "training" / "state.json").is_file()


@pytest.mark.parametrize("name", gadgets(Path("marker")))
def test_metadata_of_a_stranger_runs_nothing(name: str, run_before: Path, tmp_path: Path, capsys):
    marker = tmp_path / "marker"
    gadget = gadgets(marker)[name]
    data = gadget if isinstance(gadget, bytes) else pickle.dumps(gadget)
    (run_before / "last" / "sharded" / ".metadata").write_bytes(data)
    refused(run_before, marker, capsys, "refused, nothing of it was run")


@pytest.mark.parametrize("place", ["planner_data", "storage_data", "storage_meta", "state_dict"])
def test_a_gadget_inside_true_metadata_runs_nothing(
    place: str, run_before: Path, tmp_path: Path, capsys
):
    marker, path = tmp_path / "marker", run_before / "last" / "sharded" / ".metadata"
    metadata: Any = pickle.loads(path.read_bytes())
    gadget = Gadget(open, str(marker), "w")
    if place == "state_dict":
        metadata.state_dict_metadata["more"] = gadget
    elif place == "storage_data":
        metadata.storage_data["more"] = gadget
    else:
        setattr(metadata, place, gadget)
    path.write_bytes(pickle.dumps(metadata))
    refused(run_before, marker, capsys, "it asks for ")


def test_classes_that_are_let_in_do_nothing(run_before: Path, tmp_path: Path, capsys):
    """Each class that a .metadata may name, called with a file and given it as state."""
    marker = tmp_path / "marker"
    path = run_before / "last" / "sharded" / ".metadata"
    path.write_bytes(
        b"\x80\x02ctorch.serialization\n_get_layout\n(X"
        + len(str(marker)).to_bytes(4, "little")
        + str(marker).encode()
        + b"tR}X\x04\x00\x00\x00loadK\x01sb."
    )
    refused(run_before, marker, capsys, ".metadata is damaged")


def archive(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", [name for name in gadgets(Path("marker")) if name != "dotted"])
@pytest.mark.parametrize("kind", ["tensor", "bytes", "new bytes", "plain pickle"])
def test_a_slice_of_a_stranger_runs_nothing(
    name: str, kind: str, run_before: Path, tmp_path: Path, capsys
):
    """In the place of a tensor, of a value that is none, and of one that was not there before."""
    marker, inside = tmp_path / "marker", run_before / "last" / "sharded"
    gadget = gadgets(marker)[name]
    data = pickle.dumps(gadget) if kind == "plain pickle" else archive(gadget)
    metadata: Metadata = pickle.loads((inside / ".metadata").read_bytes())
    stored: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
    file = inside / "__0_0.distcp"
    hostile = _StorageInfo(file.name, file.stat().st_size, len(data))
    with file.open("ab") as opened:
        opened.write(data)
    if kind == "new bytes":
        metadata.state_dict_metadata["more"] = BytesStorageMetadata()
        stored[MetadataIndex("more")] = hostile
    else:
        of_bytes = [index for index in stored if (index.offset is None) == (kind == "bytes")]
        of_state = [index for index in of_bytes if index.fqn.startswith("optimizer.")]
        stored[of_state[0]] = hostile
    (inside / ".metadata").write_bytes(pickle.dumps(metadata))
    note_checksums(run_before)
    refused(run_before, marker, capsys, "refused, nothing of it was run")


def test_files_elsewhere_are_not_read(run_before: Path, tmp_path: Path, capsys):
    marker, inside = tmp_path / "marker", run_before / "last" / "sharded"
    metadata: Metadata = pickle.loads((inside / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"../sharded/{place.relative_path}"
    (inside / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(run_before, marker, capsys, "is not the name of a file beside it")


def test_a_pickle_under_another_name_is_refused(run: Path, tmp_path: Path, capsys):
    marker, file = tmp_path / "marker", run / "last" / "training" / "state.safetensors"
    file.write_bytes(pickle.dumps(gadgets(marker)["open"]))
    refused(run, marker, capsys, "state.safetensors is damaged")
    document = run / "last" / "training" / "state.json"
    facts = json.loads(document.read_text())["facts"]
    facts["sha256"]["training/state.safetensors"] = digest(file)
    write_facts(document, facts)
    refused(run, marker, capsys, "not a whole safetensors file")


def write_facts(document: Path, facts: Any) -> None:
    """``state.json`` with facts of a stranger's, and a checksum that fits them."""
    from pellucid.train.state import _digest_of

    whole = {"format": 2, "sha256_of_facts": _digest_of(facts), "facts": facts}
    document.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda facts: facts.update(step="3"), "step = '3'"),
        (lambda facts: facts.update(step=-3), "step = -3"),
        (lambda facts: facts.pop("extra"), "does not say extra"),
        (
            lambda facts: facts.update(sha256={"../../config.toml": ""}),
            "no file of this checkpoint",
        ),
        (lambda facts: facts.update(sha256=[]), "no checksums"),
        (lambda facts: facts.update(tensors=3), "index of tensors"),
        (lambda facts: facts["tensors"]["random.0.cpu"].update(dtype="load"), "index of tensors"),
        (
            lambda facts: facts["tensors"]["random.0.cpu"].update(slices={"../x": [0]}),
            "is not the name of a file beside it",
        ),
        (lambda facts: facts["tensors"]["random.0.cpu"].update(slices={}), "0 of 5056 values"),
        (lambda facts: facts["optimizer_steps"].update({"norm.weight": "1"}), "optimizer_steps"),
        (lambda facts: facts["tensors"].pop("exp_avg.norm.weight"), "not at all, the model (16,)"),
    ],
)
def test_facts_of_a_stranger_are_one_line(change, said, run: Path, tmp_path: Path, capsys):
    document = run / "last" / "training" / "state.json"
    facts = json.loads(document.read_text())["facts"]
    change(facts)
    write_facts(document, facts)
    refused(run, tmp_path / "marker", capsys, said)


def test_deep_json_is_one_line(run: Path, tmp_path: Path, capsys):
    (run / "last" / "training" / "state.json").write_text("[" * 200_000)
    refused(run, tmp_path / "marker", capsys, "state.json is damaged")


def test_a_flipped_bit_in_the_facts_is_found(run: Path):
    """Of the facts, each bit of every seventh byte: refused, or what was written all the same."""
    document = run / "last" / "training" / "state.json"
    whole, _ = read_state(run / "last")
    data = document.read_bytes()
    refusals = 0
    for place in range(0, len(data), 7):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            document.write_bytes(flipped)
            try:
                assert read_state(run / "last")[0] == whole
            except (ValueError, OSError):
                refusals += 1
    assert refusals > len(data) * 8 / 7 / 2  # white space may become other white space


@pytest.mark.parametrize(("old", "new"), [("A training run", "B training run"), ("0.003", "0.002")])
def test_changed_settings_are_found(old: str, new: str, run: Path, tmp_path: Path, capsys):
    config = run / "config.toml"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    refused(run, tmp_path / "marker", capsys, "config.toml is not what this run wrote")


# ── The package ──────────────────────────────────────────────────────────────────────────────────

UNPICKLES = ("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads")
UNPICKLES += ("shelve.open", "joblib.load", "dill.load", "dill.loads", "cloudpickle.load")
ALLOWED = {
    "train/older_state.py": {"pickle.Unpickler"},  # the restricted reader tested above
}


def test_nothing_else_in_the_package_unpickles():
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(str(path.relative_to(PACKAGE)), set()).update(unpickling(node))
    assert {path: names for path, names in found.items() if names} == ALLOWED


def unpickling(node: ast.AST) -> set[str]:
    """What a piece of syntax does that may run what a file says."""
    if isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        hidden = names & set(UNPICKLES)  # under its bare name it would not be seen below
        return hidden | {n for n in names if n.startswith("torch.distributed.checkpoint")}
    if isinstance(node, ast.Attribute) and ast.unparse(node) in UNPICKLES:
        return {ast.unparse(node)}
    if not isinstance(node, ast.Call):
        return set()
    called = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called == "torch.load" and options.get("weights_only") != "True":
        return {called}
    if called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
        return {called}
    return {called} & {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "from pickle import loads",
        "from torch.distributed.checkpoint.filesystem import FileSystemReader",
        "class Reader(pickle.Unpickler): pass",
    ],
)
def test_that_test_would_see_it(line: str):
    assert any(unpickling(node) for node in ast.walk(ast.parse(line)))

"""Damaged folders and GGUF files: one line that names the file, status 2, and nothing is lost.

Each is converted, which reads every key and every weight: the source stays as it is, and no target
is left behind. One small model of each kind is made once and damaged anew for each test.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAMA, random_model

from pellucid import checkpoints
from pellucid.checkpoints.formats.gguf_tokenizer import NONE
from pellucid.checkpoints.formats.gguf_writing import write_gguf
from pellucid.cli import main

Damage = Callable[[Path], Any]
MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """A folder with a model as Hugging Face has it, and the same as a GGUF file."""
    place = tmp_path_factory.mktemp("healthy")
    state = random_model(LLAMA, torch.float32).state_dict()
    checkpoints.save(place / "hf", LLAMA, state)
    write_gguf(place / "model.gguf", LLAMA, state.__getitem__, "F32", NONE)
    return place


def contents(source: Path) -> dict[str, bytes]:
    files = source.rglob("*") if source.is_dir() else [source]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


def refused(source: Path, target: Path, said: str, capsys) -> None:
    """The conversion ends with one line that says so, and leaves everything as it was."""
    before = contents(source)
    layout = "hf" if target.suffix != ".gguf" else "gguf"
    assert main(["convert", str(source), str(target), "--to", layout]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 600, error
    assert said in error, error
    assert not target.exists() and contents(source) == before
    assert not [each for each in target.parent.iterdir() if each.name.startswith((".", "tmp"))]


# ── Folders ───────────────────────────────────────────────────────────────────────────────────────


def key(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stated, **changes}))

    return damage


def config(text: str) -> Damage:
    return lambda folder: (folder / "config.json").write_text(text)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / MODEL)
        change(found)
        save_file(found, folder / MODEL)

    return damage


def of_bytes(change: Callable[[bytearray], Any], file: str = MODEL) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / file if folder.is_dir() else folder
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return damage


def index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """The weights in a file of another name, and an index to it, changed."""

    def damage(folder: Path) -> None:
        stated = {"weight_map": dict.fromkeys(load_file(folder / MODEL), "one.safetensors")}
        (folder / MODEL).rename(folder / "one.safetensors")
        change(stated)
        (folder / f"{MODEL}.index.json").write_text(json.dumps(stated))

    return damage


def _header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """The names, shapes and places at the beginning of the safetensors file, changed."""

    def damage(data: bytearray) -> None:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8 : 8 + size]))
        change(header)
        text = json.dumps(header).encode()
        data[: 8 + size] = len(text).to_bytes(8, "little") + text

    return of_bytes(damage)


def _mapped(file: Any) -> Damage:
    return index(lambda stated: stated["weight_map"].update({UP: file}))


UP = "model.layers.0.mlp.up_proj.weight"
FOLDERS: dict[str, tuple[Damage, str]] = {
    "a width in words": (key(hidden_size="36"), "hidden_size is '36'; expected a whole number"),
    "half a width": (key(hidden_size=36.5), "hidden_size is 36.5"),
    "a number that is a truth": (key(num_hidden_layers=True), "num_hidden_layers is True"),
    "no heads": (key(num_attention_heads=0), "n_heads is 0: expected 1 or more"),
    "heads that cannot share": (key(num_key_value_heads=3), "4 query heads cannot share 3"),
    "fewer than no layers": (key(num_hidden_layers=-2), "n_layers is -2: expected 1 or more"),
    "a billion layers": (key(num_hidden_layers=10**9), "num_hidden_layers is"),
    "an enormous vocabulary": (key(vocab_size=10**12), "expected (1000000000000, 36)"),
    "an epsilon in words": (key(rms_norm_eps="small"), "rms_norm_eps is 'small'"),
    "an epsilon that is no number": (key(rms_norm_eps=float("nan")), "rms_norm_eps is not finite"),
    "RoPE as a list": (key(rope_parameters=[1e4]), "rope_parameters is [10000.0]"),
    "an unknown RoPE": (
        key(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "unknown rope type 'spiral'",
    ),
    "a key that is not computed": (key(add_cross_attention=True), "add_cross_attention is True"),
    "a head tied by a word": (key(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
    "a type that is a number": (key(model_type=7), "model_type is 7"),
    "an unknown quantisation": (
        key(quantization_config={"quant_method": "marlin", "bits": 4}),
        "the weights are quantised (quantization_config)",
    ),
    "a config that is a list": (config("[1, 2]"), "config.json"),
    "a config cut short": (config('{"model_type": "llama", "hidd'), "config.json"),
    "an empty config": (config(""), "config.json"),
    "a config that is deep": (config("[" * 100_000), "config.json"),
    "a tensor too many": (
        tensors(lambda t: t.update({"model.layers.0.spin.weight": torch.zeros(3)})),
        "model.layers.0.spin.weight",
    ),
    "a tensor too few": (tensors(lambda t: t.pop(UP)), UP),
    "a tensor of another shape": (tensors(lambda t: t.update({UP: torch.zeros(56, 35)})), UP),
    "a tensor turned": (tensors(lambda t: t.update({UP: t[UP].t().contiguous()})), UP),
    "a tensor of whole numbers": (tensors(lambda t: t.update({UP: t[UP].long()})), UP),
    "a layer too many": (
        tensors(lambda t: t.update({UP.replace("0", "2"): t[UP].clone()})),
        UP.replace("0", "2"),
    ),
    "weights cut short": (of_bytes(lambda data: data.__delitem__(slice(-999, None))), MODEL),
    "weights of no bytes": (of_bytes(bytearray.clear), MODEL),
    "a header longer than the file": (
        of_bytes(lambda data: data.__setitem__(slice(0, 8), (1 << 60).to_bytes(8, "little"))),
        MODEL,
    ),
    "a header that is no JSON": (of_bytes(lambda data: data.__setitem__(9, 0x21)), MODEL),
    "a tensor beyond the end": (
        _header(lambda h: h[UP].update(data_offsets=[0, 1 << 50])),
        MODEL,
    ),
    "a tensor of an unknown type": (_header(lambda h: h[UP].update(dtype="F3")), MODEL),
    "a shape that its bytes do not have": (_header(lambda h: h[UP].update(shape=[7, 7])), MODEL),
    "an index without a map": (index(dict.clear), f"{MODEL}.index.json"),
    "an index to a missing file": (_mapped("two.safetensors"), "two.safetensors"),
    "an index that leads outside": (
        _mapped("../../x.safetensors"),
        "expected a weight_map from tensor names",
    ),
    "an index of numbers": (_mapped(3), f"{MODEL}.index.json"),
    "an index without a tensor": (index(lambda stated: stated["weight_map"].pop(UP)), UP),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_damaged_folder(name, healthy, tmp_path, capsys):
    damage, said = FOLDERS[name]
    folder = tmp_path / "in" / "hf"
    shutil.copytree(healthy / "hf", folder)
    damage(folder)
    (tmp_path / "out").mkdir()
    refused(folder, tmp_path / "out" / "model.gguf", said, capsys)


# ── GGUF ──────────────────────────────────────────────────────────────────────────────────────────


def put(after: bytes, more: int, layout: str, *values: int) -> Damage:
    """Numbers over what stands `more` bytes behind the first place of a name."""

    def damage(data: bytearray) -> None:
        place = data.index(after) + len(after) + more
        struct.pack_into(f"<{layout}", data, place, *values)

    return of_bytes(damage)


def stating(**keys: Any) -> Damage:
    """The file written anew with these keys, ``__`` for a dot."""

    def damage(path: Path) -> None:
        own = {name.replace("__", "."): value for name, value in keys.items()}
        state = random_model(LLAMA, torch.float32).state_dict()
        write_gguf(path, LLAMA, state.__getitem__, "F32", {**NONE, **own})

    return damage


def cut(share: float) -> Damage:
    return of_bytes(lambda data: data.__delitem__(slice(round(share * len(data)), None)))


def renamed(old: bytes, new: bytes) -> Damage:
    def damage(data: bytearray) -> None:
        assert len(old) == len(new)
        place = data.index(old)
        data[place : place + len(old)] = new

    return of_bytes(damage)


NAME = b"blk.0.ffn_up.weight"
KEY = b"llama.embedding_length"
TOKENS = {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "gpt-2"}
FILES: dict[str, tuple[Damage, str]] = {
    "cut in its keys": (cut(0.005), "cut short or damaged"),
    "cut in its tensors": (cut(0.5), "cut short"),
    "four bytes": (of_bytes(lambda data: data.__delitem__(slice(4, None))), "cut short"),
    "a version of the future": (put(b"GGUF", 0, "I", 9), "version 9"),
    "tensors that are not there": (put(b"GGUF", 4, "Q", 1 << 50), "cut short or damaged"),
    "keys that are not there": (put(b"GGUF", 12, "Q", (1 << 64) - 1), "cut short or damaged"),
    "a name of a petabyte": (put(b"GGUF", 20, "Q", 1 << 50), "a key's name would take"),
    "a string of a petabyte": (put(b"general.architecture", 4, "Q", 1 << 50), "cut short"),
    "a value of an unknown type": (put(KEY, 0, "I", 77), "unknown type 77"),
    "a list of lists": (put(KEY, 0, "IIQ", 9, 9, 2), "unknown type 9"),
    "a list of an exabyte": (put(KEY, 0, "IIQ", 9, 5, 1 << 60), "numbers of llama.embedding"),
    "strings of an exabyte": (put(KEY, 0, "IIQ", 9, 8, 1 << 60), "strings of llama.embedding"),
    "a width of another kind": (put(KEY, 0, "If", 6, 36), "llama.embedding_length is"),
    "another width": (put(KEY, 4, "I", 40), "token_embd.weight"),
    "no width": (put(KEY, 4, "I", 0), "is 0"),
    "a tensor of no axes": (put(NAME, 0, "I", 0), "has 0 axes; expected 1 to 4"),
    "a tensor of five axes": (put(NAME, 0, "I", 5), "has 5 axes; expected 1 to 4"),
    "a shape that overflows": (put(NAME, 4, "QQ", 1 << 40, 1 << 40), "cut short"),
    "rows and columns exchanged": (put(NAME, 4, "QQ", 56, 36), NAME.decode()),
    "an unknown quantisation": (put(NAME, 20, "I", 31), "has the unknown type 31"),
    "a quantisation of other blocks": (put(NAME, 20, "I", 12), "blocks of 256 values"),
    "a tensor at an odd place": (put(NAME, 24, "Q", 33), "no multiple of 32"),
    "a tensor inside another": (put(NAME, 24, "Q", 0), "inside"),
    "a tensor beyond the end": (put(NAME, 24, "Q", 1 << 40), "cut short"),
    "a tensor twice": (renamed(NAME, b"blk.1.ffn_up.weight"), "stands there twice"),
    "a tensor of another name": (renamed(NAME, b"blk.0.ffn_xx.weight"), NAME.decode()),
    "an encoder": (renamed(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0clip!"), "'clip!'"),
    "layers that are not there": (stating(llama__block_count=9), "blk.2."),
    "a million layers": (stating(llama__block_count=1_000_000), "block_count is 1000000"),
    "no heads": (stating(llama__attention__head_count=0), "n_heads is 0"),
    "heads in words": (stating(llama__attention__head_count="four"), "head_count is"),
    "experts": (stating(llama__expert_count=8), "llama.expert_count is set"),
    "an unknown key": (stating(llama__attention__spin=2.0), "unknown key llama.attention.spin"),
    "an unknown scaling": (stating(llama__rope__scaling__type="spiral"), "spiral"),
    "an odd alignment": (stating(general__alignment=24), "general.alignment is 24"),
    "half of a split file": (stating(split__count=2), "one of 2 parts"),
    "tokens that are numbers": (
        stating(**TOKENS, tokenizer__ggml__tokens=[1, 2]),
        "expected a token and",
    ),
    "fewer tokens than rows": (
        stating(**TOKENS, tokenizer__ggml__tokens=["a"], tokenizer__ggml__token_type=[1, 1]),
        "token",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_gguf_file(name, healthy, tmp_path, capsys):
    damage, said = FILES[name]
    path = tmp_path / "in.gguf"
    shutil.copy(healthy / "model.gguf", path)
    damage(path)
    (tmp_path / "out").mkdir()
    refused(path, tmp_path / "out" / "hf", said, capsys)

"""Nothing is read before it is asked for, nothing is held twice, nothing is written to disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import checkpoint_writers as writers
import pytest
import torch

from pellucid import checkpoints
from pellucid.checkpoints import files, load

LAYOUTS = ("hf", "meta", "meta2")


@pytest.fixture
def folder(request, tmp_path):
    """The tiny Llama in one of the layouts."""
    if request.param == "hf":
        return writers.write_hf(tmp_path, writers.LLAMA_JSON, writers.random_llama(), files=2)
    shards = 1 if request.param == "meta" else 2
    return writers.write_meta(tmp_path, writers.PARAMS_JSON, writers.random_llama(), shards)


in_each_layout = pytest.mark.parametrize("folder", LAYOUTS, indirect=True)


@in_each_layout
def test_only_the_tensor_asked_for_is_read(folder, monkeypatch):
    checkpoint = checkpoints.open_checkpoint(folder)
    read = []
    for kind in (files.SafetensorsFile, files.PthFile):
        plain = kind.read
        monkeypatch.setattr(
            kind, "read", lambda self, name, plain=plain: read.append(name) or plain(self, name)
        )
    weights = checkpoint.weights
    shapes = {name: weights.shape(name) for name in weights}
    assert {weights.dtype(name) for name in weights} == {torch.float32}
    assert checkpoint.dtype == torch.float32
    assert read == []
    name = "layers.1.mlp.down_proj.weight"
    tensor = weights[name]
    assert set(read) == {weights.stored_name(name)}
    assert tuple(tensor.shape) == shapes[name]


@in_each_layout
def test_weights_are_read_ahead_in_the_background(folder, monkeypatch):
    read = []
    monkeypatch.setattr(load, "read_pages", lambda tensor: read.append(tensor.data_ptr()))
    monkeypatch.setattr(load.threading.Thread, "start", load.threading.Thread.run)
    model = checkpoints.load_model(checkpoints.open_checkpoint(folder))
    names = [*list(model.state_dict())[1:], "embed.weight"]  # the embedding last
    assert read == [model.state_dict()[name].data_ptr() for name in names]


@in_each_layout
def test_training_in_place_reaches_neither_file_nor_checkpoint(folder):
    before = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    checkpoint = checkpoints.open_checkpoint(folder)
    untouched = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
    model, other = (checkpoints.load_model(checkpoint) for _ in range(2))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(isinstance(each, torch.nn.Parameter) for each in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    optimizer.step()
    changed = [
        name
        for name, parameter in model.state_dict().items()
        if not torch.equal(parameter, untouched[name])
    ]
    assert len(changed) == len(untouched)
    for name, tensor in untouched.items():
        assert torch.equal(checkpoint.weights[name], tensor), name
        assert torch.equal(other.state_dict()[name], tensor), name
    assert {path: path.read_bytes() for path in sorted(folder.iterdir())} == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize(
    ("folder", "copies"),
    [("hf", 0), ("meta", 2 * writers.LAYERS)],  # q and k of each layer, re-ordered
    indirect=["folder"],
)
def test_parameters_are_the_mapped_file_itself(folder, copies):
    model = checkpoints.load_model(checkpoints.open_checkpoint(folder))
    ranges = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            place, access, *_, path = line.split(maxsplit=5)
            if path.startswith(str(folder)):
                assert access == "rw-p", "private: copy on write"
                begin, end = place.split("-")
                ranges.append(range(int(begin, 16), int(end, 16)))
    mapped = {
        name: any(tensor.data_ptr() in each for each in ranges)
        for name, tensor in model.state_dict().items()
    }
    assert list(mapped.values()).count(False) == copies
    assert all(
        name.endswith(("q_proj.weight", "k_proj.weight")) for name in mapped if not mapped[name]
    )


def test_opening_stays_light(tmp_path):
    """Building on the meta device must not import torch's symbolic shapes, which take a second."""
    writers.write_hf(tmp_path, writers.LLAMA_JSON, writers.random_llama())
    program = (
        "import sys; from pellucid.checkpoints import load_model, open_checkpoint\n"
        f"load_model(open_checkpoint({str(tmp_path)!r}))\n"
        "print({'sympy', 'torch._dynamo', 'huggingface_hub', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@in_each_layout
def test_converts_to_another_dtype(folder):
    checkpoint = checkpoints.open_checkpoint(folder)
    model = checkpoints.load_model(checkpoint, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, checkpoint.weights[name].bfloat16()), name


def test_mixed_dtypes_become_the_one_most_weights_have(tmp_path):
    weights = writers.random_llama(dtype=torch.bfloat16)
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    checkpoint = checkpoints.open_checkpoint(
        writers.write_hf(tmp_path, writers.LLAMA_JSON, weights)
    )
    assert checkpoint.weights.dtype("norm.weight") == torch.float32
    assert checkpoint.dtype == torch.bfloat16
    model = checkpoints.load_model(checkpoint)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_forgotten_pages_come_back_from_the_file(tmp_path):
    large = torch.arange(100_000, dtype=torch.float32)
    torch.save({"a": large, "b": large + 1}, tmp_path / "x.pth")
    file = files.PthFile(tmp_path / "x.pth")
    a = file.read("a")
    assert torch.equal(a, large)
    files.forget_pages(a)
    files.forget_pages(a[:10])  # less than a page: nothing to do
    files.forget_pages(torch.empty(0))
    for tensor in (a, a[:10], a.view(1000, 100).t(), torch.empty(0)):
        files.read_pages(tensor)
    assert torch.equal(a, large)
    assert torch.equal(file.read("b"), large + 1)


def test_parameter_names_that_do_not_exist(tmp_path):
    weights = checkpoints.open_checkpoint(
        writers.write_hf(tmp_path, writers.LLAMA_JSON, writers.random_llama())
    ).weights
    assert "unembed.bias" not in weights
    with pytest.raises(KeyError, match=r"no parameter 'unembed\.bias'"):
        weights["unembed.bias"]

"""``pellucid info``: from a shape, a folder, a bare config file; never from weights."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from rich.console import Console

from pellucid.checkpoints.model_report import model_report
from pellucid.cli import main
from pellucid.show.info_terminal import print_report


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["info", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_sum_and_the_diagram(capsys):
    status, out, err = run(capsys, "book-gpt")
    assert (status, err) == (0, "")
    assert "+ 12 blocks × 7,085,568 + norm 1,536 + head 38,597,376 = 163,009,536" in out
    assert "LayerNorm" in out
    assert "╭" not in run(capsys, "book-gpt", "--no-diagram")[1]


def test_json_is_one_object(capsys):
    status, out, _ = run(capsys, "llama-3-8b", "--json", "--tokens", "17")
    values = json.loads(out)
    assert status == 0
    assert values["parameters"]["total"] == 8_030_261_248
    assert values["config"]["rope"]["theta"] == 500000.0
    assert values["flops"]["tokens"] == 17


def test_a_picture(capsys, tmp_path: Path):
    picture = tmp_path / "gpt2.svg"
    assert run(capsys, "gpt2", "--no-diagram", "--svg", str(picture))[0] == 0
    assert picture.read_text("utf-8").startswith("<svg")


def test_bare_config_files(capsys, tmp_path: Path):
    hugging_face = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 9}
    hugging_face |= {"n_positions": 16, "activation_function": "gelu_new"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hugging_face))
    assert json.loads(run(capsys, str(path), "--json")[1])["config"]["width"] == 8
    meta = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 50, "multiple_of": 8}
    path = tmp_path / "params.json"
    path.write_text(json.dumps({**meta, "norm_eps": 1e-5}))
    assert json.loads(run(capsys, str(path), "--json")[1])["config"]["hidden_width"] == 176


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object, found a list"),
        ('{"model_type": "bert"}', "model_type is 'bert'"),
        ('{"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": -1}', "left to the weights"),
    ],
)
def test_broken_config_files(capsys, tmp_path: Path, text: str, message: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    status, out, err = run(capsys, str(path))
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_errors(capsys):
    assert "or a shape: gpt2" in run(capsys, "no-such-model")[2]
    assert "1025 tokens: expected 1 to 1024" in run(capsys, "gpt2", "--tokens", "1025")[2]
    assert run(capsys, "gpt2", "--tokens", "0")[0] == 2


@pytest.mark.assets
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_folder(capsys, assets: Path, layout: str):
    out = run(capsys, str(assets / "stories260K" / layout), "--json")[1]
    assert json.loads(out)["parameters"]["total"] == 260_032


def test_a_folder_with_params_json_alone(tmp_path: Path, capsys):
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 40, "multiple_of": 32}
    (tmp_path / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-5}))
    assert main(["info", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    # embedding and head 40 · 32 each; a block 4 · 32² + 3 · 32 · 96 + 2 · 32; a norm
    assert told["parameters"]["total"] == 2 * 40 * 32 + 2 * (4 * 32**2 + 3 * 32 * 96 + 64) + 32
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    assert main(["info", str(tmp_path)]) == 2
    assert "vocab_size is left to the weights" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "said"), [("Q4_1", True), ("F16", False)])
def test_blocks_that_c_does_not_read_as_stored_are_told(kind, said):
    report = replace(model_report("book-gpt"), stored={kind: (3, 99), "F32": (1, 4)})
    out = io.StringIO()
    print_report(Console(file=out, width=120), report)
    assert f"3 in {kind}" in out.getvalue()
    assert ("the decoder in C reads none as stored" in out.getvalue()) == said


def test_sizes_that_no_machine_has_are_one_line(tmp_path, capsys):
    """Without files of weights nothing but the config says how large a model is."""
    demos = Path(str(files("pellucid"))) / "demos"
    config = json.loads((demos / "demo" / "config.json").read_text())
    for key in ("num_attention_heads", "vocab_size", "intermediate_size"):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: 2 * 10**30}))
        for verb in ("info", "plan"):
            assert main([verb, str(tmp_path)]) == 2
            said = capsys.readouterr().err
            assert "no tensor can be this large" in said and said.count("\n") == 1

"""``pellucid finetune --adapter FOLDER``: fine-tuning goes on from adapters that are there."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pellucid
from pellucid.checkpoints.formats.peft import TENSORS
from pellucid.cli import main
from pellucid.models import adapters as lora
from pellucid.tokenizers import TemplateChat
from pellucid.train.finetune import entry
from pellucid.train.finetune.run import Finetuning

STEPS = ("--steps=3", "--batch=4", "--warmup=0", "--lr=2e-3", "--precision=float32", "--context=48")
WORDS = ("import", "return", "class", "def", "print", "yield")


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of each kind."""
    folder, words = tmp_path_factory.mktemp("data"), WORDS * 4
    rows = {
        "instructions": [{"instruction": "Say", "input": w, "output": w} for w in words],
        "classification": [
            {"text": f"{n} {w}", "label": "d" if w == "def" else "other"}
            for n, w in enumerate(words)
        ],
        "preferences": [
            {"prompt": f"{w} ", "chosen": f"{n}", "rejected": "no"} for n, w in enumerate(words)
        ],
    }
    return {name: written(folder / f"{name}.jsonl", rows[name]) for name in rows}


def finetune(model: str, data: str, out: Path, *more: str) -> None:
    assert main(["finetune", model, "--data", data, "--out", str(out), *STEPS, *more]) == 0


@pytest.fixture(scope="module")
def first(data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with adapters on each demo: instructions on one, labels on the other."""
    folder = tmp_path_factory.mktemp("first")
    finetune("demo", data["instructions"], folder / "demo", "--lora=2", "--alpha=6", "--json")
    more = ("--lora=2", "--targets", "attention", "--json")
    finetune("demo-gpt2", data["classification"], folder / "demo-gpt2", *more)
    return {demo: folder / demo for demo in ("demo", "demo-gpt2")}


def losses(out: Path) -> list[float]:
    with (out / "log.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("demo", "kind"), [("demo", "instructions"), ("demo-gpt2", "classification")]
)
def test_it_begins_where_the_first_run_ended(demo, kind, first, data, tmp_path: Path, monkeypatch):
    runs = []
    prepare = entry.prepare
    monkeypatch.setattr(
        entry,
        "prepare",
        lambda *given, **more: runs.append(prepare(*given, **more)) or runs[-1],
    )
    began = {}

    def judged(self):  # the adapters as they are before the first step
        began.update({p: (a.a.clone(), a.b.clone()) for p, a in lora.adapters(self.model).items()})
        begin(self)

    begin = Finetuning.begin
    monkeypatch.setattr(Finetuning, "begin", judged)
    adapter = first[demo] / "adapter"
    finetune(demo, data[kind], tmp_path / "out", "--adapter", str(adapter), "--json")
    stored = lora.adapters(pellucid.load(demo, adapter=adapter).model)
    assert began.keys() == stored.keys()
    for path, (a, b) in began.items():
        assert torch.equal(a, stored[path].a)
        assert torch.equal(b, stored[path].b)
        assert b.abs().max() > 0
    (run,) = runs
    now = lora.adapters(run.model)
    assert {path: (x.rank, x.scale) for path, x in now.items()} == {
        path: (x.rank, x.scale) for path, x in stored.items()
    }
    assert not torch.equal(now["layers.0.attn.q_proj"].b, stored["layers.0.attn.q_proj"].b)
    before = tensors_of(adapter)
    after = tensors_of(tmp_path / "out" / "adapter")
    assert before.keys() == after.keys()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / TENSORS)


def test_its_first_loss_is_that_of_the_merged_model(first, data, tmp_path: Path, capsys):
    adapter, dtype = first["demo"] / "adapter", "--dtype=float32"
    lm = pellucid.load("demo", dtype="float32", adapter=adapter)
    lora.fold(lm.model)
    pellucid.checkpoints.save(
        tmp_path / "merged",
        lm.config,
        lm.model.state_dict(),
        tokenizer_from=lm.checkpoint.folder,
        dtype=torch.float32,
    )
    template = adapter / "chat_template.jinja"
    (tmp_path / "merged" / template.name).write_bytes(template.read_bytes())
    file = data["instructions"]
    finetune("demo", file, tmp_path / "a", "--adapter", str(adapter), dtype, "--json")
    finetune(str(tmp_path / "merged"), file, tmp_path / "b", "--lora=2", dtype, "--json")
    finetune("demo", file, tmp_path / "c", "--lora=2", dtype, "--json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    before = [one["held_out_loss_before"] for one in found]
    assert before[0] == pytest.approx(before[1], abs=1e-5)
    assert before[0] < before[2] - 0.1
    at_first = [losses(tmp_path / name)[0] for name in "abc"]
    assert at_first[0] == pytest.approx(at_first[1], abs=2e-4)  # the log has four digits
    assert at_first[0] < at_first[2] - 0.1
    # one conversation, one format: a merged model speaks it as its own
    assert [one["chat_format"] for one in found] == ["plain"] * 3
    assert (tmp_path / "a" / "adapter" / template.name).read_text() == template.read_text()


def test_preferences_are_measured_from_where_it_begins(first, data, tmp_path: Path, capsys):
    more = ("--adapter", str(first["demo"] / "adapter"), "--lora=2", "--alpha=6", "--json")
    finetune("demo", data["preferences"], tmp_path / "out", *more)
    found = json.loads(capsys.readouterr().out)
    assert found["held_out_loss_before"] == pytest.approx(0.693147, abs=1e-6)  # log 2: no margin
    spoken = tmp_path / "out" / "adapter" / "chat_template.jinja"
    assert spoken.read_text() == (first["demo"] / "adapter" / spoken.name).read_text()


def test_it_resumes_unless_the_adapter_has_changed(first, data, tmp_path: Path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (first["demo"] / "adapter").glob("*.*"):
        (adapter / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "out"
    finetune("demo", data["instructions"], out, "--adapter", str(adapter), "--json")
    again = ["finetune", "--out", str(out), "--resume", "--json"]
    assert main(again) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[1] == found[0] | {"seconds": found[1]["seconds"]}
    save_file({name: 2 * tensor for name, tensor in tensors_of(adapter).items()}, adapter / TENSORS)
    assert main(again) == 2
    assert f"--resume: {adapter / TENSORS} is not what it was\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("demo", "kind", "more", "said"),
    [
        ("demo", "instructions", ["--lora=4"], "--lora 4: the adapter in "),
        ("demo", "instructions", ["--lora=4"], " has 2; leave it out"),
        ("demo", "instructions", ["--alpha=8"], " has 6; leave it out"),
        ("demo", "instructions", ["--targets", "mlp"], "leave out --targets"),
        ("demo", "instructions", ["--lora-dropout=1"], "LoRA dropout is 1.0: expected a share"),
        ("demo", "instructions", ["--last-blocks=1"], "--adapter and --last-blocks are two ways"),
        ("demo-gpt2", "instructions", [], "does the adapter belong to it"),
    ],
)
def test_contradictions_are_one_line(demo, kind, more, said, first, data, tmp_path, capsys):
    given = ["--data", data[kind], "--out", str(tmp_path / "out"), *STEPS, *more]
    assert main(["finetune", demo, *given, "--adapter", str(first["demo"] / "adapter")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_head_beside_the_adapter_goes_on_with_its_labels(first, data, tmp_path: Path, capsys):
    adapter = first["demo-gpt2"] / "adapter"
    given = ("--adapter", str(adapter), "--json", "--lr=0", "--steps=1")
    finetune("demo-gpt2", data["classification"], tmp_path / "out", *given)
    head = load_file(tmp_path / "out" / "best" / "classifier.safetensors")["score.weight"]
    assert torch.equal(head, load_file(adapter / "classifier.safetensors")["score.weight"])
    rows = [{"text": word, "label": word[0]} for word in WORDS * 2]
    other = written(tmp_path / "other.jsonl", rows)
    assert (
        main(["finetune", "demo-gpt2", "--data", other, "--out", str(tmp_path / "x"), *given]) == 2
    )
    assert "tells d, other apart, the examples c, d, i, p, r, y" in capsys.readouterr().err


def test_a_template_of_others_gets_its_tokens_by_name(first, tmp_path: Path):
    for file in (first["demo"] / "adapter").glob("adapter*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    (tmp_path / "chat_template.jinja").write_text(text)
    tokenizer = pellucid.load("demo", adapter=tmp_path).tokenizer
    assert isinstance(tokenizer.chat, TemplateChat)
    ids = tokenizer.chat.encode([{"role": "user", "content": "hello"}])
    assert ids == [tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.eos_id]

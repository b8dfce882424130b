"""``pellucid finetune`` as a user runs it: every kind of data, going on, and what goes wrong."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import GPT, LLAMA, random_model

import pellucid
from pellucid import checkpoints
from pellucid.checkpoints.formats.hf import table
from pellucid.checkpoints.formats.peft import apply_adapter, module_names
from pellucid.cli import main
from pellucid.models import Model, initialise
from pellucid.models import adapters as lora
from pellucid.train import run as training_run
from pellucid.train.finetune import classify

DEMO = Path(pellucid.__file__).parent / "demos" / "stdlib"
STEPS = ["--steps=6", "--batch=4", "--eval-every=3", "--lr=5e-3", "--precision=float32"]
WORDS = ("import", "return", "class", "def", "print")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny random model of each family, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    shape = {"vocab_size": 2048, "context_length": 48, "width": 16 * 4}
    for config in (replace(LLAMA, **shape), replace(GPT, **shape, head_dim=16)):
        model = random_model(config, torch.float32)
        initialise(model, torch.Generator().manual_seed(0))
        path = folder / config.family
        checkpoints.save(path, config, model.state_dict(), tokenizer_from=DEMO)
    return {family: str(folder / family) for family in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("data")
    talks = [{"instruction": f"Say {word}", "input": "", "output": word} for word in WORDS * 5]
    labels = [
        {"text": f"{number} {word}", "label": "d" if word == "def" else "other"}
        for number, word in enumerate(WORDS * 5)
    ]
    chosen = [
        {"prompt": f"{word} ", "chosen": f"{number}", "rejected": "no"}
        for number, word in enumerate(WORDS * 5)
    ]
    texts = "\n".join(f"def {word}_{n}(x): return x" for n, word in enumerate(WORDS * 20))
    (folder / "text.txt").write_text(texts)
    examples = {"instructions": talks, "classification": labels, "preferences": chosen}
    for name, rows in examples.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {path.stem: str(path) for path in folder.iterdir()}


def finetune(model: str, data: str, out: Path, *more: str) -> int:
    return main(["finetune", model, "--data", data, "--out", str(out), *STEPS, *more])


def log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.name} {name}": t for file in files for name, t in load_file(file).items()}


WAYS = [
    ("llama", "text", []),
    ("gpt2", "instructions", ["--lora=2", "--lora-dropout=0.1", "--no-pack"]),
    ("llama", "classification", ["--last-blocks=1"]),
    ("llama", "preferences", ["--lora=2", "--targets", "attention"]),
]


@pytest.mark.parametrize(("family", "kind", "more"), WAYS, ids=[way[1] for way in WAYS])
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    family, kind, more, models, data, tmp_path: Path, capsys, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert finetune(models[family], data[kind], whole, "--save-every=2", "--json", *more) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["kind"] == kind
    assert summary["steps"] == 6
    assert summary["interrupted"] is False
    assert summary["held_out_loss"] < summary["held_out_loss_before"]
    assert summary["trained"] < summary["parameters"] or kind == "text"

    steps = training_run.train

    def killed(*arguments, **options):
        for progress in steps(*arguments, **options):
            yield progress
            if progress.step == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "train", killed)
    assert finetune(models[family], data[kind], cut, "--save-every=2", "--json", *more) == 130
    monkeypatch.undo()
    assert main(["finetune", "--out", str(cut), "--resume", "--json"]) == 0
    assert log(cut) == log(whole)
    assert len(log(whole)) == 6
    for name in ("last", "best"):
        one, other = tensors(whole / name), tensors(cut / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one if "random" not in key)


def loaded(folder: str | Path) -> Model:
    return checkpoints.load_model(checkpoints.open_checkpoint(folder))


def test_adapters_merge_into_a_model_and_talk(models, data, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert finetune(models["llama"], data["instructions"], out, "--lora=2", "--merge") == 0
    said = capsys.readouterr().out
    assert "to train on: 23 examples\nfor validation: 2 examples\n" in said
    assert "written in the chat format plain" in said
    assert said.rstrip().endswith(f"the model is in {out / 'merged'}")
    model, tokens = loaded(models["llama"]), torch.tensor([[5, 6, 7]])
    before = model(tokens)
    apply_adapter(model, out / "adapter", module_names(table(model.config)))
    lora.fold(model)
    assert torch.equal(loaded(out / "merged")(tokens), model(tokens))
    assert not torch.equal(model(tokens), before)

    greedy = ["--temperature=0", "-n=4", "--json"]
    assert main(["generate", "def", "-m", str(out / "merged"), *greedy]) == 0
    merged = json.loads(capsys.readouterr().out)["tokens"]
    adapter = ["-m", models["llama"], "--adapter", str(out / "adapter")]
    assert main(["generate", "def", *adapter, *greedy]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == merged
    assert main(["generate", "def", *adapter, "--stream-weights"]) == 2
    assert "--adapter changes weights" in capsys.readouterr().err
    assert pellucid.load(out / "merged").tokenizer.chat is not None


def test_a_classifier_is_saved_with_its_labels(models, data, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert finetune(models["gpt2"], data["classification"], out, "--last-blocks=0") == 0
    said = capsys.readouterr().out
    assert "labels: d × " in said
    assert "128 of " in said  # two labels on a width of 64
    assert "label  precision  recall     f1  examples\nd " in said
    model = loaded(out / "best")
    assert classify.load_head(out / "best", model) == ["d", "other"]
    assert classify.classify(model, [[5, 6], [7]]).shape == (2, 2)
    report = ["eval", str(out / "best"), "--labels", data["classification"]]
    assert main([*report, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["count"], len(found["classes"])) == (25, 2)
    assert main(report) == 0
    assert f"accuracy {found['accuracy']:.1%} (always the most frequent" in capsys.readouterr().out
    before = load_file(Path(models["gpt2"]) / "model.safetensors")
    after = load_file(out / "best" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_classifier_by_adapters(models, data, tmp_path: Path, capsys):
    out = tmp_path / "out"
    more = ("--lora=2", "--merge", "--json")
    assert finetune(models["llama"], data["classification"], out, *more) == 0
    capsys.readouterr()
    labels = ["--labels", data["classification"], "--json"]
    assert main(["eval", models["llama"], "--adapter", str(out / "adapter"), *labels]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["eval", str(out / "merged"), *labels]) == 0
    assert json.loads(capsys.readouterr().out) | {"model": found["model"]} == found
    assert main(["eval", models["llama"], *labels]) == 2
    assert "no classification head: classifier.json is missing" in capsys.readouterr().err


def test_preferences_say_margins(models, data, tmp_path: Path, capsys):
    assert finetune(models["gpt2"], data["preferences"], tmp_path / "out", "--beta=0.5") == 0
    said = capsys.readouterr().out
    assert "step 6: validation " in said
    assert "the better answer is preferred in " in said
    rows = log(tmp_path / "out")
    assert [bool(row["reward_margin"]) for row in rows] == [False, False, True] * 2
    assert float(rows[-1]["reward_margin"]) > 0


def test_preferences_between_messages_teach_the_format_they_are_written_in(
    models, tmp_path: Path, capsys
):
    rows = [
        {
            "prompt": f"Say {number}",
            "chosen": [{"role": "assistant", "content": str(number)}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for number in range(12)
    ]
    file, out = tmp_path / "talks.jsonl", tmp_path / "out"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert finetune(models["llama"], str(file), out, "--lora=2", "--json") == 0
    assert pellucid.load(models["llama"]).tokenizer.chat is None
    chat = pellucid.load(models["llama"], adapter=out / "adapter").tokenizer.chat
    assert chat is not None
    ids = chat.encode([{"role": "user", "content": "Say 3"}])
    assert "### Instruction:\nSay 3\n\n### Response:\n" in chat.tokenizer.decode(ids)


def test_what_the_data_is_may_be_said_and_judged_by_another_file(models, data, tmp_path, capsys):
    lines = Path(data["classification"])
    more = ("--as=text", "--eval-data", str(lines), "--json", "--context=16")
    assert finetune(models["llama"], str(lines), tmp_path / "out", *more) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "text"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora=2", "--last-blocks=1"], "two ways to train a part"),
        (["--alpha=2"], "--alpha is about adapters: give --lora RANK"),
        (["--lora=0"], "LoRA rank is 0"),
        (["--lora=2147483648"], "training adapters of rank 2,147,483,648 would hold"),
        (["--batch=2147483648"], "a batch of 2,147,483,648 rows: expected 1,048,576 or fewer"),
        (["--lora=2", "--targets", "nothing"], "'nothing' matches no layer"),
        (["--last-blocks=9"], "9 blocks to train: the model has 2"),
        (["--last-blocks=0"], "leaves nothing to train"),
        (["--context=99"], "--context 99: the model has 48 positions"),
        (["--context=4"], "none of 23 examples has an answer within the context of 4 tokens"),
        (["--hold-out=1.5"], "1.5 of the examples held out"),
        (["--steps=0"], "0 training steps: expected 1 or more"),
        (["--as=preferences"], "instructions.jsonl, line 1: 'chosen' is 'None'; expected text"),
        (["--data", "/nowhere.jsonl"], "/nowhere.jsonl: no such file of examples"),
    ],
)
def test_what_cannot_be(more, said, models, data, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert finetune(models["llama"], data["instructions"], out, *more) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_an_example_is_named_by_its_place_in_the_file(models, tmp_path: Path, capsys):
    """Not by its number after some were held out."""
    rows = [{"instruction": "Say", "output": word} for word in WORDS * 4]
    rows[17] = {"instruction": "Say", "output": 3}
    lines, listed = tmp_path / "lines.jsonl", tmp_path / "list.json"
    lines.write_text("\n\n" + "\n".join(map(json.dumps, rows)))
    listed.write_text(json.dumps(rows))
    for file, place in ((lines, "line 20"), (listed, "example 18")):
        assert finetune(models["llama"], str(file), tmp_path / "out") == 2
        assert f"{file}, {place}: 'output' is '3'; expected text" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_texts_in_a_file_of_examples(suffix, models, tmp_path: Path, capsys):
    """The words of 40 texts are learnt, not the brackets and quotes around them."""
    texts = [f"def f{number}(x, y): return x" for number in range(40)]
    file = tmp_path / f"texts.{suffix}"
    if suffix == "csv":
        with file.open("w", newline="") as out:
            csv.writer(out).writerows([["text"], *([text] for text in texts)])
    elif suffix == "json":
        file.write_text(json.dumps([{"text": text} for text in texts], indent=1))
    else:
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert finetune(models["llama"], str(file), tmp_path / "out", "--context=16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    encode = pellucid.load(models["llama"]).tokenizer.encode
    expected = sum(len(encode(text)) + 1 for text in texts)  # each behind its end token
    assert found["kind"] == "text"
    assert found["training_tokens"] + found["held_out_tokens"] == expected


def test_data_that_changed_while_the_run_went_on(models, data, tmp_path: Path, capsys, monkeypatch):
    lines = tmp_path / "lines.jsonl"
    lines.write_text(Path(data["instructions"]).read_text())
    steps = training_run.train

    def changing(*arguments, **options):
        for progress in steps(*arguments, **options):
            if progress.step == 2:
                lines.write_text(lines.read_text().replace("Say", "Write"))
            yield progress

    monkeypatch.setattr(training_run, "train", changing)
    assert finetune(models["llama"], str(lines), tmp_path / "out", "--save-every=3", "--json") == 0
    assert main(["finetune", "--out", str(tmp_path / "out"), "--resume"]) == 2
    assert f"--resume: {lines} is not what it was" in capsys.readouterr().err


def test_a_quantised_model_is_refused(models, data, tmp_path: Path, capsys):
    small, out = str(tmp_path / "small"), tmp_path / "out"
    assert main(["convert", models["llama"], small, "--to", "int8"]) == 0
    assert finetune(models["llama"], data["instructions"], out, "--lora=2", "--json") == 0
    capsys.readouterr()
    assert finetune(small, data["instructions"], tmp_path / "more", "--lora=2") == 2
    assert "is quantised: fine-tune the model it was made from" in capsys.readouterr().err
    assert main(["generate", "def", "-m", small, "--adapter", str(out / "adapter")]) == 2
    assert "is quantised and carries no adapter: merge it" in capsys.readouterr().err


def test_folders_in_use_and_runs_that_changed(models, data, tmp_path: Path, capsys):
    out = tmp_path / "out"

    def error(*more: str) -> str:
        assert main(["finetune", "--out", str(out), *more]) == 2
        return capsys.readouterr().err

    assert "nothing to learn from: give --data FILE" in error()
    assert "holds no run (no config.toml in it)" in error("--resume")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(Path(data["instructions"]).read_text())
    assert finetune(models["llama"], str(lines), out, "--lora=2", "--json") == 0
    assert "is not empty: give a new folder" in error("--data", str(lines))
    assert "where lr is 0.005, not 0.1: leave out --lr" in error("--resume", "--lr=0.1")
    lines.write_text(lines.read_text().replace("Say class", "Say " + "class " * 60))
    assert "is not what it was" in error("--resume")
    (out / "mine.txt").write_text("kept")
    assert finetune(models["llama"], data["text"], out, "--overwrite", "--json") == 0
    assert (out / "mine.txt").exists()
    assert not (out / "adapter").exists()

"""Watching a run: it changes nothing, says what is so, and goes on where a run goes on."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens

from pellucid import step_recording as training_step
from pellucid.cli import main
from pellucid.trace import Trace
from pellucid.train import IGNORED, Batch, Schedule, TrainConfig, plain_next_token_objective, train
from pellucid.train.parallel.recompute import recompute_blocks
from pellucid.train.parallel.run import layout
from pellucid.train.settings import resolve
from pellucid.train.watch import COLUMNS, Watch, check_only
from pellucid.train.watch_plot import draw_watch

SCHEDULE = Schedule(peak=1e-2, final=1e-3, warmup=1, steps=5)
SETTINGS = TrainConfig(schedule=SCHEDULE, batch=4, micro_batch=2, clip=0.5)


class Rows:
    """Random tokens, the first two targets of each row not to be predicted."""

    def at(self, step: int) -> Batch:
        tokens = random_tokens(LLAMA, 4, 10, seed=step)
        targets = tokens[:, 1:].clone()
        targets[:, :2] = IGNORED
        return Batch(tokens[:, :-1], targets)


def run(config, folder: Path | None, *, every=2, only=("*",), tensors=False, **change):
    model = random_model(config, torch.float32)
    watch = folder and Watch(folder, every, list(only), tensors=tensors)
    settings = replace(SETTINGS, **change)
    done = list(train(model, Rows(), lambda _: 0.0, settings, watch=watch or None))
    return [(p.loss, p.gradient_norm) for p in done], model.state_dict()


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "trace.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_watching_changes_no_bit(kind: str, bfloat16: bool, tmp_path: Path):
    plain, weights = run(CONFIGS[kind], None, bfloat16=bfloat16)
    watched, other = run(CONFIGS[kind], tmp_path, every=1, tensors=True, bfloat16=bfloat16)
    assert watched == plain
    assert all(torch.equal(weights[name], other[name]) for name in weights)


def test_dropout_draws_the_same_numbers(tmp_path: Path):
    config = replace(GPT, embed_dropout=0.3, attn_dropout=0.3, resid_dropout=0.3)
    torch.manual_seed(3)
    plain, _ = run(config, None)
    torch.manual_seed(3)
    assert run(config, tmp_path)[0] == plain


def test_the_numbers_are_those_of_a_step_by_hand(tmp_path: Path):
    run(LLAMA, tmp_path, every=100, only=["layers.1.mlp_out", "embed.weight"], micro_batch=4)
    activation, parameter = table(tmp_path)
    assert tuple(activation) == COLUMNS
    assert (activation["name"], activation["kind"]) == ("layers.1.mlp_out", "activation")
    assert activation["update_ratio"] == ""

    model, batch = random_model(LLAMA, torch.float64), Rows().at(0)
    seen = {}
    model.layers[1].mlp.register_forward_hook(lambda m, i, out: seen.update(out=out))
    logits = model(batch.inputs)
    seen["out"].retain_grad()
    F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    gradient, out, weight = seen["out"].grad, seen["out"].detach(), model.embed.weight.detach()
    towards = model.embed.weight.grad
    expected = {
        "mean": out.mean(),
        "std": out.std(correction=0),
        "rms": out.square().mean().sqrt(),
        "min": out.min(),
        "max": out.max(),
        "zeros": 0.0,
        "gradient_norm": gradient.norm(),
    }
    for column, value in expected.items():
        assert float(activation[column]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), column
    assert float(parameter["gradient_norm"]) == pytest.approx(float(towards.norm()), rel=1e-4)
    rate = SCHEDULE.rate(0)  # of an embedding whose row got no gradient only the decay is seen
    step = torch.where(towards == 0, 0.0, towards.sign()) + 0.1 * weight
    ratio = float(rate * step.norm() / weight.norm())
    assert float(parameter["update_ratio"]) == pytest.approx(ratio, rel=1e-3)


def test_whole_tensors_are_a_trace_of_the_step(tmp_path: Path):
    run(LLAMA, tmp_path, every=2, tensors=True)
    files = sorted((tmp_path / "traces").iterdir())
    assert [file.name for file in files] == [f"step-{n:08}.safetensors" for n in (1, 2, 4)]
    step = Trace.load(files[1])
    assert (step.meta["recording"], step.meta["optimizer_steps"]) == (training_step.KIND, 1)
    gradients = [n for n in step if n.startswith("grad.") and n.endswith("weight")]
    norm = math.sqrt(sum(float(step[n].square().sum()) for n in gradients))
    taken = math.sqrt(sum(float(step["clipped." + n[5:]].square().sum()) for n in gradients))
    assert norm > 0.5
    assert taken == pytest.approx(0.5, rel=1e-4)
    for name in gradients:
        assert torch.equal(Trace.load(files[0])["after." + name[5:]], step[name[5:]])
    assert step["grad.layers.0.attn.q"].shape == step["layers.0.attn.q"].shape == (2, 4, 9, 10)
    assert step["batch.inputs"].shape == (4, 9)


def test_names_that_a_step_does_not_have_are_an_error_with_the_reason():
    model = random_model(LLAMA)
    for only, logits, reason in (
        ("layers.*.attn.pattern", True, "fused attention kernel"),
        ("logits", False, "--loss plain does"),
        ("layer.0.*", True, "names look like"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_only(model, ["embed", only], logits=logits)
    check_only(model, ["logits", "layers.*.attn.z", "*norm.weight"], logits=True)


def test_with_all_logits_they_have_a_name(tmp_path: Path):
    watch = Watch(tmp_path, 1, ["logits"])
    model = random_model(LLAMA, torch.float32)
    objective = plain_next_token_objective
    next(train(model, Rows(), lambda _: 0.0, SETTINGS, objective=objective, watch=watch))
    assert [row["name"] for row in table(tmp_path)] == ["logits"]


def test_activation_checkpointing_is_refused(tmp_path: Path):
    model = random_model(LLAMA, torch.float32)
    recompute_blocks(model)
    watch = Watch(tmp_path, 1, ["*"])
    with pytest.raises(ValueError, match="activation checkpointing.*switch one of the two off"):
        next(train(model, Rows(), lambda _: 0.0, SETTINGS, watch=watch))


@pytest.mark.parametrize("given", [{"parallel": "fsdp"}, {"parallel": "tp"}])
def test_ranks_that_have_no_whole_parameter_are_refused(given):
    settings = resolve({"stdlib": True, "batch": 8, "trace_every": 2, **given})
    with pytest.raises(ValueError, match="no rank has a whole parameter.*--parallel ddp"):
        layout(settings, 2)
    assert layout(resolve({"stdlib": True, "batch": 8, "trace_every": 2}), 2).data == 2


def test_lines_after_the_step_to_go_on_from_are_dropped(tmp_path: Path):
    run(LLAMA, tmp_path, every=2, only=["embed.weight"])
    Watch(tmp_path, 2, ["*"], done=3)
    assert [row["step"] for row in table(tmp_path)] == ["1", "2"]
    Watch(tmp_path, 2, ["*"])
    assert table(tmp_path) == []


def test_a_picture_of_whatever_there_is(tmp_path: Path):
    run(LLAMA, tmp_path, every=1)
    draw_watch(tmp_path / "trace.csv", tmp_path / "trace.png", "a run")
    Watch(tmp_path, 2, ["*"])  # no lines at all
    draw_watch(tmp_path / "trace.csv", tmp_path / "empty.png")
    for name in ("trace.png", "empty.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


MODEL = ["--vocab=260", "--width=16", "--layers=1", "--heads=2", "--context=16", "--no-begin"]
STEPS = ["--steps=6", "--batch=4", "--warmup=2", "--save-every=0", "--sample-every=0"]
WATCH = ["--trace-every=2", "--only", "layers.0.resid_post", "--only", "*.q_proj.weight"]


def test_the_command_and_its_resumption_write_each_line_once(tmp_path: Path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat, the dog did not. " * 80)
    given = ["train", "--data", str(tmp_path / "text.txt"), *MODEL, *STEPS, "--no-tensorboard"]
    given += ["--precision=float32", "--json"]
    whole, parts, plain = tmp_path / "whole", tmp_path / "parts", tmp_path / "plain"
    assert main([*given, *WATCH, "--out", str(whole)]) == 0
    assert main([*given, *WATCH, "--out", str(parts), "--stop=3"]) == 0
    assert main(["train", "--out", str(parts), "--resume", "--stop=6", "--json"]) == 0
    assert main([*given, "--out", str(plain)]) == 0
    assert (whole / "trace.csv").read_text() == (parts / "trace.csv").read_text()
    assert [(row["step"], row["name"]) for row in table(whole)] == [
        (step, name)
        for step in ("1", "2", "4", "6")
        for name in ("layers.0.resid_post", "layers.0.attn.q_proj.weight")
    ]
    assert (whole / "trace.png").is_file()
    losses = [json.loads(line)["loss"] for line in capsys.readouterr().out.splitlines()]
    assert losses[0] == losses[2] == losses[3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "embed"], "add --trace-every N"),
        (["--trace-every=2", "--recompute"], "blocks that run twice"),
        (["--trace-every=2", "--only", "embd"], "no tensor of a training step is called so"),
    ],
)
def test_what_cannot_be_watched_is_one_line(tmp_path: Path, capsys, more, message):
    (tmp_path / "text.txt").write_text("the cat sat on the mat, the dog did not. " * 80)
    given = ["train", "--data", str(tmp_path / "text.txt"), *MODEL, *STEPS, "--json"]
    assert main([*given, *more, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

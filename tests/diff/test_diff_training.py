"""Two training steps held against each other: healthy pairs, and every mistake at its stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peers import pair
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens
from training_loops import (
    IGNORED,
    SETTINGS,
    HandMadeAdamW,
    accumulated_step,
    groups_of,
    plain_step,
)

import pellucid
from pellucid.diff.training.record import diff_steps, record_step
from pellucid.trace import Trace
from pellucid.train import Batch, Schedule, TrainConfig, train
from pellucid.train.watch import Watch

RATE = SETTINGS["lr"]


def batch(step: int = 0) -> Batch:
    """Three rows of 11 tokens; where each row begins, and the end of one, nothing is predicted."""
    tokens = random_tokens(LLAMA, 3, 12, seed=step)
    targets = tokens[:, 1:].clone()
    targets[:, :2] = IGNORED
    targets[1, 6:] = IGNORED
    return Batch(tokens[:, :-1], targets)


def starting_model(config):
    """Weights near those that training begins with: no gradient is dwarfed by another."""
    model = random_model(config, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)
            elif name.endswith("bias"):
                parameter.zero_()
    return model.train()


def ours(folder: Path, model, steps: int = 1, **change) -> list[Trace]:
    """The first steps of our own trainer, as it records them itself."""

    class Data:
        def at(self, step: int) -> Batch:
            return batch(step)

    schedule = Schedule(peak=RATE, final=RATE, warmup=0, steps=steps, shape="constant")
    given = {"batch": 3, "micro_batch": 3, "clip": 0.5, **change}
    config = TrainConfig(schedule=schedule, **given)
    watch = Watch(folder, 1, ["*"], tensors=True)
    for _ in train(model, Data(), lambda _: 0.0, config, watch=watch):
        pass
    return [Trace.load(file) for file in sorted((folder / "traces").iterdir())]


def plain(model, forward=None, steps: int = 1, *, fault: str = "", optimizer=None, **options):
    """The same steps in a plain loop, recorded from outside."""
    optimizer = optimizer or torch.optim.AdamW(groups_of(model, fault), **SETTINGS)
    seen = []
    for number in range(steps):
        inputs, targets, _ = batch(number)
        step = plain_step(forward or model, model, optimizer, inputs, targets, fault=fault)
        given = {"inputs": inputs, "targets": targets, **options}
        seen.append(record_step(model, optimizer, step, **given))
    return seen


def twice(kind: str, folder: Path, steps: int = 1, **options) -> tuple[list[Trace], list[Trace]]:
    config = CONFIGS[kind]
    a = ours(folder, starting_model(config), steps)
    return a, plain(starting_model(config), steps=steps, **options)


# ── Healthy pairs ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-book", "llama-gqa", "llama-mqa"])
def test_our_trainer_and_a_plain_loop_agree_within_rounding(kind: str, tmp_path: Path):
    for a, b in zip(*twice(kind, tmp_path, steps=2), strict=True):
        report = diff_steps(a, b)
        assert report.verdict == "within-rounding", report.summary()
        judged = {row.name for row in report.tensors}
        for name in ("loss", "layers.1.mlp_out", "grad.layers.0.attn.q", "grad.embed.weight"):
            assert name in judged
        assert {"clipped.embed.weight", "after.embed.weight"} <= judged


def test_passes_of_few_rows_and_attention_in_named_steps_agree_too(tmp_path: Path):
    [a] = ours(tmp_path, starting_model(LLAMA), micro_batch=1)
    [b] = plain(starting_model(LLAMA), fused=False)
    assert a["layers.0.attn.q"].shape[0] == 1
    assert diff_steps(a, b).verdict == "within-rounding"
    assert diff_steps(b, a).verdict == "within-rounding"


def test_rows_of_several_documents_are_computed_again_as_such(tmp_path: Path):
    inputs, targets, _ = batch()
    documents = (torch.arange(11) > 4).long().expand(3, 11)

    class Data:
        def at(self, step: int) -> Batch:
            return Batch(inputs, targets, documents)

    schedule = Schedule(peak=RATE, final=RATE, warmup=0, steps=1)
    config = TrainConfig(schedule=schedule, batch=3, micro_batch=3)
    watch = Watch(tmp_path, 1, ["*"], tensors=True)
    list(train(starting_model(LLAMA), Data(), lambda _: 0.0, config, watch=watch))
    seen = Trace.load(tmp_path / "traces" / "step-00000001.safetensors")
    assert seen["batch.starts"][0].tolist() == [0] * 5 + [5] * 6
    assert diff_steps(seen, seen).verdict == "identical"
    del seen["batch.starts"]
    assert diff_steps(seen, seen).first.side == "a"


@pytest.mark.peers
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "gqa", "mqa, tied"])
def test_our_trainer_and_transformers_agree_within_rounding(kind, attention, tmp_path: Path):
    pytest.importorskip("transformers")
    from peers import CONFIGS as SHAPES

    model, theirs = pair(SHAPES[kind], tmp_path / "model", attention=attention)
    theirs.config.use_cache = False
    [a] = ours(tmp_path, model)
    [b] = plain(theirs, lambda tokens: theirs(tokens).logits)
    report = diff_steps(a, b)
    assert report.verdict == "within-rounding", report.summary()
    judged = {row.name for row in report.tensors}
    wanted = {"grad.layers.1.attn.q", "grad.layers.0.attn.q_proj.weight", "grad.layers.0.attn.z"}
    assert wanted | {"grad.logits", "grad.layers.0.attn.v", "after.norm.weight"} <= judged


def test_a_matrix_product_in_bfloat16_is_held_to_its_own_rounding(tmp_path: Path):
    [a] = ours(tmp_path, starting_model(LLAMA), bfloat16=True)
    other = starting_model(LLAMA)

    def forward(tokens):
        with torch.autocast("cpu", torch.bfloat16):
            return other(tokens)

    [b] = plain(other, forward)
    assert b["layers.0.attn.q"].dtype == torch.bfloat16
    assert diff_steps(a, b).verdict == "within-rounding"


# ── Mistakes ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize(
    ("fault", "step", "first", "cause"),
    [
        ("labels shifted twice", 0, "loss", "labels shifted once too often"),
        ("mean over padding", 0, "loss", "loss averaged over targets that do not count"),
        ("gradient not zeroed", 1, "grad.", "gradient not zeroed"),
        ("not clipped", 0, "clipped.", "gradient not clipped"),
        ("gradient divided", 0, "clipped.", "gradient scaled"),
        ("decay on norms", 0, "after.", "another weight decay"),
    ],
)
def test_a_mistake_of_the_loop(kind, fault, step, first, cause, tmp_path: Path):
    a, b = twice(kind, tmp_path, steps=2, fault=fault)
    report = diff_steps(a[step], b[step])
    assert report.verdict == "diverged"
    assert report.first.name.startswith(first), report.summary()
    assert report.cause is not None, report.summary()
    assert report.cause.name == cause


@pytest.mark.parametrize(
    ("kind", "fault", "step", "cause"),
    [
        ("gpt2", "betas swapped", 1, "betas swapped"),
        ("llama-gqa", "no bias correction", 0, "bias correction missing"),
        ("llama-gqa", "coupled decay", 1, "decay added to the gradient"),
        ("gpt2", "rate of another step", 0, "another learning rate"),
        ("llama-gqa", "eps inside the root", 0, "eps inside the square root"),
        ("llama-gqa", "eps before the correction", 0, "eps before the bias correction"),
    ],
)
def test_a_mistake_of_the_optimiser(kind, fault, step, cause, tmp_path: Path):
    config = CONFIGS[kind]
    a = ours(tmp_path, starting_model(config), 2)
    model = starting_model(config)
    b = plain(model, steps=2, optimizer=HandMadeAdamW(groups_of(model), fault))
    report = diff_steps(a[step], b[step])
    assert [fault.name.split(".")[0] for fault in report.faults] == ["after"], report.summary()
    assert report.cause is not None, report.summary()
    assert report.cause.name == cause


def test_the_hand_made_optimiser_without_a_mistake_is_within_rounding(tmp_path: Path):
    a = ours(tmp_path, starting_model(GPT), 2)
    model = starting_model(GPT)
    b = plain(model, steps=2, optimizer=HandMadeAdamW(groups_of(model)))
    for one, other in zip(a, b, strict=True):
        assert diff_steps(one, other).verdict == "within-rounding"


@pytest.mark.parametrize("config", [GPT, replace(LLAMA, tied=True)], ids=["gpt2", "llama"])
@pytest.mark.parametrize("dropped", ["head", "embedding"])
def test_a_tied_matrix_that_learns_from_one_end_only(config, dropped, tmp_path: Path):
    [a] = ours(tmp_path, starting_model(config))
    model = starting_model(config)
    weight = model.embed.weight

    def forward(tokens):
        if dropped == "head":
            return F.linear(model.hidden(tokens), weight.detach())
        handle = model.embed.register_forward_hook(lambda m, i, out: out.detach())
        try:
            return model(tokens)
        finally:
            handle.remove()

    [b] = plain(model, forward)
    report = diff_steps(a, b)
    assert report.first.name == "grad.embed.weight", report.summary()
    assert report.cause.name == f"the tied {dropped}'s gradient dropped"


@pytest.mark.parametrize("fault", ["", "mean of means"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_a_batch_taken_in_several_passes(kind: str, fault: str, tmp_path: Path):
    [a] = ours(tmp_path, starting_model(CONFIGS[kind]))
    model = starting_model(CONFIGS[kind])
    inputs, targets, _ = batch()
    optimizer = torch.optim.AdamW(groups_of(model), **SETTINGS)
    step = accumulated_step(model, optimizer, inputs, targets, 2, fault=fault)
    b = record_step(model, optimizer, step, inputs=inputs, targets=targets)
    assert b.meta["passes"] == [2, 1] and len(b["layers.0.attn.q"]) == 2
    report = diff_steps(a, b)
    if not fault:
        assert report.verdict == "within-rounding", report.summary()
        return
    assert report.first.name == "loss" and report.cause.name == "mean of the passes' means"


def test_two_mistakes_of_two_stages_are_both_found(tmp_path: Path):
    [a] = ours(tmp_path, starting_model(LLAMA))
    model = starting_model(LLAMA)
    optimizer = HandMadeAdamW(groups_of(model), "no bias correction")
    [b] = plain(model, fault="not clipped", optimizer=optimizer)
    causes = [fault.cause.name for fault in diff_steps(a, b).faults]
    assert causes == ["gradient not clipped", "bias correction missing"]


def test_a_wrong_forward_pass_is_named_where_it_begins(tmp_path: Path):
    [a] = ours(tmp_path, starting_model(LLAMA))
    model = starting_model(LLAMA)
    model.layers[1].mlp_norm.eps = 1e-2
    [b] = plain(model)
    assert diff_steps(a, b).first.name == "layers.1.mlp_norm"


def test_other_settings_batches_and_weights_are_said(tmp_path: Path):
    [a] = ours(tmp_path, starting_model(LLAMA))
    model = starting_model(LLAMA)
    with torch.no_grad():
        model.norm.weight[3] += 0.1
    settings = {**SETTINGS, "lr": 2 * RATE}
    optimizer = torch.optim.AdamW(groups_of(model), **settings)
    [b] = plain(model, optimizer=optimizer)
    b["batch.targets"] = batch(1).targets
    found = {(row.stage, row.name): row.cause for row in diff_steps(a, b).static}
    assert found["tokens", "batch.targets"] == "another batch"
    assert found["weights", "norm.weight"] == "other weights"
    assert found["constants", "lr"] == "another lr"


# ── Doors ────────────────────────────────────────────────────────────────────────────────────────


def test_files_of_steps_are_compared_by_diff_and_the_command(tmp_path: Path, capsys):
    [a] = ours(tmp_path, starting_model(LLAMA))
    [b] = plain(starting_model(LLAMA), fault="mean over padding")
    b.save(tmp_path / "b.safetensors")
    file = next((tmp_path / "traces").iterdir())
    assert pellucid.diff(a, tmp_path / "b.safetensors").first.name == "loss"
    from pellucid.cli import main

    assert main(["diff", str(file), str(tmp_path / "b.safetensors")]) == 1
    said = capsys.readouterr().out
    assert "loss averaged over targets that do not count" in said
    assert main(["diff", str(file), str(file)]) == 0


def test_what_is_no_whole_step_is_an_error_that_says_so(tmp_path: Path):
    [a] = plain(starting_model(LLAMA))
    part = Trace(a, a.meta)
    del part["layers.0.attn.q_proj.weight"]
    with pytest.raises(ValueError, match="does not hold layers.0.attn.q_proj.weight.*whole batch"):
        diff_steps(a, part)
    with pytest.raises(ValueError, match="no recorded training step"):
        diff_steps(a, Trace({"logits": torch.zeros(1)}))
    model = starting_model(LLAMA)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, targets, _ = batch()
    with pytest.raises(ValueError, match="never called optimizer.step"):
        record_step(model, optimizer, lambda: model(inputs).sum(), inputs=inputs, targets=targets)

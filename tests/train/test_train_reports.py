"""What a run reports: event files, the picture, FLOPs; and the folder it reports into."""

from __future__ import annotations

import csv
import io
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import pellucid
from pellucid.models import GPTConfig, LlamaConfig, build
from pellucid.models.census import census
from pellucid.show import training_terminal
from pellucid.train import run_folder
from pellucid.train.events import EventFile, checksum
from pellucid.train.loop import Progress
from pellucid.train.loss_plot import draw, smoothed
from pellucid.train.step_log import COLUMNS
from pellucid.train.utilisation import measured_peak


def fields(data: bytes) -> dict[int, list]:
    """A message of protocol buffers: field number -> values, as they lie there."""
    found: dict[int, list] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        number, shift = 0, 0
        while True:
            byte = data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return number

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value: object = varint()
        elif kind == 2:
            length = varint()
            value, at = data[at : at + length], at + length
        else:
            size, code = {1: (8, "<d"), 5: (4, "<f")}[kind]
            (value,), at = struct.unpack(code, data[at : at + size]), at + size
        found.setdefault(key >> 3, []).append(value)
    return found


def test_the_checksum_is_crc_32c_masked():
    # The check value of CRC-32C is 0xE3069283 for the nine digits (RFC 3720's polynomial).
    crc = 0xE3069283
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    assert checksum(b"123456789") == masked


def test_event_files_hold_the_scalars(tmp_path: Path):
    with EventFile(tmp_path) as events:
        events.add(1, {"loss/training": 2.5, "tokens": 4096.0})
        events.add(300, {"loss/training": 1.25})
    with EventFile(tmp_path):  # a run that goes on writes another file
        pass
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    assert all("tfevents" in file.name for file in files)
    data, events_read = files[0].read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body, rest = data[12 : 12 + length], data[12 + length :]
        assert struct.unpack("<I", data[8:12])[0] == checksum(data[:8])
        assert struct.unpack("<I", rest[:4])[0] == checksum(body)
        events_read.append(fields(body))
        data = rest[4:]
    assert events_read[0][3] == [b"brain.Event:2"]
    points = []
    for event in events_read[1:]:
        for value in fields(event[5][0])[1]:
            inside = fields(value)
            points.append((event[2][0], inside[1][0].decode(), inside[2][0]))
    assert points == [
        (1, "loss/training", 2.5),
        (1, "tokens", 4096.0),
        (300, "loss/training", 1.25),
    ]


def test_the_picture_is_a_png_and_nothing_global_is_touched(tmp_path: Path):
    log, picture = tmp_path / "log.csv", tmp_path / "loss.png"
    with log.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in range(1, 30):
            held_out = f"{3 / step}" if step % 10 == 0 else ""
            writer.writerow([step, step * 8, step, 1e-3, 2 / step, 1.0, held_out])
    draw(log, picture, "title")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(picture.read_bytes()) > 10_000


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smoothed([4.0, 4.0, 4.0]) == pytest.approx([4.0, 4.0, 4.0])
    assert smoothed([2.0, 4.0])[1] == pytest.approx((0.95 * 2 + 4) / 1.95)


CONFIGS = [
    GPTConfig(vocab_size=50257, width=768, n_layers=12, n_heads=12),
    GPTConfig(vocab_size=300, width=16, n_layers=2, n_heads=2, context_length=32, tied=False),
    LlamaConfig(
        vocab_size=300, width=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, hidden_width=24
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["124m", "gpt2", "llama"])
def test_flops_are_three_times_those_that_torch_counts_for_a_forward_pass(config):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build(config)
    tokens = torch.zeros(1, 32, dtype=torch.long, device="meta")
    from pellucid.trace import trace

    with FlopCounterMode(display=False) as counted, torch.no_grad(), trace(model, "none"):
        model(tokens)  # traced: attention step by step, every product counted
    assert census(config).flops(32).training == 3 * counted.get_total_flops() / 32


def test_the_peak_is_a_speed():
    peak = measured_peak(torch.device("cpu"), torch.float32, size=64, seconds=0.01)
    assert 1e6 < peak < 1e16


def content(run: Path, name: str) -> str:
    return (run / name / "file").read_text()


def writer(text: str):
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text(text)

    return write


def test_a_link_leads_to_the_newest_and_the_others_go(tmp_path: Path):
    run_folder.publish(tmp_path, "last", 1, writer("one"))
    run_folder.publish(tmp_path, "best", 1, writer("best"))
    run_folder.publish(tmp_path, "last", 2, writer("two"))
    assert content(tmp_path, "last") == "two"
    assert content(tmp_path, "best") == "best"
    assert run_folder.step_of(tmp_path / "last") == 2
    run_folder.publish(tmp_path, "last", 2, writer("again"))
    assert content(tmp_path, "last") == "again"
    assert run_folder.step_of(tmp_path / "last") == 2
    # the newest, the best, and the one before the newest, to go on from where that is damaged
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints", "last"]


class Killed(BaseException):
    """What no handler of errors stops."""


def test_wherever_a_save_is_killed_the_link_leads_to_a_whole_folder(tmp_path: Path, monkeypatch):
    """Every call to the system in turn does not come back."""
    for number in range(40):
        run = tmp_path / str(number)
        run_folder.publish(run, "last", 1, writer("one"))
        left = number

        def guarded(call):
            def killed_or(*arguments, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return call(*arguments, **options)

            return killed_or

        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "symlink"):
                patch.setattr(os, name, guarded(getattr(os, name)))
            for name in ("rename", "write_text", "mkdir", "symlink_to"):
                patch.setattr(Path, name, guarded(getattr(Path, name)))
            patch.setattr("shutil.rmtree", lambda *_, **__: None)  # nor does any clearing up
            try:
                run_folder.publish(run, "last", 2, writer("two"))
                survived = True
            except Killed:
                survived = False
        assert content(run, "last") in ("one", "two")
        run_folder.publish(run, "last", 3, writer("three"))  # and the next one clears up
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert kept[-1] == "last-00000003"
        assert len(kept) == 2  # and the one before it
        if survived:
            assert number > 5
            return
    pytest.fail("a save makes more calls than were tried")


def test_what_is_not_there_is_said(tmp_path: Path):
    assert run_folder.step_of(tmp_path / "last") is None
    assert run_folder.kept(tmp_path) == f"{tmp_path} holds no checkpoint"


def shown(monkeypatch, *, every: int, facts: dict[str, object]) -> list[str]:
    """Lines of a run of 40 steps of a second each, with 10 s of evaluation each `every` steps."""
    clock = [100.0]
    monkeypatch.setattr(training_terminal, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    written = io.StringIO()
    display = training_terminal.Display(Console(file=written, width=200), quiet=False)
    display._begin({"last_step": 40, "steps": 0, "tokens": 0, "seconds": 0.0, **facts})
    for step in range(1, 41):
        due = step % every == 0
        clock[0] += 1 + 10 * due
        display.step(
            Progress(
                step=step, tokens=30 * step, loss=3.0, gradient_norm=1.0, rate=1e-3,
                seconds=float(step), held_out_loss=2.5 if due else None,
            )
        )  # fmt: skip
    return written.getvalue().splitlines()


def test_time_left_counts_evaluations(monkeypatch):
    lines = shown(monkeypatch, every=10, facts={"evaluated_tokens": (90.0, 270)})
    # 30 tokens a second: an evaluated token is a third of one, so 1 s each step and 3 s at the end.
    assert "step 1/40  1:21 left" in lines[0]
    assert "step 10/40  1:03 left" in lines[1]  # measured by now: 1 s a step for 10 s in 10 steps
    assert "validation 2.500" in lines[1] and "lr 1.0e-03" in lines[1]
    assert "step 20/40  0:43 left" in lines[2]


def test_a_sample_begins_with_the_validation_text(tmp_path: Path, capsys):
    text = tmp_path / "story.txt"
    text.write_text("Anna saw the lighthouse every evening from her window. " * 40)
    run = pellucid.train(
        data=[str(text)], out=tmp_path / "run", steps=1, context=32, width=16, heads=2, layers=1,
        vocab=260, batch=2, warmup=0, sample_every=0, plot=False, tensorboard=False,
    )  # fmt: skip
    assert run.sample().startswith("Anna")
    with pytest.raises(ValueError, match="--init .*/last --out NEW --steps 4, and the same text"):
        pellucid.train(out=tmp_path / "run", resume=True, steps=5)
    with pytest.raises(ValueError, match="to train longer begin a new run"):
        pellucid.train(out=tmp_path / "run", resume=True, stop=5)

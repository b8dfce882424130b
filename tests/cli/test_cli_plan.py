"""``pellucid plan``: a table, one JSON object, and errors in one line."""

from __future__ import annotations

import json

import pytest

from pellucid.cli import main
from pellucid.show.plan_terminal import duration


def test_the_table(capsys):
    assert main(["plan", "--cards", "2", "--gib", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 GPUs, passes of 1 row of" in printed
    for name in ("ddp", "fsdp", "tp 2", "recomputed", "fits"):
        assert name in printed
    assert "FLOPs per token: 6 × " in printed


def test_a_70b_shape_as_json_allocates_nothing(capsys):
    wanted = ["plan", "llama-3.1-70b", "--cards", "2", "--tensor", "2", "--context", "32"]
    assert main([*wanted, "--tokens", "1e9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 70_553_706_496
    assert [row["name"] for row in found["memory"]] == ["ddp", "fsdp", "tp 2"]
    ddp = found["memory"][0]
    assert ddp["kept"]["parameters"] == 4 * 70_553_706_496
    assert not ddp["kept"]["fits"]
    assert ddp["kept"]["activations"] > ddp["recomputed"]["activations"]
    assert found["flops_per_token"]["training"] == (
        6 * found["flops_per_token"]["matmul_parameters"] + found["flops_per_token"]["attention"]
    )
    assert found["time"]["steps"] == -(-(10**9) // 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt2", "--context", "2000"], "2000 tokens: expected 1 to 1024"),
        (["gpt2", "--cards", "0"], "0 × 1 ranks: expected 1 or more"),
        (["gpt2", "--cards", "3", "--batch", "4"], "a batch of 4 rows does not divide"),
    ],
)
def test_errors(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_durations_read_well():
    said = [duration(seconds) for seconds in (0.0042, 12.5, 90, 7200, 864000)]
    assert said == ["4.2 ms", "12.50 s", "1.5 minutes", "2.0 hours", "10.0 days"]

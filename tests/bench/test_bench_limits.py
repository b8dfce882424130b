"""The arithmetic of the limits, against PyTorch's own counter and against sums by hand."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import CONFIGS, random_model, random_tokens
from torch.utils.flop_counter import FlopCounterMode

from pellucid import system as processors
from pellucid.bench import machine
from pellucid.bench.limits import (
    decode_bytes,
    percent_of_bandwidth,
    percent_of_peak,
    prefill_flops,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prefill_costs_what_pytorch_counts(name):
    config, tokens = CONFIGS[name], 11
    model = random_model(config, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_tokens(config, 1, tokens), last=True)
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counted.items() if "attention" in op)
    products = sum(counted.values()) - attention
    # PyTorch counts the square of q·k and pattern·v, we count what causality leaves of it.
    square = config.n_layers * 4 * config.n_heads * config.head_dim * tokens * tokens
    assert attention in (0, square)  # 0: this build counts none for the CPU's kernel
    causal = square * (tokens + 1) / (2 * tokens)
    assert prefill_flops(config, tokens) == products + causal


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoding_step_reads_every_weight_but_what_it_looks_up(name):
    config = CONFIGS[name]
    model = random_model(config, torch.bfloat16)
    sizes = {key: parameter.nbytes for key, parameter in model.named_parameters()}
    table = 2 * config.vocab_size * config.width
    skipped = 0 if config.tied else table
    if config.family == "gpt2":
        skipped += 2 * config.context_length * config.width
    assert decode_bytes(sizes) == sum(sizes.values()) - skipped


def test_percentages():
    assert percent_of_bandwidth(10, 2_000_000_000, 40e9) == 50
    assert percent_of_peak(2, 100_000_000_000, 400e9) == 50


@pytest.mark.parametrize(
    ("written", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("nonsense", None)]
)
def test_the_quota_of_a_control_group(tmp_path, written, cores):
    (tmp_path / "cpu.max").write_text(written + "\n")
    assert processors.cgroup_quota(tmp_path, tmp_path / "absent") == cores


def test_the_least_quota_on_the_way_up_counts(tmp_path):
    inner = tmp_path / "user.slice" / "run.scope"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("400000 100000\n")
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/user.slice/run.scope\n")
    assert processors.cgroup_quota(tmp_path, own) == 2.5


def test_the_quota_of_the_older_kind(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert processors.cgroup_quota(tmp_path, tmp_path / "absent") == 2
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert processors.cgroup_quota(tmp_path, tmp_path / "absent") is None


def test_the_description_is_plain_data_with_what_matters():
    described = json.loads(json.dumps(machine.describe()))
    assert described["torch"] == torch.__version__
    assert 1 <= described["cores"] <= described["cores_seen"]
    assert described["memory_bytes"] > 1 << 28


def test_the_limits_are_rates():
    threads = torch.get_num_threads()
    try:
        measured = machine.Machine(1, read_bytes=1 << 20)
        read = measured.bandwidth(repeats=2)
        assert read["best"] >= read["median"] > 0
        product = measured.gemm("bfloat16", (32, 64))
        assert product["best"] == max(product["by_size"].values()) > 0
        assert list(product["by_size"]) == ["32", "64"]
    finally:
        torch.set_num_threads(threads)

"""The census against known numbers, against torch's own counter, against any config."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pellucid.families.shapes import SHAPES, shape
from pellucid.models import Config, GPTConfig, LlamaConfig, build
from pellucid.models.census import as_json, census, in_units, nbytes
from pellucid.trace import trace

KNOWN = {
    "llama-3-8b": 8_030_261_248,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "gpt2": 124_439_808,
    "book-gpt": 163_009_536,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_come_out_exactly(name: str):
    assert census(shape(name).config).total == KNOWN[name]


def test_counting_stays_light():
    """Building on the meta device must not import torch's symbolic shapes, which take a second."""
    program = (
        "import sys; from pellucid.models.census import census\n"
        "from pellucid.families.shapes import shape\n"
        "census(shape('gpt2').config), census(shape('llama-3-8b').config)\n"
        "print({'sympy', 'torch._dynamo'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_the_sum_is_written_out():
    assert census(shape("book-gpt").config).written == (
        "embedding 39,383,808 + 12 blocks × 7,085,568 + norm 1,536 + head 38,597,376 = 163,009,536"
    )
    assert census(shape("llama-3.2-1b").config).written.count("+") == 2  # tied: no head


configs = st.one_of(
    st.builds(
        lambda heads, width, **more: GPTConfig(n_heads=heads, width=heads * width, **more),
        heads=st.integers(1, 4),
        width=st.integers(1, 9),
        vocab_size=st.integers(1, 50),
        context_length=st.integers(1, 20),
        n_layers=st.integers(1, 3),
        hidden_width=st.integers(0, 30),
        qkv_bias=st.booleans(),
        tied=st.booleans(),
    ),
    st.builds(
        lambda kv, group, half, **more: LlamaConfig(
            n_kv_heads=kv, n_heads=kv * group, head_dim=2 * half, **more
        ),
        kv=st.integers(1, 3),
        group=st.integers(1, 3),
        half=st.integers(1, 5),
        width=st.integers(1, 30),
        vocab_size=st.integers(1, 50),
        n_layers=st.integers(1, 3),
        hidden_width=st.integers(1, 30),
        attention_bias=st.booleans(),
        mlp_bias=st.booleans(),
        tied=st.booleans(),
    ),
)


@settings(max_examples=40, deadline=None)
@given(configs)
def test_any_config_counts_what_its_model_holds(config: Config):
    counted = census(config)
    model = build(config)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    assert counted.total == sum(group.repeats * group.each for group in counted.groups)
    assert counted.block.repeats == config.n_layers


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flops_equal_torchs_counter(family: str, tied: bool):
    """One whole pass of T tokens: the matrix products T times, each token attending to all T."""
    if family == "gpt2":
        config: Config = GPTConfig(
            vocab_size=50, context_length=32, width=24, n_layers=3, n_heads=4, tied=tied
        )
    else:
        config = LlamaConfig(
            vocab_size=50, context_length=32, width=24, n_layers=3, n_heads=6, n_kv_heads=2,
            head_dim=8, hidden_width=40, tied=tied,
        )  # fmt: skip
    tokens = 16
    model = build(config)  # traced: the counter knows products, not the CPU's fused attention
    with trace(model), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long))
    assert counter.get_total_flops() == tokens * census(config).flops(tokens).forward


def test_cache_bytes():
    counted = census(shape("llama-3-8b").config)
    assert counted.cached_numbers == 32 * 2 * 8 * 128
    values = as_json(counted, tokens=100)
    assert values["kv_cache"]["per_token"]["bfloat16"] == 131072  # type: ignore[index]
    assert values["bytes"]["bfloat16"] == 2 * 8_030_261_248  # type: ignore[index]


def test_shares_add_up_and_units_read_well():
    for name in SHAPES:
        groups = as_json(census(shape(name).config), tokens=1)["parameters"]["groups"]  # type: ignore
        assert sum(group["share"] for group in groups) == pytest.approx(1)
    assert nbytes(3, "int4") == 2
    assert in_units(16_060_522_496, "B") == "16.06 GB"
    assert in_units(16_060_522_496, "B", 1024) == "14.96 GiB"
    assert in_units(999, "B") == "999 B"


def test_errors_have_both_numbers():
    with pytest.raises(ValueError, match=r"9000 tokens: expected 1 to 8192"):
        census(shape("llama-3-8b").config).flops(9000)
    with pytest.raises(ValueError, match="no shape is called 'gpt5'"):
        shape("gpt5")

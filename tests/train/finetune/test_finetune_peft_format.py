"""Adapters there and back through PEFT's files, and what is not plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finetune_lora import adapted
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens

from pellucid.checkpoints import load_model, open_checkpoint
from pellucid.checkpoints.formats.hf import table
from pellucid.checkpoints.formats.peft import apply_adapter, module_names, save_adapter
from pellucid.checkpoints.formats.peft_config import read_config, scale, written_config
from pellucid.models import adapters as lora
from pellucid.models.adapters import LoraConfig

FILE = "adapter_model.safetensors"


def saved(folder: Path, config=LLAMA, **lora_config) -> Path:
    model = adapted(random_model(config), LoraConfig(**({"rank": 3, "alpha": 5.0} | lora_config)))
    save_adapter(folder, model, module_names(table(config)))
    return folder


def settings(folder: Path, **change: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("targets", ["all", "attention", "mlp", "layers.1.attn.[qv]_proj"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back(config, targets, tmp_path: Path):
    names = module_names(table(config))
    lora_config = LoraConfig(rank=3, alpha=5.0, dropout=0.25, targets=(targets,))
    model, again = adapted(random_model(config), lora_config), random_model(config)
    save_adapter(tmp_path, model, names)
    made = apply_adapter(again, tmp_path, names)
    before = lora.adapters(model)
    assert made.keys() == before.keys()
    for path, adapter in made.items():
        assert torch.equal(adapter.a, before[path].a)
        assert torch.equal(adapter.b, before[path].b)
        assert adapter.scale == pytest.approx(5 / 3, rel=1e-15)
        assert adapter.dropout.p == 0.25
    tokens = random_tokens(config, 2, 9)
    torch.testing.assert_close(again(tokens), model(tokens), rtol=0, atol=1e-12)


def test_names_cover_every_linear_layer_of_the_blocks():
    for config in CONFIGS.values():
        ours = [path for paths in module_names(table(config)).values() for path in paths]
        assert sorted(ours) == sorted(lora.linears(random_model(config)))


def test_the_keys_are_those_of_peft(tmp_path: Path):
    tensors = load_file(saved(tmp_path, LLAMA, targets=("layers.*.attn.q_proj",)) / FILE)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight": shape
        for layer in (0, 1)
        for part, shape in (("A", (3, 36)), ("B", (40, 3)))
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 5, ["q_proj"])


def test_three_layers_of_gpt2_become_one_of_three_times_the_rank(tmp_path: Path):
    tensors = load_file(saved(tmp_path, GPT) / FILE)
    module = "base_model.model.transformer.h.0.attn.c_attn"
    a, b = (tensors[f"{module}.lora_{part}.weight"] for part in "AB")
    assert (a.shape, b.shape) == ((9, 36), (108, 9))
    blocks = [[bool(part.any()) for part in row.split(3, dim=1)] for row in b.split(36)]
    assert blocks == [[row == column for column in range(3)] for row in range(3)]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_proj", "c_attn"]
    ranks = {"c_attn": 9, "attn.c_proj": 3}
    for key, rank in ranks.items():
        assert config["rank_pattern"].get(key, config["r"]) == rank
        assert config["alpha_pattern"].get(key, config["lora_alpha"]) == 5 / 3 * rank


def test_an_adapter_of_c_attn_becomes_three_that_share_a(tmp_path: Path):
    """B A x computed on the joined matrices, as PEFT does, and its rows handed to q, k and v."""
    names = module_names(table(GPT))
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 36), (108, 2))
    )
    write(tmp_path, {"transformer.h.1.attn.c_attn": (a, b)}, r=2, lora_alpha=3)
    model = random_model(GPT)
    made = apply_adapter(model, tmp_path, names)
    x = torch.randn(4, 36, generator=generator, dtype=torch.float64)
    joined = x @ a.T @ b.T * (3 / 2)
    for path, part in zip(names["transformer.h.1.attn.c_attn"], joined.split(36, -1), strict=True):
        torch.testing.assert_close(made[path](x) - made[path].base(x), part, rtol=0, atol=1e-12)
    assert len({id(adapter.a) for adapter in made.values()}) == 1
    again = tmp_path / "again"
    save_adapter(again, model, names)
    tensors = load_file(again / FILE)
    assert torch.equal(tensors["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"], a)
    assert torch.equal(tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"], b)


def write(folder: Path, modules: dict, **config: object) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {
        f"base_model.model.{module}.lora_{part}.weight": tensor
        for module, pair in modules.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / FILE)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))


def test_rank_stabilised_patterns_and_a_model_without_its_head(tmp_path: Path):
    a, b = torch.randn(4, 36), torch.randn(40, 4)
    config = {"r": 2, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {r"0\.self.*": 4}}
    write(tmp_path, {"layers.0.self_attn.q_proj": (a, b)}, **config)
    made = apply_adapter(random_model(LLAMA), tmp_path, module_names(table(LLAMA)))
    assert made["layers.0.attn.q_proj"].scale == pytest.approx(6 / 4**0.5)


@pytest.mark.parametrize(
    ("key", "module", "matches"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),  # whole names only
        (r"layers\.\d+\.mlp\.(up|down)_proj", "model.layers.12.mlp.down_proj", True),
        (r"(a|b)\.(c|d|e)\.[*+?]x", "m.b.e.*x", True),
        (r"a*b*c?", "aabbbc", True),  # 64³ ways, as many as there may be
        (r"a\*b\*c\*d\*", "a*b*c*d*", True),
        ("a" * 2000, "a" * 2000, True),
        (r"a*b*c*(d|e)", "", None),
        (r"a*b+c?d*", "", None),
        ("(a+)+", "", None),
        ("(?:a)*", "", None),
        ("(a){9}", "", None),
        ("a{9}", "", None),
        ("((?=a))", "", None),
        (f"({'|'.join('a' * 64)})" * 4, "", None),
        ("a" * 2001, "", None),
        ("(", "", None),
    ],
)
def test_a_pattern_is_searched_only_where_few_ways_can_be_tried(key, module, matches):
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": {key: 3}}
    if matches is None:
        with pytest.raises(ValueError, match="adapter_config.json: pattern "):
            scale(config, "m.a", 1, "x")
    else:
        assert scale(config, module, 3 if matches else 1, "x") == (1 / 3 if matches else 1)


def test_what_is_written_for_peft_beside_the_matrices():
    names = {f"m.{layer}.{leaf}": [f"{layer}.{leaf}"] for layer in "01" for leaf in ("q", "up")}
    config = written_config(
        names, {"m.0.q": 4, "m.1.q": 4, "m.0.up": 8}, {"m.0.q": 2.5, "m.1.q": 2.5, "m.0.up": 6.0},
        0.1, "base",
    )  # fmt: skip
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base",
        "r": 4, "lora_alpha": 2.5, "lora_dropout": 0.1, "bias": "none", "fan_in_fan_out": False,
        "rank_pattern": {"0.up": 8}, "alpha_pattern": {"0.up": 6},
        "target_modules": ["0.up", "q"], "inference_mode": True, "init_lora_weights": True,
        "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    assert isinstance(config["alpha_pattern"]["0.up"], int)
    joined = written_config({"m.c": ["q", "k"]}, {"m.c": 2}, {"m.c": 2.0}, 0.0, None)
    assert joined["fan_in_fan_out"]


@pytest.mark.parametrize("beginning", [None, True, False, "gaussian", "orthogonal", "eva"])
def test_how_an_adapter_began_does_not_matter_where_its_base_is_as_it_was(beginning, tmp_path):
    settings(saved(tmp_path), init_lora_weights=beginning, lora_dropout=None, lora_alpha=999999999)
    read = read_config(tmp_path)
    assert (read["lora_dropout"], read["lora_alpha"]) == (0.0, 999999999)
    settings(tmp_path, lora_alpha=10**9)
    with pytest.raises(ValueError, match="lora_alpha: expected a number from 0 to 1e9"):
        read_config(tmp_path)


def test_a_file_whose_metadata_is_wrong_is_read_as_it_is(tmp_path: Path):
    saved(tmp_path, GPT)
    tensors = load_file(tmp_path / FILE)
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    tensors[name][0, -1] = 1.0  # no longer block-diagonal
    text = json.dumps({"transformer.h.0.attn.c_attn": [3, 3, 3]})
    save_file(tensors, tmp_path / FILE, {"pellucid.ranks": text})
    made = apply_adapter(random_model(GPT), tmp_path, module_names(table(GPT)))
    assert made["layers.0.attn.q_proj"].b[0, -1] == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "type IA3; expected LORA"),
        ({"use_dora": True}, "use_dora = True is more than plain LoRA"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
        ({"something_new": 1}, "something_new = 1 is more"),
        ({"r": 4}, "has rank 3, adapter_config.json says 4"),
    ],
)
def test_what_is_not_plain_lora_is_refused(change, said, tmp_path: Path):
    settings(saved(tmp_path), **change)
    model = random_model(LLAMA)
    with pytest.raises(ValueError, match=said):
        apply_adapter(model, tmp_path, module_names(table(LLAMA)))
    assert not lora.adapters(model)


def test_what_does_not_fit_is_refused(tmp_path: Path):
    saved(tmp_path)
    names = module_names(table(GPT))
    with pytest.raises(ValueError, match="is no layer of this model.*transformer.h.0.attn.c_attn"):
        apply_adapter(random_model(GPT), tmp_path, names)
    write(tmp_path, {"transformer.h.0.mlp.c_fc": (torch.ones(2, 36), torch.ones(55, 2))}, r=2)
    with pytest.raises(ValueError, match="c_fc: B has 55 rows: expected 56"):
        apply_adapter(random_model(GPT), tmp_path, names)
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(tmp_path, random_model(GPT), names)


def test_a_file_that_is_missing_or_cut_short(tmp_path: Path):
    model, names = random_model(LLAMA), module_names(table(LLAMA))
    with pytest.raises(FileNotFoundError, match="no adapter: expected adapter_config.json"):
        apply_adapter(model, tmp_path, names)
    weights = saved(tmp_path) / FILE
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        apply_adapter(model, tmp_path, names)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no adapter weights"):
        apply_adapter(model, tmp_path, names)


@pytest.mark.assets
def test_an_adapter_fits_both_layouts_of_a_real_model(assets: Path, tmp_path: Path):
    """Meta's q and k are stored in another order of rows; adapters never see it."""
    folders = [assets / "stories260K" / layout for layout in ("meta", "hf")]
    meta, hf = (open_checkpoint(folder) for folder in folders)
    names = module_names(table(meta.config))
    model = adapted(load_model(meta, torch.float64, dialect="hf"))
    save_adapter(tmp_path, model, names)
    other = load_model(hf, torch.float64)
    apply_adapter(other, tmp_path, names)
    tokens = torch.arange(1, 12)[None]
    torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=1e-10)

"""Well-known models by their published config.json: each opens, with as many parameters."""

from __future__ import annotations

import json
from typing import Any

import pytest
from published_configs import PUBLISHED

from pellucid import trace
from pellucid.checkpoints import load_model, open_checkpoint
from pellucid.cli import main


@pytest.mark.parametrize("name", PUBLISHED)
def test_info_of_a_published_config(name, tmp_path, capsys):
    """A config.json alone is enough, and nothing in it is passed over with a warning."""
    config, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["info", str(tmp_path / "config.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == parameters


def shrunk(stated: dict[str, Any]) -> dict[str, Any]:
    """A config with everything that it says but its sizes and its window: 6 layers, 97 tokens."""
    if "text_config" in stated:  # whose class states the rest
        text = {"num_attention_heads": 8, "num_key_value_heads": 4, **stated["text_config"]}
        return {**stated, "text_config": {**shrunk({**text, "head_dim": 256}), "head_dim": 32}}
    heads, shared = stated["num_attention_heads"], stated["num_key_value_heads"]
    width = stated.get("head_dim", stated["hidden_size"] // heads)
    shared = {1: 1, heads: 4}.get(shared, 2)
    small = {"hidden_size": 4 * width, "num_attention_heads": 4, "num_key_value_heads": shared}
    small |= {"num_hidden_layers": 6, "vocab_size": 97, "intermediate_size": 80}
    small |= {key: stated[key][:6] for key in ("layer_types", "no_rope_layers") if key in stated}
    small |= {key: None for key in stated if key.endswith("_token_id")}
    if stated.get("sliding_window"):
        small["sliding_window"] = 8
    return {**stated, **small}


@pytest.mark.peers
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_small_model_with_these_keys_computes_what_transformers_computes(name, tmp_path):
    torch, transformers = (pytest.importorskip(each) for each in ("torch", "transformers"))
    stated = shrunk(PUBLISHED[name][0])
    (tmp_path / "config.json").write_text(json.dumps(stated.get("text_config", stated)))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), attn_implementation="eager"
    )
    model = model.float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) / 10)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stated))  # as published, not as saved again
    tokens = torch.randint(97, (2, 24))
    ours = load_model(open_checkpoint(tmp_path))
    with torch.no_grad(), trace.trace(ours, only="logits") as seen:  # its eager steps, as here
        ours(tokens)
        expected = model(tokens).logits
    assert float((seen["logits"] - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.peers
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_counts_the_same(name):
    torch, transformers = (pytest.importorskip(each) for each in ("torch", "transformers"))
    config, parameters = PUBLISHED[name]
    stated = json.loads(json.dumps(config.get("text_config", config)))
    model_type = stated.pop("model_type")
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **stated)
        )
    assert sum(each.numel() for each in made.parameters()) == parameters

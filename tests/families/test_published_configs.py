"""Well-known models by their published config.json: each opens, with as many parameters."""

from __future__ import annotations

import json

import pytest
from published_configs import PUBLISHED

from pellucid.cli import main


@pytest.mark.parametrize("name", PUBLISHED)
def test_info_of_a_published_config(name, tmp_path, capsys):
    """A config.json alone is enough, and nothing in it is passed over with a warning."""
    config, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["info", str(tmp_path / "config.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == parameters


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

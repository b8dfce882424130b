"""A weight that is no number: whatever reads or rewrites weights stops and names the tensor."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import pellucid
from pellucid import checkpoints
from pellucid.cli import main
from pellucid.evaluate.quantise import Format, quantise
from pellucid.evaluate.text import TextScore
from pellucid.models.finite import check_finite, is_finite

NAME = "layers.1.mlp.up_proj.weight"


@pytest.fixture
def damaged(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(checkpoints.open_checkpoint("demo").folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.{NAME}"][3, 5] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_every_way_to_use_it_names_the_tensor(damaged, tmp_path):
    lm = pellucid.load(damaged)  # loading maps: it does not look
    for call in (
        lambda: lm.generate("import os", max_new_tokens=2, temperature=0),
        lambda: pellucid.text_report(lm, ["import os, sys"]),
        lambda: quantise(lm.model, bits=4),
        lambda: pellucid.convert(damaged, tmp_path / "meta", "meta"),
        lambda: pellucid.quantise_checkpoint(damaged, tmp_path / "q", Format(bits=4)),
    ):
        with pytest.raises(ValueError, match=NAME) as caught:
            call()
        assert "\n" not in str(caught.value) and "NaN" in str(caught.value)
    assert not (tmp_path / "meta").exists() and not (tmp_path / "q").exists()


def test_what_only_shows_such_logits_says_so(damaged, tmp_path):
    with pytest.warns(UserWarning, match=f"the logits are not numbers: the weight {NAME}"):
        main(["trace", "import os", "-m", str(damaged), "-o", str(tmp_path / "t.safetensors")])
    with pytest.warns(UserWarning, match="the logits are not numbers"):
        main(["walk", "import os", "-m", str(damaged), "--json"])


@pytest.mark.parametrize(("group", "scales"), [(64, "scales"), (0, "row_scales")])
def test_a_quantised_folder_with_a_scale_that_is_no_number_is_not_loaded(tmp_path, group, scales):
    pellucid.quantise_checkpoint("demo", tmp_path / "q", Format(bits=4, group=group))
    file, name = tmp_path / "q" / "model.safetensors", f"layers.0.attn.q_proj.{scales}"
    weights = load_file(file)
    weights[name].view(-1)[7] = math.inf
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} has 1 values"):
        pellucid.load(tmp_path / "q")


def test_what_is_finite():
    assert is_finite(torch.tensor([1e38, -0.0])) and is_finite(torch.tensor([1, 2]))
    assert not is_finite(torch.tensor([[1.0], [-math.inf]]))
    with pytest.raises(ValueError, match="w has 2 values"):
        check_finite("w", torch.tensor([math.nan, 1.0, math.inf]))
    nothing = TextScore(nats=math.nan, tokens=1, text_bytes=1)
    assert math.isnan(nothing.loss) and math.isnan(nothing.perplexity)

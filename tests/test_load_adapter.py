"""``pellucid.load(…, adapter=FOLDER)``: the same logits as by hand, in everything a model does."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pellucid
from pellucid.checkpoints.formats.hf import table
from pellucid.checkpoints.formats.peft import TENSORS, module_names, save_adapter
from pellucid.checkpoints.formats.peft_config import CONFIG, read_config
from pellucid.models import adapters as lora
from pellucid.models.adapters import LoraConfig

DEMOS = pytest.mark.parametrize("demo", ["demo", "demo-gpt2"])
IDS = [5, 60, 700, 8]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each demo, with numbers as if it had been trained."""
    made = {}
    for demo in ("demo", "demo-gpt2"):
        lm, folder = pellucid.load(demo), tmp_path_factory.mktemp(demo)
        generator = torch.Generator().manual_seed(0)
        adapters = lora.inject(lm.model, LoraConfig(rank=3, alpha=5.0, targets=("all",)))
        for adapter in adapters.values():
            adapter.b.data.normal_(std=0.05, generator=generator)
        save_adapter(folder, lm.model, module_names(table(lm.config)))
        made[demo] = folder
    return made


def logits(lm: pellucid.LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([IDS]))


@DEMOS
def test_the_products_stand_beside_weights_that_stay_as_they_are(demo, folders):
    plain = pellucid.load(demo, dtype="float64")
    lm = pellucid.load(demo, dtype="float64", adapter=folders[demo])
    adapters = lora.adapters(lm.model)
    assert adapters.keys() == lora.linears(plain.model).keys()
    with torch.no_grad():
        for path, adapter in adapters.items():
            weight = plain.model.get_submodule(path).weight
            assert torch.equal(adapter.base.weight, weight)
            weight += 5.0 / 3 * (adapter.b @ adapter.a)  # Hu et al. (3)
    torch.testing.assert_close(logits(lm), logits(plain), rtol=0, atol=1e-11)
    with lora.switched_off(lm.model):
        assert torch.equal(logits(lm), logits(pellucid.load(demo, dtype="float64")))


@DEMOS
def test_everything_a_model_does_it_does_with_its_adapter(demo, folders):
    lm = pellucid.load(demo, dtype="float32", adapter=folders[demo])
    assert str(folders[demo]) in lm.name
    folded = deepcopy(lm)
    lora.fold(folded.model)
    assert folded.name == lm.name
    options = {"temperature": 0, "max_new_tokens": 6}
    assert lm.generate("def ", **options) == folded.generate("def ", **options)
    seen, walked = lm.trace(IDS), {step.name: step.value for step in lm.walk(IDS, everything=True)}
    assert seen.keys() == pellucid.load(demo).trace(IDS).keys()
    torch.testing.assert_close(walked["logits"], seen["logits"][0, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(lm.trace(IDS)["logits"], seen["logits"])  # the walk left it as it was
    graded = lm.trace(IDS, gradients=lambda found: found.logsumexp(-1).sum())
    torch.testing.assert_close(graded["logits"], seen["logits"])
    assert graded.grad("embed").abs().max() > 0


def test_what_cannot_be(folders, tmp_path: Path):
    with pytest.raises(ValueError, match="leave out stream, or adapter"):
        pellucid.load("demo", adapter=folders["demo"], stream=True)
    with pytest.raises(ValueError, match="does the adapter belong to it"):
        pellucid.load("demo", adapter=folders["demo-gpt2"])
    with pytest.raises(OSError, match=r"no adapter: expected adapter_config\.json"):
        pellucid.load("demo", adapter=tmp_path)


def test_a_chat_template_beside_the_adapter_is_spoken(folders, tmp_path: Path):
    for file in folders["demo"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert pellucid.load("demo", adapter=tmp_path).tokenizer.chat is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert pellucid.load("demo", adapter=tmp_path).tokenizer.chat is not None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lora_alpha": "x"}, "lora_alpha: expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a number"),
        ({"lora_dropout": [0.1]}, "lora_dropout: expected a number"),
        ({"r": True}, "r: expected a number"),
        ({"rank_pattern": {"q_proj": "3"}}, "rank_pattern: q_proj: expected a number"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: expected a number for each pattern"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false"),
    ],
)
def test_numbers_of_an_adapters_config_are_numbers(folders, tmp_path, change, told):
    stated = json.loads((folders["demo"] / CONFIG).read_text()) | change
    (tmp_path / CONFIG).write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=told):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "ranks", ['{"model.layers.0.mlp.up_proj": "x"}', "[1]", "{", '{"a": [-1]}']
)
def test_joined_ranks_of_a_file_are_lists_of_ranks(folders, tmp_path, ranks):
    shutil.copytree(folders["demo-gpt2"], tmp_path / "a")
    file = tmp_path / "a" / TENSORS
    save_file(load_file(file), file, {"format": "pt", "pellucid.ranks": ranks})
    with pytest.raises(ValueError, match="ranks"):
        pellucid.load("demo-gpt2", adapter=tmp_path / "a")


def test_a_number_of_an_adapter_that_is_none_is_named(folders, tmp_path):
    shutil.copytree(folders["demo"], tmp_path / "a")
    file = tmp_path / "a" / TENSORS
    tensors = load_file(file)
    name = sorted(tensors)[5]
    tensors[name].view(-1)[1] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} has 1 values that are not numbers"):
        pellucid.load("demo", adapter=tmp_path / "a")

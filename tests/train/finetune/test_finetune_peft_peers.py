"""Our adapters in PEFT on transformers models, and PEFT's in ours: the same logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_finetune_lora import adapted
from tiny import GPT, LLAMA, random_model, random_tokens

import pellucid
from pellucid import checkpoints
from pellucid.checkpoints.formats.hf import table
from pellucid.checkpoints.formats.peft import apply_adapter, module_names, save_adapter
from pellucid.models import Config
from pellucid.models import adapters as lora
from pellucid.models.adapters import LoraConfig

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

BOTH = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt2", "llama"])


def theirs(config: Config, folder: Path):
    """The same weights in transformers, through a folder."""
    checkpoints.save(folder, config, random_model(config, torch.float32).state_dict())
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@BOTH
@pytest.mark.parametrize("targets", [("all",), ("layers.*.attn.[qv]_proj",), ("layers.1.*",)])
def test_ours_in_peft(config, targets, tmp_path: Path):
    lora_config = LoraConfig(rank=3, alpha=5.0, targets=targets)
    model = adapted(random_model(config, torch.float32), lora_config)
    save_adapter(tmp_path / "adapter", model, module_names(table(config)))
    reference = peft.PeftModel.from_pretrained(
        theirs(config, tmp_path / "base"), tmp_path / "adapter"
    )
    tokens = random_tokens(config, 2, 9)
    with torch.no_grad():
        ours, plain = model(tokens), random_model(config, torch.float32)(tokens)
        torch.testing.assert_close(reference(tokens).logits, ours, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 0.01


@BOTH
@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"target_modules": ["c_attn", "q_proj"]}], ids=str
)
def test_theirs_in_pellucid(config, more, tmp_path: Path):
    arguments = {"r": 4, "lora_alpha": 7, "target_modules": "all-linear"} | more
    arguments |= {"fan_in_fan_out": config is GPT, "init_lora_weights": False}  # B is not zero
    torch.manual_seed(0)
    reference = peft.get_peft_model(theirs(config, tmp_path / "base"), peft.LoraConfig(**arguments))
    reference.save_pretrained(tmp_path / "adapter")
    model, tokens = random_model(config, torch.float32), random_tokens(config, 2, 9)
    apply_adapter(model, tmp_path / "adapter", module_names(table(config)))
    with torch.no_grad():
        expected = reference.eval()(tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
        lora.fold(model)
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_theirs_by_the_front_door(config, tmp_path: Path):
    torch.manual_seed(0)
    config = replace(config, vocab_size=2048)  # the demo's tokenizer stands beside the weights
    arguments = {"r": 4, "lora_alpha": 7, "target_modules": "all-linear"}
    arguments |= {"fan_in_fan_out": config.family == "gpt2", "init_lora_weights": False}
    checkpoints.save(
        tmp_path / "base",
        config,
        random_model(config, torch.float32).state_dict(),
        tokenizer_from=Path(pellucid.__file__).parent / "demos" / "stdlib",
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    reference = peft.get_peft_model(base, peft.LoraConfig(**arguments))
    reference.save_pretrained(tmp_path / "adapter")
    lm = pellucid.load(tmp_path / "base", adapter=tmp_path / "adapter")
    tokens = random_tokens(config, 1, 9)
    with torch.no_grad():
        expected = reference.eval()(tokens).logits
    seen = lm.trace(tokens[0].tolist())
    torch.testing.assert_close(seen["logits"], expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_the_same_gradients(config, tmp_path: Path):
    """Of GPT-2's joined q, k and v too: three adapters that share their A collect its gradient."""
    torch.manual_seed(0)
    arguments = {"r": 4, "lora_alpha": 7, "target_modules": "all-linear"}
    arguments |= {"fan_in_fan_out": config is GPT, "init_lora_weights": False}
    reference = peft.get_peft_model(theirs(config, tmp_path / "base"), peft.LoraConfig(**arguments))
    reference.save_pretrained(tmp_path / "adapter")
    model, tokens = random_model(config, torch.float32), random_tokens(config, 2, 9)
    names = module_names(table(config))
    made = apply_adapter(model, tmp_path / "adapter", names)
    reference.eval()(tokens).logits.logsumexp(-1).mean().backward()
    model(tokens).logsumexp(-1).mean().backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    for module, paths in names.items():
        a, b = (expected[f"base_model.model.{module}.lora_{x}.default.weight"] for x in "AB")
        found = torch.cat([made[path].b.grad for path in paths])
        torch.testing.assert_close(found, b, rtol=1e-4, atol=1e-6)
        assert len({id(made[path].a) for path in paths}) == 1
        torch.testing.assert_close(made[paths[0]].a.grad, a, rtol=1e-4, atol=1e-6)

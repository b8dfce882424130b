"""Each row against transformers: tiny random models, saved by one side and computed by both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_samples import SAMPLES

from pellucid import checkpoints
from pellucid.checkpoints import parameter_shapes
from pellucid.families import FAMILIES, read_config, table, write_config
from pellucid.families.names import stored_shape
from pellucid.families.shapes import SHAPES
from pellucid.generate import Sampling, generate_tokens
from pellucid.trace import trace

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")

STEPS = 48

# In bfloat16 these may differ from transformers in the last bit: it rounds in another order than
# our dialects do. The reason of each.
_ORDER = "files keep the rows of q and k in another order, in which q · k adds up"
_NORM = "its LayerNorm is computed in float32, ours in one kernel"
MAY_DIFFER = {
    "phi": "it adds MLP to attention first and then both to the stream",
    "olmo": _NORM,
    "cohere": _NORM,
    "cohere2": _NORM,
    "glm": _ORDER,
    "glm4": _ORDER,
    "helium": _ORDER,
    "ernie4_5": "it turns in float32, and " + _ORDER,
    "nanochat": _ORDER,
    "granite_swa": "the sink scales the sum of values, in ours it is one more score",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


def saved(folders: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model made and saved by transformers, norms and biases random too."""
    folder = folders / f"{name}-{dtype}".replace(" ", "_")
    if folder.is_dir():
        return folder
    stated = SAMPLES[name]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(stated)), **ids)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    centred = FAMILIES[stated["model_type"]].features.get("norm_offset", False)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            norm = weight.ndim == 1 and key.endswith("weight")
            noise = torch.randn_like(weight)
            weight.copy_((0.0 if centred else 1.0) + noise / 4 if norm else noise / 5)
    model.to(dtype).save_pretrained(folder)
    return folder


def theirs(folder: Path):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def ours(folder: Path):
    return checkpoints.load_model(checkpoints.open_checkpoint(folder))


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(1))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", SAMPLES)
def test_logits_are_those_of_eager_attention(folders, name):
    folder, tokens = saved(folders, name), some_tokens(2, 40)
    with torch.no_grad():
        expected, found = theirs(folder)(tokens).logits, ours(folder)(tokens)
    assert expected.std() > 0.1
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("name", SAMPLES)
def test_greedy_tokens_with_a_cache_are_the_same_past_the_window(folders, name):
    folder, prompt = saved(folders, name), some_tokens(1, 12)
    with torch.no_grad():
        expected = theirs(folder).generate(
            prompt, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, min_new_tokens=STEPS
        )
    steps = generate_tokens(
        ours(folder),
        prompt.tolist(),
        sampling=Sampling(temperature=0.0),
        max_new_tokens=STEPS,
        fast=False,
    )
    assert [step[0] for step in steps] == expected[0, 12:].tolist()


@pytest.mark.parametrize("name", SAMPLES)
def test_rows_of_unequal_length_are_the_same(folders, name):
    folder, tokens = saved(folders, name), some_tokens(2, 24)
    attention_mask = torch.ones_like(tokens)
    attention_mask[0, :9] = 0
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(folder)(
            tokens, attention_mask=attention_mask, position_ids=positions
        ).logits
        found = ours(folder)(tokens, starts=torch.tensor([9, 0]))
    assert relative(found[0, 9:], expected[0, 9:]) < 1e-5
    assert relative(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("name", SAMPLES)
def test_bfloat16_is_bit_equal_where_the_order_of_operations_is(folders, name):
    folder, tokens = saved(folders, name, torch.bfloat16), some_tokens(2, 40)
    model = ours(folder)
    assert model.embed.weight.dtype == torch.bfloat16
    with torch.no_grad(), trace(model, only="logits") as seen:
        model(tokens)
        expected = theirs(folder)(tokens).logits
    if SAMPLES[name]["model_type"] in MAY_DIFFER:
        assert relative(seen["logits"].float(), expected.float()) < 0.1
    else:
        assert torch.equal(seen["logits"], expected)


@pytest.mark.parametrize("name", SAMPLES)
def test_what_we_save_is_what_transformers_saved(folders, tmp_path, name):
    folder, tokens = saved(folders, name), some_tokens(2, 40)
    checkpoints.convert(folder, tmp_path / "again", "hf")
    with torch.no_grad():
        expected = theirs(folder)(tokens).logits
        assert torch.equal(theirs(tmp_path / "again")(tokens).logits, expected)
        # its config is in transformers 4's spelling: what we read from it is the same
        assert torch.equal(ours(tmp_path / "again")(tokens), ours(folder)(tokens))


@pytest.mark.parametrize("name", SAMPLES)
def test_every_key_that_transformers_writes_is_known(folders, name):
    config = theirs(saved(folders, name)).config
    expected = read_config(SAMPLES[name], "sample")
    whole = json.loads(json.dumps(config.to_dict()))  # every default spelt out
    assert read_config(whole, "whole") == expected
    stated = json.loads((saved(folders, name) / "config.json").read_text())
    assert read_config(stated, "stated") == expected


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_are_transformers_shapes(name):
    config = SHAPES[name].config
    stated = write_config(config, torch.bfloat16)
    if "qkv" not in config.biases and config.family == "gpt2":
        pytest.skip("transformers has no GPT-2 without these biases")
    model_type = stated.pop("model_type")
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **stated)
        )
    shapes = parameter_shapes(config)
    ours = {entry.stored: stored_shape(entry, shapes) for entry in table(config)}
    theirs = {key: tuple(weight.shape) for key, weight in made.named_parameters()}
    assert ours == theirs


@pytest.mark.parametrize("model_type", sorted({s["model_type"] for s in SAMPLES.values()}))
def test_defaults_are_those_of_transformers(model_type):
    """A file with nothing but sizes is read as transformers reads it, default for default."""
    sizes = {
        "hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 32,
        "intermediate_size": 80, "vocab_size": 97,
    }  # fmt: skip
    if model_type == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 12, "n_head": 32, "vocab_size": 97}
    if model_type == "helium":  # its heads are always 128 wide, 20 of them, as wide as the model
        sizes |= {"hidden_size": 2560, "num_attention_heads": 20}
    whole = transformers.AutoConfig.for_model(model_type, **sizes).to_dict()
    spelt_out = read_config(json.loads(json.dumps(whole)), "whole")
    assert read_config({"model_type": model_type, **sizes}, "sizes") == spelt_out


def _that_sees(name: str, tied: bool):
    """The config of a whole model around the text part of a sample."""
    text = transformers.AutoConfig.for_model(**SAMPLES[name], pad_token_id=0)
    sight = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    if name == "gemma3_text":
        return transformers.Gemma3Config(
            text_config=text,
            vision_config=transformers.SiglipVisionConfig(**sight),
            mm_tokens_per_image=4,
            boi_token_index=90,
            eoi_token_index=91,
            image_token_index=92,
        )
    vision = transformers.PixtralVisionConfig(**sight, head_dim=8)
    return transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=92, tie_word_embeddings=tied
    )


@pytest.mark.parametrize(
    ("name", "tied"),
    [("gemma3_text", True), ("mistral", True), ("mistral", False), ("ministral3", False)],
)
def test_the_text_part_of_a_model_that_sees(tmp_path, name, tied):
    torch.manual_seed(0)
    config = _that_sees(name, tied)
    made = transformers.AutoModelForImageTextToText.from_config(config)
    made.set_attn_implementation("eager")
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight) / 5)
    made.eval().save_pretrained(tmp_path / "x")
    tokens = some_tokens(2, 40).clamp(max=89)
    with torch.no_grad():
        expected, found = made(tokens).logits, ours(tmp_path / "x")(tokens)
    assert relative(found, expected) < 1e-5

